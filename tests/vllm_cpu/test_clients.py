"""Programs that measure or evaluate servers of OpenAI's API run against the node as they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_node import MODEL, Node
from transformers import AutoModelForCausalLM, AutoTokenizer

RunClient = Callable[[Sequence[str]], str]

CHOICES = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome", "a green apple"], "answer": 0},
    {"question": "Two plus two equals", "choices": ["nine", "four"], "answer": 1},
    {"question": "Water freezes at zero degrees", "choices": ["Celsius", "Monday"], "answer": 0},
]
_TASKS = {
    "aurora_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "aurora_generation": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 8, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "aurora_perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of lm-evaluation-harness over a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    for name, fields in _TASKS.items():
        source = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test"
        (folder / f"{name}.yaml").write_text(source + fields)
    return folder


def evaluate(run_client: RunClient, tasks: Path, out: Path, *arguments: str) -> dict[str, list[dict[str, Any]]]:
    """Run tasks; return their samples."""
    run_client(["lm_eval", "run", "--include_path", str(tasks), "--log_samples", "--output_path", str(out), *arguments])
    return {
        name: [json.loads(line) for path in out.rglob(f"samples_{name}_*.jsonl") for line in path.open()]
        for name in _TASKS
    }


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_vllms_load_generator_completes_every_request(
    node: Node, run_client: RunClient, smollm2: Path, tmp_path: Path, kind: str
) -> None:
    backend, path = ("openai", "/v1/completions") if kind == "completions" else ("openai-chat", "/v1/chat/completions")
    run_client(
        [
            *("vllm", "bench", "serve", "--backend", backend, "--base-url", node.url, "--endpoint", path),
            *("--model", MODEL, "--tokenizer", str(smollm2), "--dataset-name", "random", "--seed", "1"),
            *("--random-input-len", "24", "--random-output-len", "8", "--num-prompts", "6", "--max-concurrency", "3"),
            *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
        ]
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (6, 0)
    assert result["total_output_tokens"] == 6 * 8
    assert result["mean_ttft_ms"] > 0


def test_lm_evaluation_harness_reads_the_targets_own_likelihoods(
    node: Node, run_client: RunClient, smollm2: Path, tasks: Path, tmp_path: Path
) -> None:
    arguments = f"model={MODEL},base_url={node.url}/v1/completions,num_concurrent=2,tokenizer={smollm2}"
    samples = evaluate(
        run_client,
        tasks,
        tmp_path,
        *("--model", "local-completions", "--model_args", arguments),
        *("--tasks", ",".join(_TASKS)),
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, local_files_only=True)

    def likelihood(before: str, after: str) -> tuple[float, bool]:
        start = len(tokenizer.encode(before))
        ids = torch.tensor([tokenizer.encode(before + after)])
        with torch.inference_mode():
            logits_TV = model(ids).logits[0, start - 1 : -1]
        wanted_T = ids[0, start:]
        logprobs_T = logits_TV.log_softmax(-1).gather(1, wanted_T[:, None])
        return float(logprobs_T.sum()), bool((logits_TV.argmax(-1) == wanted_T).all())

    choices = sorted(samples["aurora_choice"], key=lambda sample: sample["doc_id"])
    assert len(choices) == len(CHOICES)
    for sample, row in zip(choices, CHOICES, strict=True):
        for (response,), choice in zip(sample["resps"], row["choices"], strict=True):
            found, is_greedy = float(response[0]), response[1] in (True, "True")
            expected, expected_greedy = likelihood(row["question"], f" {choice}")
            assert (found, is_greedy) == (pytest.approx(expected, abs=2e-3), expected_greedy)
        assert sample["acc"] == 1
    assert all(math.isfinite(float(sample["resps"][0][0])) for sample in samples["aurora_perplexity"])
    texts = {sample["doc_id"]: sample["resps"][0][0] for sample in samples["aurora_generation"]}
    assert texts[0].strip() == "Paris"


def test_lm_evaluation_harness_chats(node: Node, run_client: RunClient, tasks: Path, tmp_path: Path) -> None:
    arguments = f"model={MODEL},base_url={node.url}/v1/chat/completions,num_concurrent=2"
    samples = evaluate(
        run_client,
        tasks,
        tmp_path,
        *("--model", "local-chat-completions", "--model_args", arguments, "--apply_chat_template"),
        *("--tasks", "aurora_generation"),
    )
    texts = {sample["doc_id"]: sample["resps"][0][0] for sample in samples["aurora_generation"]}
    assert len(texts) == len(CHOICES)
    options: dict[str, Any] = {"max_tokens": 8, "stop": ["\n", "."], "seed": 1234}
    for number, row in enumerate(CHOICES):
        assert texts[number] == node.ask(row["question"], **options).choices[0].message.content
