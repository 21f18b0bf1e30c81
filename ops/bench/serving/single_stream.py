"""One request at a time: the built-in engine with and without speculation, beside other engines on the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ops.bench import prompts
from ops.bench.engines import DraftName, EnginePool, RequestMode, drive
from ops.bench.harness import Figure, Goal, Rates, Selection, compare_arms, run_alternating
from ops.bench.serving.peers import Generate, LlamaCpp, PeerAbsentError
from schemas.device import select_device
from serving.engines.builtin.engine import BuiltinEngine

Generator = Callable[[tuple[int, ...], int], tuple[int, ...]]
"""Returns the output tokens of a prompt, at most so many."""


@dataclass(frozen=True, slots=True)
class SpeedRatio:
    """Tokens per second of one arm over those of another."""

    over: str
    under: str
    goal: Goal | None = None


_LLAMA, _LLAMA_LOOKUP = "llama.cpp", "llama.cpp_lookup"

RATIOS = {
    "ours_vs_generate": SpeedRatio("ours", "generate", Goal(2.0, at_least=True)),
    "speculation_speedup_b1_greedy": SpeedRatio("speculating", "ours", Goal(1.5, at_least=True)),
    "ours_vs_llamacpp": SpeedRatio("speculating", _LLAMA, Goal(1.0, at_least=True)),
    "plain_vs_llamacpp": SpeedRatio("ours", _LLAMA),
    "llamacpp_speculation": SpeedRatio(_LLAMA_LOOKUP, _LLAMA),
    "ours_vs_llamacpp_speculating": SpeedRatio("speculating", _LLAMA_LOOKUP, Goal(1.0, at_least=True)),
    "prompt_lookup_generate": SpeedRatio("lookup", "generate"),
    "ours_vs_prompt_lookup": SpeedRatio("speculating", "lookup"),
    "random_draft_penalty_b1": SpeedRatio("undrafted", "random", Goal(1.03, at_least=False)),
}
BANDWIDTH = "bandwidth_fraction"
FIGURE_NAMES = (*RATIOS, BANDWIDTH)

_ENGINE_ARMS: dict[str, tuple[DraftName, RequestMode]] = {
    "ours": ("trained", RequestMode(speculate=False)),
    "speculating": ("trained", RequestMode()),
    "undrafted": ("random", RequestMode(speculate=False)),
    "random": ("random", RequestMode()),
}
_BYTES = {"float32": 4, "float16": 2, "int8": 1}
"""Per weight, by the engine's kernel."""
_READ_FLOATS = 1 << 27
"""512 MiB: several times the share of the last cache that one core of such a machine gets."""


class SingleStream:
    """The arms that the selected figures need, and their outputs."""

    def __init__(self, pool: EnginePool, trials: int, selected: Selection) -> None:
        self._pool, self._trials, self._selected = pool, trials, selected
        self._needed = {arm for name, ratio in RATIOS.items() if selected(name) for arm in (ratio.over, ratio.under)}
        if selected(BANDWIDTH):
            self._needed.add("ours")
        self._arms: dict[str, Generator] = {}
        self._absent: dict[str, str] = {}
        self._detail: dict[str, Any] = {}
        self._outputs: dict[str, list[tuple[int, ...]]] = {}

    def measure(self) -> Iterator[Figure]:
        """Start the arms, run the trials, and compare."""
        self._start_engines()
        self._load_generate()
        self._load_llama_cpp()
        rates = run_alternating({name: self._arm(name) for name in self._arms}, self._trials)
        for name, ratio in RATIOS.items():
            if self._selected(name):
                yield self._compare(name, ratio, rates)
        if self._selected(BANDWIDTH):
            yield self._bandwidth(rates["ours"].clock.median)

    def _start_engines(self) -> None:
        for name, (draft, mode) in _ENGINE_ARMS.items():
            if name in self._needed:
                engine = self._pool.engine(draft)
                self._pool.warm_up(engine, mode)
                self._arms[name] = partial(self._generate, engine, mode)

    def _load_generate(self) -> None:
        if not self._needed & {"generate", "lookup"}:
            return
        device = select_device(self._pool.settings.serve.device, "serve.device")
        generate, rates = Generate.fastest(self._pool.folder, self._pool.prompts[0], device)
        self._detail["generate_dtype"] = generate.dtype
        self._detail["generate_tried"] = {dtype: round(rate, 2) for dtype, rate in rates.items()}
        for name, lookup in (("generate", False), ("lookup", True)):
            if name in self._needed:
                self._arms[name] = partial(generate.generate, lookup=lookup)

    def _load_llama_cpp(self) -> None:
        folder, settings = self._pool.folder, self._pool.settings
        cache = Path(settings.stack.data_dir) / "bench" / "gguf"
        for name in (_LLAMA, _LLAMA_LOOKUP):
            if name in self._needed:
                try:
                    llama = LlamaCpp(
                        folder,
                        cache,
                        settings.serve.num_threads,
                        prompts.read_end_tokens(folder),
                        lookup=name == _LLAMA_LOOKUP,
                    )
                except PeerAbsentError as error:
                    self._absent[name] = str(error)
                    continue
                self._detail["llama.cpp_version"] = llama.version
                self._arms[name] = llama.generate
                llama.generate(self._pool.prompts[0], 4)

    def _generate(
        self, engine: BuiltinEngine, mode: RequestMode, prompt: tuple[int, ...], _max_tokens: int
    ) -> tuple[int, ...]:
        return tuple(drive(engine, [self._pool.request(prompt, mode)], concurrency=1).outputs[0].tokens)

    def _arm(self, name: str) -> Callable[[int], int]:
        def run_trial(trial: int) -> int:
            (prompt,) = self._pool.trial_prompts(trial, 1)
            tokens = self._arms[name](prompt, self._pool.max_tokens)
            self._outputs.setdefault(name, []).append(tokens)
            return len(tokens)

        return run_trial

    def _compare(self, name: str, ratio: SpeedRatio, rates: dict[str, Rates]) -> Figure:
        if why := self._absent.get(ratio.over) or self._absent.get(ratio.under):
            return Figure(name, None, goal=ratio.goal, detail={"why": why})
        detail = {
            "same_tokens": round(self._agreement(ratio.over, ratio.under), 4),
            **{key: value for key, value in self._detail.items() if key.startswith((ratio.over, ratio.under))},
        }
        return compare_arms(name, rates, ratio.over, ratio.under, goal=ratio.goal, detail=detail)

    def _agreement(self, one: str, other: str) -> float:
        """Return the share of the tokens before the first difference; rounding separates two arms at a near tie."""
        pairs = list(zip(self._outputs[one], self._outputs[other], strict=True))
        return sum(common_prefix(a, b) for a, b in pairs) / max(sum(min(len(a), len(b)) for a, b in pairs), 1)

    def _bandwidth(self, tokens_per_s: float) -> Figure:
        kernel = self._pool.engine().weight_dtype
        weight_bytes = count_matrix_elements(self._pool.folder) * _BYTES[kernel]
        bandwidth = _read_bandwidth(self._pool.settings.serve.num_threads)
        detail = {
            "kernel": kernel,
            "weight_bytes": weight_bytes,
            "read_bytes_per_s": round(bandwidth),
            "tokens_per_s": round(tokens_per_s, 2),
        }
        return Figure(BANDWIDTH, tokens_per_s * weight_bytes / bandwidth, detail=detail)


def count_matrix_elements(folder: Path) -> int:
    """Count the weights of the matrices that a decoding step multiplies with.

    Embeddings are looked up and not multiplied with, unless they are also the output layer.
    """
    matrices: dict[str, int] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                if len(shape := file.get_slice(name).get_shape()) == 2:
                    matrices[name] = shape[0] * shape[1]
    untied = "lm_head.weight" in matrices
    return sum(size for name, size in matrices.items() if not (untied and "embed_tokens" in name))


def _read_bandwidth(threads: int, repeats: int = 5) -> float:
    """Return the bytes per second at which the threads read memory: the best of a sum and a dot product."""
    torch.set_num_threads(threads)
    numbers = torch.ones(_READ_FLOATS)
    one, other = numbers.chunk(2)
    reads: tuple[Callable[[], torch.Tensor], ...] = (lambda: numbers.sum(), lambda: torch.dot(one, other))  # noqa: PLW0108 - numbers.sum has no one type
    best = 0.0
    for _ in range(repeats):
        for read in reads:
            started = time.perf_counter()
            read()
            best = max(best, numbers.nbytes / (time.perf_counter() - started))
    return best


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Return the number of equal items at the beginning of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
