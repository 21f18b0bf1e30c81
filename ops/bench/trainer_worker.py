"""One trainer in a process of its own, for ``aurora bench trainer``: training steps on request, and what they took.

Run as ``python -P trainer_worker.py TRAINER DATA THREADS TYPES`` by the Python that the trainer is installed in, so
nothing of Aurora Stream is imported here. A request and its answer are a line of JSON each; the first line says that
the trainer is there, or why not. ``warm`` tries the ways in which a trainer can do the step, and keeps the fastest. A
way names the type of products last; weights, gradients and optimizers are float32 in each.

Shapes: S sequences of n tokens, H hidden size, F feature width, V and D target and draft vocabulary.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

WEIGHTS, CONFIG = "weights.pt", "config.json"
LEARNING_RATE = 1e-4
CLIP = 1.0
DECAY = 0.8
LAST_RMS = 20.0
"""Root mean square of the target's last states: with embeddings of deviation 0.02 it makes peaked distributions."""
_STATUS, _CLEAR, _PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs"), "5"
"""Linux, proc(5): where the memory of this process is told, and what resets the peak."""
TYPES = ("float32", "bfloat16")
"""Of products."""
_BY_OPTIMIZERS = "torch._dynamo"
"""What torch's optimizers import at their first step, were it not there."""

Tensors = Mapping[str, Tensor]


class Trainer(Protocol):
    """What is compared: whole training steps, from tokens and states to updated weights."""

    modules: tuple[str, ...]
    """What it imports: memory is counted from then on."""
    ways: tuple[str, ...]
    """How it can do a step."""

    def __init__(self, weights: Tensors, config: Mapping[str, Any]) -> None: ...

    def step(self, sequences: Tensors, ttt_steps: int, way: str, /) -> float:
        """Learn from ``tokens`` [S, n], ``features`` [S, n, F] and ``last`` [S, n, H]; gives the loss before it."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """What some steps took."""

    seconds: float
    processor: float
    """Seconds of processor time."""
    loss: float
    """Of the first of them."""
    peak: int
    """Bytes resident at most, beyond those that the imports take; 0 where the system does not tell."""
    way: str


class Speculators:
    """The EAGLE-3 model of ``speculators``, its head unfrozen, as its trainer runs it."""

    modules: tuple[str, ...] = ("speculators.models.eagle3", "transformers.models.llama")
    ways: tuple[str, ...] = tuple(f"{form} {dtype}" for form in ("packed", "one by one") for dtype in TYPES)

    def __init__(self, weights: Tensors, config: Mapping[str, Any]) -> None:
        from speculators import SpeculatorsConfig, VerifierConfig
        from speculators.losses import resolve_loss_config
        from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
        from speculators.proposals.greedy import GreedyTokenProposalConfig
        from transformers import LlamaConfig

        layer = LlamaConfig(**config)
        layer._attn_implementation = "sdpa"
        verifier = VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"])
        proposal = GreedyTokenProposalConfig(speculative_tokens=1)
        self._model = Eagle3DraftModel(
            Eagle3SpeculatorConfig(
                transformer_layer_config=layer,
                draft_vocab_size=config["draft_vocab_size"],
                speculators_config=SpeculatorsConfig(
                    algorithm="eagle3",
                    proposal_methods=[proposal],
                    default_proposal_method="greedy",
                    verifier=verifier,
                ),
            )
        ).float()
        own = {name.replace("midlayer.", "layers.0."): value for name, value in weights.items()}
        own["verifier_lm_head.weight"] = own["embed_tokens.weight"][: config["draft_vocab_size"]]
        own["verifier_norm.weight"] = torch.full([config["hidden_size"]], LAST_RMS)
        self._model.load_state_dict(own)
        self._model.lm_head.weight.requires_grad = True
        self._learned = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._learned, lr=LEARNING_RATE, fused=True)
        self._loss = resolve_loss_config("kl_div", "eager")

    def step(self, sequences: Tensors, ttt_steps: int, way: str) -> float:
        """One packed sequence, or the sequences after one another with their gradients added up."""
        number, rows = sequences["tokens"].shape[0], sequences["tokens"].shape[1] - 1
        packs = [slice(0, number)] if way.startswith("packed") else [slice(i, i + 1) for i in range(number)]
        self._optimizer.zero_grad()
        total = 0.0
        for pack in packs:
            tokens, features, last = (sequences[name][pack] for name in ("tokens", "features", "last"))
            with products(way):
                _, loss, _ = self._model(
                    hidden_states=features[:, :-1].float().flatten(0, 1)[None],
                    input_ids=tokens[:, 1:].reshape(1, -1),
                    document_ids=torch.arange(len(tokens)).repeat_interleave(rows)[None],
                    position_ids=torch.arange(1, rows + 1).repeat(len(tokens))[None],
                    loss_mask=torch.ones(1, len(tokens) * rows, dtype=torch.bool),
                    verifier_last_hidden_states=last[:, 1:].flatten(0, 1)[None],
                    ttt_steps=ttt_steps,
                    ttt_step_loss_decay=DECAY,
                    loss_config=self._loss,
                )
            (loss / len(packs)).backward()
            total += float(loss.detach()) / len(packs)
        torch.nn.utils.clip_grad_norm_(self._learned, CLIP)
        self._optimizer.step()
        return total


class SpecForge:
    """The EAGLE-3 model of ``specforge`` with the attention that needs no GPU, on recorded states as in its trainer.

    Its loss is a kernel for GPUs; the plain one that stands beside that kernel takes its place. Its teacher is the
    target's head over the recorded last states: at once, or in pieces of the vocabulary (``compact``).
    """

    modules: tuple[str, ...] = ("specforge.algorithms.eagle3.model", "transformers.models.llama")
    ways: tuple[str, ...] = tuple(f"{form} {dtype}" for form in ("at once", "compact") for dtype in TYPES)

    def __init__(self, weights: Tensors, config: Mapping[str, Any]) -> None:
        from specforge.algorithms.eagle3 import model as eagle3
        from specforge.core import loss
        from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
        from transformers import LlamaConfig

        class Plain:
            apply = staticmethod(loss._compute_loss)

        eagle3.LogSoftmaxLoss = Plain
        draft = LlamaForCausalLMEagle3(LlamaConfig(**config), attention_backend="sdpa").float()
        draft.load_state_dict(weights)
        draft.embed_tokens.weight.requires_grad = False
        self._head = weights["embed_tokens.weight"]
        self._model = eagle3.OnlineEagle3Model(draft, attention_backend="sdpa")
        self._learned = [parameter for parameter in draft.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._learned, lr=LEARNING_RATE, fused=True)

    def step(self, sequences: Tensors, ttt_steps: int, way: str) -> float:
        """All sequences as one batch; row t reads token t + 1 and is taught by what follows it."""
        tokens, features, last = (sequences[name] for name in ("tokens", "features", "last"))
        self._model.length = ttt_steps
        self._optimizer.zero_grad()
        with products(way):
            losses, *_ = self._model(
                input_ids=tokens[:, 1:],
                attention_mask=torch.ones_like(tokens[:, 1:]),
                loss_mask=torch.ones_like(tokens[:, 1:])[..., None],
                hidden_states=features[:, :-1].float(),
                **self._teacher(last[:, 1:], way),
            )
        loss = sum(DECAY**k * loss_k for k, loss_k in enumerate(losses))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._learned, CLIP)
        self._optimizer.step()
        return float(loss.detach())

    def _teacher(self, last: Tensor, way: str) -> dict[str, Any]:
        """What its strategy for recorded states hands to the model."""
        if way.startswith("compact"):
            return {"target": None, "target_hidden_for_compact": last, "target_head_weight": self._head}
        with torch.no_grad():
            return {"target": last @ self._head.T}


def products(way: str) -> torch.autocast:
    """The type of products that a way names."""
    return torch.autocast("cpu", torch.bfloat16, enabled=way.endswith("bfloat16"))


TRAINERS: dict[str, type[Trainer]] = {"speculators": Speculators, "specforge": SpecForge}


class Worker:
    """Answers requests for steps of one trainer."""

    def __init__(self, trainer: type[Trainer], data: Path, types: Sequence[str]) -> None:
        for module in (*trainer.modules, _BY_OPTIMIZERS):
            import_module(module)
        self._idle = memory("VmRSS")
        self._data = data
        weights = torch.load(data / WEIGHTS, weights_only=True)
        self._trainer = trainer(weights, json.loads((data / CONFIG).read_text()))
        self._ways = [way for way in trainer.ways if way.endswith(tuple(types))]
        self._way: dict[tuple[str, int], str] = {}
        self._held: tuple[str, Tensors] = "", {}

    def warm(self, case: str, ttt_steps: int) -> Done:
        """Try every way once, and keep to the fastest from now on."""
        tried = [self._run(case, ttt_steps, 1, way) for way in self._ways]
        fastest = min(tried, key=lambda done: done.seconds)
        self._way[case, ttt_steps] = fastest.way
        return Done(**{**asdict(fastest), "loss": tried[0].loss})

    def steps(self, case: str, ttt_steps: int, number: int) -> Done:
        """So many steps in the way that was the fastest."""
        return self._run(case, ttt_steps, number, self._way[case, ttt_steps])

    def _run(self, case: str, ttt_steps: int, number: int, way: str) -> Done:
        if self._held[0] != case:
            self._held = case, torch.load(self._data / case, weights_only=True)
        forget_peak()
        clock, processor = time.perf_counter(), time.process_time()
        losses = [self._trainer.step(self._held[1], ttt_steps, way) for _ in range(number)]
        took = time.perf_counter() - clock, time.process_time() - processor
        return Done(*took, losses[0], max(memory("VmHWM") - self._idle, 0), way)


def memory(name: str) -> int:
    """Bytes of this process under that name of proc(5); 0 where there is no such file."""
    if not _STATUS.exists():
        return 0
    return next(int(line.split()[1]) << 10 for line in _STATUS.read_text().splitlines() if line.startswith(name))


def forget_peak() -> None:
    """From now on the peak is counted anew."""
    if _CLEAR.exists():
        _CLEAR.write_text(_PEAK)


def answer(start: Callable[[], Worker], package: str, requests: Iterable[str], answers: TextIO) -> None:
    """Until the requests end."""

    def say(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        worker = start()
    except ImportError as error:
        say({"absent": str(error)})
        return
    say({"version": version(package), "torch": torch.__version__})
    for line in requests:
        request = json.loads(line)
        if request["number"]:
            done = worker.steps(request["case"], request["ttt_steps"], request["number"])
        else:
            done = worker.warm(request["case"], request["ttt_steps"])
        say(asdict(done))


def main(trainer: type[Trainer], package: str, data: Path, threads: int, types: Sequence[str]) -> None:
    """Answer on standard output; what libraries print goes to standard error."""
    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answer(partial(Worker, trainer, data, types), package, sys.stdin, answers)


if __name__ == "__main__":
    main(TRAINERS[sys.argv[1]], sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(","))
