"""One trainer in a process of its own, for ``aurora bench trainer``: training steps on request, and their cost.

Run as ``python -P peer_worker.py TRAINER DATA THREADS TYPES`` by the Python in which the trainer is installed, so this
module imports nothing of Aurora Stream. A request and its response are one line of JSON each; the first line says that
the trainer is installed, or why it is absent. A request for 0 steps tries all ways in which the trainer can do a step,
and keeps the fastest. A way ends with the type of matrix products; weights, gradients and optimizers are float32.

Shapes: S sequences of n tokens, H hidden size, F feature width, V and D target and draft vocabulary.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

WEIGHTS, CONFIG = "weights.pt", "config.json"
LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0
DECAY = 0.8
LAST_RMS = 20.0
"""Root mean square of the target's last states: with embeddings of deviation 0.02 it makes peaked distributions."""
TYPES = ("float32", "bfloat16")
"""Of matrix products."""
_STATUS, _CLEAR, _PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs"), "5"
"""Linux, proc(5): the file with the memory of this process, and the value that resets the peak."""
_OPTIMIZER_IMPORT = "torch._dynamo"
"""Torch's optimizers import it at their first step."""

Tensors = Mapping[str, Tensor]


class BenchTrainer(Protocol):
    """A trainer under comparison: whole training steps, from tokens and states to updated weights."""

    modules: tuple[str, ...]
    """Its imports; memory is counted after them."""
    ways: tuple[str, ...]
    """The ways in which it can do a step."""

    def __init__(self, weights: Tensors, config: Mapping[str, Any]) -> None: ...

    def step(self, sequences: Tensors, ttt_steps: int, way: str, /) -> float:
        """Train on ``tokens`` [S, n], ``features`` [S, n, F] and ``last`` [S, n, H]; return the loss before it."""
        ...


@dataclass(frozen=True, slots=True)
class StepsCost:
    """The cost of some training steps."""

    seconds: float
    processor: float
    """Seconds of processor time."""
    loss: float
    """Of the first step."""
    peak: int
    """Peak resident bytes beyond those after the imports; 0 if the system does not report it."""
    way: str


class Speculators:
    """The EAGLE-3 model of ``speculators``, its head unfrozen, as its trainer runs it.

    Weights with norms of the captured layers are EAGLE-3.1.
    """

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
        speculators_config = SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=1)],
            default_proposal_method="greedy",
            verifier=verifier,
        )
        normed = "fc_norm.0.weight" in weights
        self.model = Eagle3DraftModel(
            Eagle3SpeculatorConfig(
                transformer_layer_config=layer,
                draft_vocab_size=config["draft_vocab_size"],
                speculators_config=speculators_config,
                fc_norm=normed,
                norm_output=normed,
            )
        ).float()
        own = {name.replace("midlayer.", "layers.0."): value for name, value in weights.items()}
        own["verifier_lm_head.weight"] = own["embed_tokens.weight"][own["t2d"]]
        own["verifier_norm.weight"] = torch.full([config["hidden_size"]], LAST_RMS)
        self.model.load_state_dict(own)
        self.model.lm_head.weight.requires_grad = True
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=LEARNING_RATE, fused=True)
        self._loss = resolve_loss_config("kl_div", "eager")

    def step(self, sequences: Tensors, ttt_steps: int, way: str) -> float:
        """Train on one packed sequence, or on each sequence with accumulated gradients."""
        number, rows = sequences["tokens"].shape[0], sequences["tokens"].shape[1] - 1
        packs = [slice(0, number)] if way.startswith("packed") else [slice(i, i + 1) for i in range(number)]
        self._optimizer.zero_grad()
        total = 0.0
        for pack in packs:
            tokens, features, last = (sequences[name][pack] for name in ("tokens", "features", "last"))
            with autocast_products(way):
                _, loss, _ = self.model(
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
        torch.nn.utils.clip_grad_norm_(self._trained, MAX_GRAD_NORM)
        self._optimizer.step()
        return total


class SpecForge:
    """The EAGLE-3 model of ``specforge`` with the attention that needs no GPU, on recorded states as in its trainer.

    Its loss is a GPU kernel; the plain loss beside that kernel replaces it. Its teacher is the target's head over the
    recorded last states: at once, or in pieces of the vocabulary (``compact``).
    """

    modules: tuple[str, ...] = ("specforge.algorithms.eagle3.model", "transformers.models.llama")
    ways: tuple[str, ...] = tuple(f"{form} {dtype}" for form in ("at once", "compact") for dtype in TYPES)

    def __init__(self, weights: Tensors, config: Mapping[str, Any]) -> None:
        from specforge.algorithms.eagle3 import model as eagle3
        from specforge.core import loss
        from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
        from transformers import LlamaConfig

        class PlainLoss:
            apply = staticmethod(loss._compute_loss)

        eagle3.LogSoftmaxLoss = PlainLoss
        draft = LlamaForCausalLMEagle3(LlamaConfig(**config), attention_backend="sdpa").float()
        draft.load_state_dict(weights)
        draft.embed_tokens.weight.requires_grad = False
        self._head = weights["embed_tokens.weight"]
        self.model = eagle3.OnlineEagle3Model(draft, attention_backend="sdpa")
        self._trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=LEARNING_RATE, fused=True)

    def step(self, sequences: Tensors, ttt_steps: int, way: str) -> float:
        """Train on all sequences as one batch; row t reads token t + 1 and has the next one as its teacher."""
        tokens, features, last = (sequences[name] for name in ("tokens", "features", "last"))
        self.model.length = ttt_steps
        self._optimizer.zero_grad()
        with autocast_products(way):
            losses, *_ = self.model(
                input_ids=tokens[:, 1:],
                attention_mask=torch.ones_like(tokens[:, 1:]),
                loss_mask=torch.ones_like(tokens[:, 1:])[..., None],
                hidden_states=features[:, :-1].float(),
                **self._teacher(last[:, 1:], way),
            )
        loss = sum(DECAY**k * loss_k for k, loss_k in enumerate(losses))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, MAX_GRAD_NORM)
        self._optimizer.step()
        return float(loss.detach())

    def _teacher(self, last: Tensor, way: str) -> dict[str, Any]:
        """Return the arguments that its strategy for recorded states passes to the model."""
        if way.startswith("compact"):
            return {"target": None, "target_hidden_for_compact": last, "target_head_weight": self._head}
        with torch.no_grad():
            return {"target": last @ self._head.T}


def autocast_products(way: str) -> torch.autocast:
    """Return the autocast for the type of matrix products that a way ends with."""
    return torch.autocast("cpu", torch.bfloat16, enabled=way.endswith("bfloat16"))


class StepWorker:
    """Runs requested steps of one trainer."""

    def __init__(self, trainer: type[BenchTrainer], data: Path, types: Sequence[str]) -> None:
        for module in (*trainer.modules, _OPTIMIZER_IMPORT):
            import_module(module)
        self._idle = _memory("VmRSS")
        self._data = data
        weights = torch.load(data / WEIGHTS, weights_only=True)
        self._trainer = trainer(weights, json.loads((data / CONFIG).read_text()))
        self._ways = [way for way in trainer.ways if way.endswith(tuple(types))]
        self._fastest: dict[tuple[str, int], str] = {}
        self._loaded: tuple[str, Tensors] = "", {}

    def run_steps(self, case: str, ttt_steps: int, number: int) -> StepsCost:
        """Run steps in the fastest way; 0 steps try every way once and select it."""
        if number:
            return self._measure(case, ttt_steps, number, self._fastest[case, ttt_steps])
        tried = [self._measure(case, ttt_steps, 1, way) for way in self._ways]
        fastest = min(tried, key=lambda cost: cost.seconds)
        self._fastest[case, ttt_steps] = fastest.way
        return replace(fastest, loss=tried[0].loss)

    def _measure(self, case: str, ttt_steps: int, number: int, way: str) -> StepsCost:
        if self._loaded[0] != case:
            self._loaded = case, torch.load(self._data / case, weights_only=True)
        if _CLEAR.exists():
            _CLEAR.write_text(_PEAK)
        clock, processor = time.perf_counter(), time.process_time()
        losses = [self._trainer.step(self._loaded[1], ttt_steps, way) for _ in range(number)]
        seconds = time.perf_counter() - clock, time.process_time() - processor
        return StepsCost(*seconds, losses[0], max(_memory("VmHWM") - self._idle, 0), way)


def _memory(name: str) -> int:
    """Return the bytes under that name of proc(5); 0 without such a file."""
    if not _STATUS.exists():
        return 0
    return next(int(line.split()[1]) << 10 for line in _STATUS.read_text().splitlines() if line.startswith(name))


def serve_requests(start: Callable[[], StepWorker], package: str, requests: Iterable[str], responses: TextIO) -> None:
    """Run the requested steps until the requests end."""

    def respond(value: Mapping[str, Any]) -> None:
        responses.write(json.dumps(value) + "\n")
        responses.flush()

    try:
        worker = start()
    except ImportError as error:
        respond({"absent": str(error)})
        return
    respond({"version": version(package), "torch": torch.__version__})
    for line in requests:
        respond(asdict(worker.run_steps(**json.loads(line))))


def main(trainer: type[BenchTrainer], package: str, data: Path, threads: int, types: Sequence[str]) -> None:
    """Respond on standard output; redirect the output of libraries to standard error."""
    torch.set_num_threads(threads)
    responses = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve_requests(partial(StepWorker, trainer, data, types), package, sys.stdin, responses)


if __name__ == "__main__":
    peers: dict[str, type[BenchTrainer]] = {"speculators": Speculators, "specforge": SpecForge}
    main(peers[sys.argv[1]], sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(","))
