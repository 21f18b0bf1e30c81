"""Evaluate the acceptance of drafters on past requests: every drafter on every request.

The suffix drafter's tokens are not sampled, so it is exact for sampled requests too: its draft token is accepted if and
only if it is the generated one. The hybrid drafter verifies the drafts of a version and of the suffix drafter as one
tree; where both continue with different tokens, the version's is tried first, as in
``serving.engines.builtin.drafter.merge_trees``. So a token of the hybrid draft is accepted at a depth if the suffix
draft is accepted to that depth, and with the version's own probability otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from schemas.errors import UserError
from trainer.data.samples import UNLABELLED
from trainer.objective.simulated_acceptance import F64
from trainer.replay.acceptance_figures import AcceptanceFigures, Interval, compare_steps, compute_figures
from trainer.replay.chains import acceptance_probabilities
from trainer.replay.named_drafts import NamedDraft
from trainer.replay.past_requests import PastRequest
from trainer.replay.verify_steps import ExpectedSteps, expect_steps

ALL, GREEDY, SAMPLED = "all", "greedy", "sampled"

DrafterKind = Literal["eagle", "suffix", "hybrid"]


@dataclass(frozen=True, slots=True)
class ReplayedDrafter:
    """A drafter, and the version that it drafts with."""

    kind: DrafterKind
    version: NamedDraft | None
    """None for the suffix drafter."""

    @property
    def name(self) -> str:
        """Name in JSON, unique among the drafters of an evaluation."""
        return self._describe(self.version.name if self.version else "")

    @property
    def short(self) -> str:
        """Name for a narrow column."""
        return self._describe(self.version.short if self.version else "")

    def __str__(self) -> str:
        return self._describe(str(self.version))

    def _describe(self, version: str) -> str:
        return {"eagle": version, "suffix": "suffix", "hybrid": f"{version}+suffix"}[self.kind]


def list_drafters(kinds: Sequence[str], versions: Sequence[NamedDraft]) -> list[ReplayedDrafter]:
    """Return the drafters of the given kinds, those with a version once for each version.

    Raises:
        UserError: an unknown kind, versions that no kind uses, or a kind that needs some.
    """
    drafters: list[ReplayedDrafter] = []
    for kind in kinds:
        match kind:
            case "suffix":
                drafters.append(ReplayedDrafter(kind, None))
            case "eagle" | "hybrid":
                drafters += [ReplayedDrafter(kind, version) for version in versions]
            case _:
                raise UserError(f"--drafter: {kind!r} is none of eagle, suffix and hybrid")
    if (set(kinds) != {"suffix"}) != bool(versions):
        raise UserError("--versions: eagle and hybrid draft with at least one version, suffix alone with none")
    return drafters


class SuffixReplay(Protocol):
    """The suffix drafter of a node, which is given past requests in the order of their beginning."""

    limits: Mapping[str, str | int]
    """What bounds its drafts, for the record."""

    def accept(self, past: PastRequest) -> F64:
        """Return [R, K]: 1 where the suffix draft from a root is accepted to a depth, 0 where it is not."""


@dataclass(frozen=True, slots=True)
class EvaluatedRequest:
    """A request, and the verify steps that each drafter would have run for it, in the order of the drafters."""

    request: str
    label: str | None
    greedy: bool
    steps: tuple[ExpectedSteps, ...]

    def summary(self) -> dict[str, Any]:
        """Return the request as JSON."""
        return {
            "request": self.request,
            "label": self.label,
            "greedy": self.greedy,
            "verify_steps": [round(s.verify_steps, 6) for s in self.steps],
            "accepted": [round(s.accepted, 6) for s in self.steps],
        }


@dataclass(frozen=True, slots=True)
class RequestEvaluation:
    """Every drafter on every request."""

    drafters: tuple[ReplayedDrafter, ...]
    lookahead: int
    """Draft tokens of a version in a verify step."""
    suffix_limits: Mapping[str, str | int]
    """What bounded suffix drafts; empty without them."""
    tables: Mapping[str, int]
    """Version of each table that was read."""
    requests: tuple[EvaluatedRequest, ...]
    counts: Mapping[str, int]
    """Requests by outcome, and tokens of sampled answers that were not among the target's recorded ones."""

    @property
    def groups(self) -> dict[str, list[EvaluatedRequest]]:
        """All requests, greedy and sampled ones where both exist, and the requests of each label."""
        found = {ALL: list(self.requests)}
        kinds = {GREEDY: [r for r in self.requests if r.greedy], SAMPLED: [r for r in self.requests if not r.greedy]}
        if all(kinds.values()):
            found |= kinds
        labels = sorted({r.label or UNLABELLED for r in self.requests})
        if labels != [UNLABELLED]:
            found |= {f"label {name}": [r for r in self.requests if (r.label or UNLABELLED) == name] for name in labels}
        return found

    def figures(self, drafter: int, group: str) -> AcceptanceFigures:
        """Return the figures of a drafter, by its index, over a group."""
        return compute_figures([request.steps[drafter] for request in self.groups[group]])

    def differences(self, group: str) -> dict[tuple[int, int], Interval]:
        """Return the paired difference of each drafter to each one before it."""
        requests = self.groups[group]
        return {
            (later, earlier): compare_steps([r.steps[later] for r in requests], [r.steps[earlier] for r in requests])
            for earlier, later in combinations(range(len(self.drafters)), 2)
        }

    def summary(self, *, requests: bool = False) -> dict[str, Any]:
        """Return the evaluation as JSON.

        Args:
            requests: Include every request.
        """
        summary: dict[str, Any] = {
            "versions": [
                {"name": one.name, "drafter": one.kind, "version": one.version.version if one.version else None}
                for one in self.drafters
            ],
            "lookahead": self.lookahead,
            **({"suffix": dict(self.suffix_limits)} if self.suffix_limits else {}),
            "tables": dict(self.tables),
            "counts": dict(sorted(self.counts.items())),
            "groups": {group: self._summarize_group(group) for group in self.groups},
        }
        if requests:
            summary["requests"] = [request.summary() for request in self.requests]
        return summary

    def _summarize_group(self, group: str) -> dict[str, Any]:
        names = [one.name for one in self.drafters]
        return {
            "versions": [{"name": name, **self.figures(i, group).summary()} for i, name in enumerate(names)],
            "differences": [
                {"name": names[later], "against": names[earlier], **found.summary(), "clear": found.is_clear}
                for (later, earlier), found in self.differences(group).items()
            ],
        }


def evaluate(
    drafters: Sequence[ReplayedDrafter],
    embeddings_VH: Tensor,
    past: Iterable[PastRequest],
    lookahead: int,
    tables: Mapping[str, int],
    counts: Counter[str],
    report_progress: Callable[[int], None] = lambda _: None,
    suffix: SuffixReplay | None = None,
) -> RequestEvaluation:
    """Evaluate every drafter on every request.

    Args:
        drafters: The drafters.
        embeddings_VH: The target's token embeddings. V target vocabulary, H hidden size.
        past: The requests, in the order of their beginning.
        lookahead: Draft tokens of a version in a verify step.
        tables: Version of each table that was read, for the record.
        counts: Requests by outcome; read when the last one is evaluated.
        report_progress: Called after each request with the number of evaluated ones.
        suffix: The suffix drafter, if ``drafters`` need it.

    Raises:
        UserError: no request, or one whose feature width differs from a draft's.
    """
    requests = []
    for one in past:
        suffix_RK = None if suffix is None else suffix.accept(one)
        requests.append(_evaluate_request(drafters, embeddings_VH, one, lookahead, suffix_RK))
        if not one.sampling.greedy:
            recorded_R = (one.teacher.ids == one.tokens_N[one.prompt :, None]).any(-1)
            counts["tokens_outside_top_k"] += int((~recorded_R).sum())
            counts["tokens_sampled"] += len(one.tokens_N) - one.prompt
        report_progress(len(requests))
    if not requests:
        incomplete = counts["incomplete"]
        raise UserError(
            f"no request to evaluate ({incomplete} skipped: each lacks a chunk)"
            if incomplete
            else "no request to evaluate: none of this target in that span; see `aurora traces stats`"
        )
    return RequestEvaluation(
        tuple(drafters), lookahead, suffix.limits if suffix else {}, tables, tuple(requests), counts
    )


def _evaluate_request(
    drafters: Sequence[ReplayedDrafter],
    embeddings_VH: Tensor,
    one: PastRequest,
    lookahead: int,
    suffix_RK: F64 | None,
) -> EvaluatedRequest:
    versions = {drafter.version.name: drafter.version for drafter in drafters if drafter.version}
    own = {name: _accept_version(version, embeddings_VH, one, lookahead) for name, version in versions.items()}

    def accept(drafter: ReplayedDrafter) -> F64:
        parts = [own[drafter.version.name]] if drafter.version else []
        if drafter.kind != "eagle" and suffix_RK is not None:
            parts.append(suffix_RK)
        return merge_acceptance(parts)

    steps = tuple(expect_steps(accept(drafter)) for drafter in drafters)
    return EvaluatedRequest(one.request, one.label, one.sampling.greedy, steps)


def _accept_version(version: NamedDraft, embeddings_VH: Tensor, one: PastRequest, lookahead: int) -> F64:
    recorded, width = one.features_NF.shape[1], version.draft.shape.feature_width
    if width != recorded:
        raise UserError(f"{version}: feature width is {width}, recorded were {recorded} values")
    return acceptance_probabilities(version.draft, embeddings_VH, one, lookahead, version.context_tokens)


def merge_acceptance(parts: Sequence[F64]) -> F64:
    """Return [R, K] the acceptance probabilities of one tree with all drafts of ``parts``, given the token before.

    A depth is reached if any of the drafts reaches it. This is exact if all but one of them are accepted with
    certainty or not at all.

    Args:
        parts: [R, K of the part] acceptance probabilities of each draft, given the token before.
    """
    longest = max(part.shape[1] for part in parts)
    reach_RK = np.max([np.pad(part.cumprod(axis=1), ((0, 0), (0, longest - part.shape[1]))) for part in parts], axis=0)
    before_RK = np.pad(reach_RK, ((0, 0), (1, 0)), constant_values=1.0)[:, :-1]
    merged: F64 = np.divide(reach_RK, before_RK, out=np.zeros_like(reach_RK), where=before_RK > 0)
    return merged
