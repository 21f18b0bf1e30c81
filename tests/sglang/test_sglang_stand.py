"""What the tests beside this one rest on: the server answers on the stand-ins as a target should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_server import eagle


def test_speculation_gives_the_tokens_of_the_target_alone(
    serving: Any, random_draft: Path, prompts: list[list[int]], said_by_target: list[list[int]]
) -> None:
    with serving(eagle(random_draft)) as server:
        answers = [server.generate(prompt, 40, sampling={"ignore_eos": True}) for prompt in prompts]
    assert [answer["output_ids"] for answer in answers] == said_by_target
    assert all(len(tokens) == 40 for tokens in said_by_target)
    assert all(answer["meta_info"]["spec_verify_ct"] > 30 for answer in answers)
