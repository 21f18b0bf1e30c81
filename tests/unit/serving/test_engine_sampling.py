"""Sampled output has the target's distribution for every draft."""

from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from scipy.stats import chisquare
from tiny_target import EOS, VOCABULARY, write_tiny_target
from transformers import LlamaForCausalLM

from schemas.settings import load
from schemas.speculator.acceptance import sampling_probs
from schemas.trace.record import VerifyStep
from serving.engines.base import Finish, Output, Request
from serving.engines.builtin.engine import BuiltinEngine

DRAWS = 1500
PROMPT = (4, 8, 15, 16)
DRAFTERS: dict[str, dict[str, object]] = {
    "chain": {"serve.drafter": "eagle", "serve.draft_tree_width": 1},
    "tree": {"serve.drafter": "eagle", "serve.draft_tree_width": 3},
    "suffix": {"serve.drafter": "suffix", "serve.suffix_scope": "node"},
    "merged chains": {"serve.suffix_scope": "node"},
    "merged trees": {"serve.suffix_scope": "node", "serve.draft_tree_width": 3},
}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 0.9, 0), (0.9, 1.0, 12)])
def test_the_second_token_has_the_targets_distribution(
    tmp_path: Path, temperature: float, top_p: float, top_k: int, drafter: str
) -> None:
    """The second token is the first that a draft can propose; a third makes the draft a chain of two.

    The suffix drafter proposes what followed the first token in earlier answers to the same prompt.

    With 1,500 draws the chi-square test at 1e-4 finds a total variation of 0.1 on these cells nearly always.
    """
    folder = write_tiny_target(tmp_path, scale=0.12)
    first_steps = FirstSteps()
    flags = {"target.path": str(folder), "speculator.draft_vocab_size": VOCABULARY, "serve.max_num_seqs": 16}
    flags |= {"serve.adaptive_drafting": False, "serve.num_speculative_tokens": 2, **DRAFTERS[drafter]}
    engine = BuiltinEngine(
        load(environ={}, flags={**flags, "serve.max_waiting_requests": DRAWS, "serve.max_model_len": 64}), first_steps
    )
    outputs: SimpleQueue[tuple[int, Output]] = SimpleQueue()
    for seed in range(DRAWS):
        request = Request(str(seed), PROMPT, 3, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        engine.submit(request, lambda o, seed=seed: outputs.put((seed, o)))
    engine.start()
    outputs_by_seed: dict[int, list[int]] = {seed: [] for seed in range(DRAWS)}
    open_requests = DRAWS
    while open_requests:
        seed, output = outputs.get(timeout=60)
        outputs_by_seed[seed].extend(output.tokens)
        open_requests -= output.finish is not None
    engine.stop()
    assert engine.health().draft_tokens > 0
    first_V, second_VV = _token_probs(
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), temperature, top_p, top_k
    )
    expected = first_V @ second_VV
    counts = torch.zeros(VOCABULARY)
    for tokens in outputs_by_seed.values():
        if len(tokens) > 1:
            counts[tokens[1]] += 1
    assert counts[expected == 0].sum() == 0
    cells = expected * counts.sum() >= 5
    observed = torch.cat([counts[cells], counts[~cells].sum()[None]]).double()
    wanted = torch.cat([expected[cells], expected[~cells].sum()[None]]).double()
    kept = wanted > 0
    wanted = wanted[kept] / wanted[kept].sum() * observed[kept].sum()
    assert chisquare(observed[kept].numpy(), wanted.numpy()).pvalue > 1e-4
    if drafter == "suffix":
        probs = torch.tensor([second_VV[step.tokens[0], step.draft_tokens[0]] for step in first_steps.drafted])
        assert len(probs) > DRAWS / 2
        accepted = sum(0 in step.accepted for step in first_steps.drafted)
        deviation = (probs * (1 - probs)).sum().sqrt()
        assert abs(accepted - probs.sum()) < 4 * deviation, "a draft that ignores the noise is accepted with p(x)"


class FirstSteps:
    """A trace sink that keeps the first verify step of each request if it drafts a token that is not EOS."""

    def __init__(self) -> None:
        self.drafted: list[VerifyStep] = []

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        first = (step for step in verify_steps if step.verify_step == 1)
        self.drafted += [step for step in first if step.draft_tokens and step.draft_tokens[0] != EOS]


def _token_probs(
    model: LlamaForCausalLM, temperature: float, top_p: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[V] exact distribution of the first output token if it is not EOS, and [V, V] that of the second one by first."""
    with torch.inference_mode():
        first = sampling_probs(model(torch.tensor([PROMPT])).logits[0, -1:], temperature, top_p, top_k)[0]
        first[0] = 0
        first /= first.sum()
        follow = torch.stack([model(torch.tensor([[*PROMPT, t]])).logits[0, -1] for t in range(VOCABULARY)])
        return first, sampling_probs(follow, temperature, top_p, top_k)
