"""One request at a time: our engine, with speculation and without, beside others that run the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ops.bench import machine, paired, prompted
from ops.bench.drive import drive
from ops.bench.paired import Figure, Goal, Rates, interleaved
from ops.bench.peers import Generate, LlamaCpp, PeerAbsentError
from ops.bench.stand import Draft, Mode, Stand
from schemas.device import device_of
from serving.engines.builtin.engine import BuiltinEngine

Arm = Callable[[tuple[int, ...], int], tuple[int, ...]]
"""The answer to a prompt, in at most so many tokens."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Tokens a second of one arm over another's."""

    over: str
    under: str
    goal: Goal | None = None


RATIOS = {
    "ours_vs_generate": Ratio("ours", "generate", Goal(2.0, at_least=True)),
    "speculation_speedup_b1_greedy": Ratio("speculating", "ours", Goal(1.5, at_least=True)),
    "ours_vs_llamacpp": Ratio("speculating", "llama.cpp", Goal(1.0, at_least=True)),
    "plain_vs_llamacpp": Ratio("ours", "llama.cpp"),
    "prompt_lookup_generate": Ratio("lookup", "generate"),
    "ours_vs_prompt_lookup": Ratio("speculating", "lookup"),
    "random_draft_penalty_b1": Ratio("undrafted", "random", Goal(1.03, at_least=False)),
}
BANDWIDTH = "bandwidth_fraction"
NAMES = (*RATIOS, BANDWIDTH)

_BYTES = {"float32": 4, "float16": 2, "int8": 1}
"""Of a weight, by the engine's kernel."""


class SingleStream:
    """The arms that the wanted figures need, and what they answered."""

    def __init__(self, stand: Stand, wanted: Callable[[str], bool]) -> None:
        self._stand = stand
        self._wanted = wanted
        self._names = {arm for name, ratio in RATIOS.items() if wanted(name) for arm in (ratio.over, ratio.under)} | (
            {"ours"} if wanted(BANDWIDTH) else set()
        )
        self._arms: dict[str, Arm] = {}
        self._absent: dict[str, str] = {}
        self._told: dict[str, Any] = {}
        self._answers: dict[str, list[tuple[int, ...]]] = {}

    def figures(self) -> Iterator[Figure]:
        """Measure."""
        self._prepare()
        rates = interleaved({name: self._trial(name) for name in self._arms}, self._stand.plan.trials)
        for name, ratio in RATIOS.items():
            if self._wanted(name):
                yield self._figure(name, ratio, rates)
        if self._wanted(BANDWIDTH):
            yield self._bandwidth(rates["ours"].clock.median)

    def _figure(self, name: str, ratio: Ratio, rates: dict[str, Rates]) -> Figure:
        why = self._absent.get(ratio.over) or self._absent.get(ratio.under)
        if why:
            return Figure(name, None, goal=ratio.goal, detail={"why": why})
        detail = {
            "same_tokens": round(self._agreement(ratio.over, ratio.under), 4),
            **{key: value for key, value in self._told.items() if key.startswith((ratio.over, ratio.under))},
        }
        return paired.ratio(name, rates, ratio.over, ratio.under, goal=ratio.goal, detail=detail)

    def _bandwidth(self, rate: float) -> Figure:
        threads = self._stand.settings.serve.num_threads
        kind = self._stand.engine().weights
        weights, bandwidth = matrix_elements(self._stand.folder) * _BYTES[kind], machine.read_bandwidth(threads)
        detail = {
            "kernel": kind,
            "weight_bytes": weights,
            "read_bytes_per_s": round(bandwidth),
            "tokens_per_s": round(rate, 2),
        }
        return Figure(BANDWIDTH, rate * weights / bandwidth, detail=detail)

    def _prepare(self) -> None:
        stand = self._stand
        ours: dict[str, tuple[Draft, Mode]] = {
            "ours": ("trained", Mode(speculate=False)),
            "speculating": ("trained", Mode()),
            "undrafted": ("random", Mode(speculate=False)),
            "random": ("random", Mode()),
        }
        for name, (draft, mode) in ours.items():
            if name in self._names:
                running = stand.engine(draft)
                stand.warm(running, mode)
                self._arms[name] = self._ours(running, mode)
        if self._names & {"generate", "lookup"}:
            generate, rates = Generate.fastest(
                stand.folder, stand.prompts[0], device_of(stand.settings.serve.device, "serve.device")
            )
            self._told["generate_dtype"] = generate.dtype
            self._told["generate_tried"] = {dtype: round(rate, 2) for dtype, rate in rates.items()}
            for name, lookup in (("generate", False), ("lookup", True)):
                if name in self._names:
                    self._arms[name] = _generating(generate, lookup=lookup)
        if "llama.cpp" in self._names:
            try:
                llama = LlamaCpp(
                    stand.folder, _cache(stand), stand.settings.serve.num_threads, prompted.end_tokens(stand.folder)
                )
            except PeerAbsentError as error:
                self._absent["llama.cpp"] = str(error)
            else:
                self._told["llama.cpp_version"] = llama.version
                self._arms["llama.cpp"] = llama.answer
                llama.answer(stand.prompts[0], 4)

    def _trial(self, name: str) -> Callable[[int], int]:
        def run(trial: int) -> int:
            stand = self._stand
            (prompt,) = stand.of_trial(trial, 1)
            answer = self._arms[name](prompt, stand.plan.tokens)
            self._answers.setdefault(name, []).append(answer)
            return len(answer)

        return run

    def _ours(self, engine: BuiltinEngine, mode: Mode) -> Arm:
        def answer(prompt: tuple[int, ...], _max_tokens: int) -> tuple[int, ...]:
            run = drive(engine, [self._stand.request(prompt, mode)], at_once=1)
            return tuple(run.answers[0].tokens)

        return answer

    def _agreement(self, one: str, other: str) -> float:
        """Share of the tokens up to which both arms said the same; rounding parts them at a near tie."""
        pairs = list(zip(self._answers[one], self._answers[other], strict=True))
        return sum(_common(a, b) for a, b in pairs) / max(sum(min(len(a), len(b)) for a, b in pairs), 1)


def matrix_elements(folder: Path) -> int:
    """Weights of the matrices that a decoding step multiplies with.

    Embeddings are looked up, not multiplied with, unless they are also the output layer.
    """
    matrices: dict[str, int] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                if len(shape := file.get_slice(name).get_shape()) == 2:
                    matrices[name] = shape[0] * shape[1]
    untied = "lm_head.weight" in matrices
    return sum(size for name, size in matrices.items() if not (untied and "embed_tokens" in name))


def _generating(generate: Generate, *, lookup: bool) -> Arm:
    def answer(prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        return generate.answer(prompt, max_tokens, lookup=lookup)

    return answer


def _cache(stand: Stand) -> Path:
    return Path(stand.settings.stack.data_dir) / "bench" / "gguf"


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same
