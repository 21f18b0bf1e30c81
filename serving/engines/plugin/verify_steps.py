"""Trace records of a server's steps, built from arrays on the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from schemas.trace.record import ROOT, U16, DraftSource, VerifyStep
from serving.engines.base import Finish

Ints = npt.NDArray[np.int32]
UNKNOWN = float("nan")


@dataclass(frozen=True, slots=True)
class OutputLimit:
    """What ends a request, for a server that does not report the end to its plugin."""

    total: int
    """Maximum number of tokens of prompt and answer together."""
    stop_ids: frozenset[int]


class ActiveSpeculator(NamedTuple):
    """The version that the server drafts with."""

    version: str
    since_us: int
    """Unix time in microseconds of its first recorded step."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Time of a step, and the duration of its parts."""

    draft_us: int
    verify_us: int
    time_us: int


@dataclass(frozen=True, slots=True, eq=False)
class VerifyOutput:
    """One request in a verify step. n: nodes, 0 is the root; d: longest path."""

    position: int
    """Of the root in the request."""
    draft_tokens: Ints
    """[n] tokens of the nodes."""
    first_child: Ints
    """[n] node; -1 without one."""
    next_sibling: Ints
    """[n] node; -1 without one."""
    accepted: Sequence[int]
    """Nodes of the accepted path, the root first."""
    chosen: Ints
    """[n] the target's choice at each accepted node."""
    features: U16
    """[d, F] hidden states at the accepted nodes, from the first row on; [0, F] if they are not published."""
    top_ids: Ints
    """[n, k]."""
    top_logprobs: npt.NDArray[np.float32]
    """[n, k]."""


@dataclass(frozen=True, slots=True, eq=False)
class PrefillOutput:
    """One request in a prefill: a part of its prompt."""

    position: int
    """Of the part's first token."""
    tokens: Sequence[int]
    features: U16
    """[n, F], or [0, F] if they are not published."""
    chosen: int | None
    """First token of the answer, at the prompt's end; None before it."""
    top_ids: Ints
    """[k] after the last token."""
    top_logprobs: npt.NDArray[np.float32]
    """[k]."""


def build_verify_step(
    output: VerifyOutput,
    number: int,
    speculator: ActiveSpeculator,
    times: StepTimes,
    sources: Sequence[int] | None = None,
) -> VerifyStep:
    """Return the trace record of a verify step.

    Nodes without a link to them are left out: rows of a batch may be padded, and with equal probabilities SGLang may
    keep a node without its parent, and never reads it.

    Args:
        output: The request in the step.
        number: Of the verify step.
        speculator: Version that drafted.
        times: Of the step.
        sources: ``DraftSource`` of the nodes of a chain; None if the speculator proposed all. Nodes behind these fill a
            row and are left out. If they were accepted none the less, no version shall count them: they have the source
            of the suffix drafter, whose chain they follow.

    Raises:
        ValueError: the links form no tree, or the accepted path does not follow them.
    """
    parents = _parents(output.first_child.tolist(), output.next_sibling.tolist())
    path = list(output.accepted)
    if sources is not None:
        parents = {node: parent for node, parent in parents.items() if node <= max(len(sources), len(path) - 1)}
        sources = (*sources, *(DraftSource.SUFFIX for _ in parents))[: len(parents)]
    kept = sorted(parents)
    place = {0: ROOT, **{node: i for i, node in enumerate(kept)}}
    if path[:1] != [0] or any(parents.get(b) != a for a, b in pairwise(path)):
        raise ValueError(f"accepted nodes {path} are no path in {parents}")
    rows = [0, *kept]
    is_named = not sources or any(source & DraftSource.SPECULATOR for source in sources)
    is_mixed = sources is not None and any(source != DraftSource.SPECULATOR for source in sources)
    return VerifyStep(
        verify_step=number,
        position=output.position,
        tokens=tuple(output.draft_tokens[path].tolist()),
        features=output.features[: len(path)],
        draft_tokens=tuple(output.draft_tokens[kept].tolist()),
        draft_parents=tuple(place[parents[node]] for node in kept),
        # The servers discard them, or have none: each token of a chain is the draft's likeliest.
        draft_logprobs=(UNKNOWN,) * len(kept),
        accepted=tuple(place[node] for node in path[1:]),
        bonus=int(output.chosen[path[-1]]),
        top_ids=output.top_ids[rows],
        top_logprobs=output.top_logprobs[rows],
        speculator=speculator.version if is_named else "",
        active_since_us=speculator.since_us if is_named else None,
        draft_us=times.draft_us if kept else 0,
        verify_us=times.verify_us,
        time_us=times.time_us,
        draft_sources=tuple(map(int, sources)) if sources and is_mixed else None,
    )


def build_prefill(output: PrefillOutput, times: StepTimes) -> VerifyStep:
    """Return the trace record of a part of a prompt."""
    rows = 0 if output.chosen is None else 1
    return VerifyStep(
        verify_step=0,
        position=output.position,
        tokens=tuple(output.tokens),
        features=output.features,
        draft_tokens=(),
        draft_parents=(),
        draft_logprobs=(),
        accepted=(),
        bonus=output.chosen,
        top_ids=output.top_ids[None][:rows],
        top_logprobs=output.top_logprobs[None][:rows],
        speculator="",
        draft_us=0,
        verify_us=times.verify_us,
        time_us=times.time_us,
    )


def new_tokens(step: VerifyStep) -> tuple[int, ...]:
    """Return the tokens of the answer that a verify step adds."""
    if step.bonus is None:
        return ()
    return (*(step.tokens[1:] if step.verify_step else ()), step.bonus)


def find_end(step: VerifyStep, limit: OutputLimit) -> tuple[int, Finish] | None:
    """Return the number of tokens with which a request ends in a verify step, and why; None if it continues."""
    added = new_tokens(step)
    before = step.position + len(step.tokens) + 1 - len(added)
    for total, token in enumerate(added, start=before + 1):
        if token in limit.stop_ids:
            return total, "stop"
        if total >= limit.total:
            return total, "length"
    return None


def cut_at_end(verify_steps: Iterable[VerifyStep], total: int) -> tuple[VerifyStep, ...]:
    """Cut verify steps at the end of the request: its last token becomes the bonus token of the last step.

    Args:
        verify_steps: In their order.
        total: Tokens of prompt and answer together.
    """
    found = []
    for step in verify_steps:
        room = total - 1 - step.position
        if room <= 0:
            break
        if step.bonus is None or len(step.tokens) <= room:
            found.append(step)
        else:
            found.append(_shorten(step, room) if step.verify_step else _drop_bonus(step))
    return tuple(found)


def _shorten(step: VerifyStep, room: int) -> VerifyStep:
    """Return the verify step with ``room`` tokens; the first removed token becomes its bonus token."""
    features = step.features[:room] if len(step.features) else step.features
    return replace(
        step, tokens=step.tokens[:room], bonus=step.tokens[room], accepted=step.accepted[: room - 1], features=features
    )


def _drop_bonus(step: VerifyStep) -> VerifyStep:
    """Return the end of a prompt whose request ended with it."""
    return replace(step, bonus=None, top_ids=step.top_ids[:0], top_logprobs=step.top_logprobs[:0])


def _parents(first_child: Sequence[int], next_sibling: Sequence[int]) -> dict[int, int]:
    """Return the parent of every linked node."""
    parents: dict[int, int] = {}
    for node, child in enumerate(first_child):
        while child >= 0:
            if child in parents or child <= node:
                raise ValueError(f"node {child} cannot follow node {node}: {first_child}, {next_sibling}")
            parents[child] = node
            child = next_sibling[child]  # noqa: PLW2901 - a walk along the siblings
    # A node below an unlinked one is not part of the tree.
    for node in sorted(parents):
        if parents[node] not in parents and parents[node] != 0:
            del parents[node]
    return parents
