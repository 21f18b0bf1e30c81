"""From the numbers of a step to our trace record; nothing here knows SGLang."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from schemas.trace.record import ROOT, U16, VerifyStep

Numbers = npt.NDArray[np.int32]
UNKNOWN = float("nan")


@dataclass(frozen=True, slots=True)
class Times:
    """When a step was, and how long its parts took."""

    draft_us: int
    verify_us: int
    time_us: int


@dataclass(frozen=True, slots=True, eq=False)
class Verified:
    """What one request got from a verify step. n: nodes, 0 is the root; d: longest path."""

    position: int
    """Of the root in the request."""
    drafted: Numbers
    """[n] tokens."""
    first_child: Numbers
    """[n] node; -1 where there is none."""
    next_sibling: Numbers
    """[n] node; -1 where there is none."""
    accepted: Sequence[int]
    """Nodes of the accepted path, the root first."""
    said: Numbers
    """[n] what the target chose at each accepted node."""
    features: U16
    """[d, F] states at the accepted nodes, from the first row on; [0, F] where they do not travel."""
    top_ids: Numbers
    """[n, k]."""
    top_logprobs: npt.NDArray[np.float32]
    """[n, k]."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A piece of a prompt that was read."""

    position: int
    """Of its first token."""
    tokens: Sequence[int]
    features: U16
    """[n, F], or [0, F] where they do not travel."""
    chosen: int | None
    """First token of the answer, at the prompt's end; None before it."""
    top_ids: Numbers
    """[k] after the last token."""
    top_logprobs: npt.NDArray[np.float32]
    """[k]."""


def verify_step(found: Verified, number: int, speculator: str, times: Times) -> VerifyStep:
    """The trace record of a verify step.

    Nodes that no link leads to are left out: where probabilities are equal SGLang may keep a node without its parent,
    and never looks at it.

    Raises:
        ValueError: links that make no tree, or a path that does not follow them.
    """
    parents = _parents(found.first_child.tolist(), found.next_sibling.tolist())
    kept = sorted(parents)
    place = {0: ROOT, **{node: i for i, node in enumerate(kept)}}
    path = list(found.accepted)
    if path[:1] != [0] or any(parents.get(b) != a for a, b in pairwise(path)):
        raise ValueError(f"accepted nodes {path} are no path in {parents}")
    rows = [0, *kept]
    return VerifyStep(
        verify_step=number,
        position=found.position,
        tokens=tuple(found.drafted[path].tolist()),
        features=found.features[: len(path)],
        draft_tokens=tuple(found.drafted[kept].tolist()),
        draft_parents=tuple(place[parents[node]] for node in kept),
        # SGLang throws them away, or never has them: a chain's tokens are each the draft's likeliest.
        draft_logprobs=(UNKNOWN,) * len(kept),
        accepted=tuple(place[node] for node in path[1:]),
        bonus=int(found.said[path[-1]]),
        top_ids=found.top_ids[rows],
        top_logprobs=found.top_logprobs[rows],
        speculator=speculator if kept else "",
        draft_us=times.draft_us if kept else 0,
        verify_us=times.verify_us,
        time_us=times.time_us,
    )


def prompt_verify_step(found: Read, times: Times) -> VerifyStep:
    """The trace record of a piece of a prompt."""
    known = 0 if found.chosen is None else 1
    return VerifyStep(
        verify_step=0,
        position=found.position,
        tokens=tuple(found.tokens),
        features=found.features,
        draft_tokens=(),
        draft_parents=(),
        draft_logprobs=(),
        accepted=(),
        bonus=found.chosen,
        top_ids=found.top_ids[None][:known],
        top_logprobs=found.top_logprobs[None][:known],
        speculator="",
        draft_us=0,
        verify_us=times.verify_us,
        time_us=times.time_us,
    )


def within(verify_steps: Iterable[VerifyStep], total: int) -> tuple[VerifyStep, ...]:
    """Verify steps as far as the request goes: its last token is then the bonus of the last verify step.

    Args:
        verify steps: In their order.
        total: Tokens of prompt and answer together.
    """
    found = []
    for r in verify_steps:
        room = total - 1 - r.position
        if room <= 0:
            break
        if r.bonus is None or len(r.tokens) <= room:
            found.append(r)
        else:
            found.append(_shortened(r, room) if r.verify_step else _unanswered(r))
    return tuple(found)


def _shortened(r: VerifyStep, room: int) -> VerifyStep:
    """The verify step with fewer tokens; the first of those that it loses is its bonus then."""
    features = r.features[:room] if len(r.features) else r.features
    return replace(r, tokens=r.tokens[:room], bonus=r.tokens[room], accepted=r.accepted[: room - 1], features=features)


def _unanswered(r: VerifyStep) -> VerifyStep:
    """The end of a prompt whose request ended with it."""
    return replace(r, bonus=None, top_ids=r.top_ids[:0], top_logprobs=r.top_logprobs[:0])


def _parents(first_child: Sequence[int], next_sibling: Sequence[int]) -> dict[int, int]:
    """The parent of every node that a link leads to."""
    parents: dict[int, int] = {}
    for node, child in enumerate(first_child):
        while child >= 0:
            if child in parents or child <= node:
                raise ValueError(f"node {child} cannot follow node {node}: {first_child}, {next_sibling}")
            parents[child] = node
            child = next_sibling[child]  # noqa: PLW2901 - a walk along the siblings
    # What hangs on a node that is no part of the tree is none either.
    for node in sorted(parents):
        if parents[node] not in parents and parents[node] != 0:
            del parents[node]
    return parents
