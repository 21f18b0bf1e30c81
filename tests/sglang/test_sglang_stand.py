"""The base of the other tests: on the stand-ins, SGLang's server answers as its target does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_server import eagle


def test_speculation_outputs_the_targets_tokens(
    serving: Any, random_draft: Path, prompts: list[list[int]], target_outputs: list[list[int]]
) -> None:
    with serving(eagle(random_draft)) as server:
        answers = [server.generate(prompt, 40, sampling={"ignore_eos": True}) for prompt in prompts]
    assert [answer["output_ids"] for answer in answers] == target_outputs
    assert all(len(tokens) == 40 for tokens in target_outputs)
    assert all(answer["meta_info"]["spec_verify_ct"] > 30 for answer in answers)
