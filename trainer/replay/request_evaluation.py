"""Evaluate the acceptance of versions on past requests: every version on every request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor

from schemas.errors import UserError
from trainer.data.samples import UNLABELLED
from trainer.replay.acceptance_figures import AcceptanceFigures, Interval, compare_steps, compute_figures
from trainer.replay.chains import acceptance_probabilities, target_likelihood
from trainer.replay.named_drafts import NamedDraft
from trainer.replay.past_requests import PastRequest
from trainer.replay.verify_steps import ExpectedSteps, expect_steps

ALL, GREEDY, SAMPLED = "all", "greedy", "sampled"


@dataclass(frozen=True, slots=True)
class EvaluatedRequest:
    """A request, and the verify steps that each version would have run for it, in the order of the versions."""

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
    """Every version on every request."""

    versions: tuple[NamedDraft, ...]
    lookahead: int
    """Maximum number of draft tokens in a verify step."""
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

    def figures(self, version: int, group: str) -> AcceptanceFigures:
        """Return the figures of a version, by its index, over a group."""
        return compute_figures([request.steps[version] for request in self.groups[group]])

    def differences(self, group: str) -> dict[tuple[int, int], Interval]:
        """Return the paired difference of each version to each one before it."""
        requests = self.groups[group]
        return {
            (later, earlier): compare_steps([r.steps[later] for r in requests], [r.steps[earlier] for r in requests])
            for earlier, later in combinations(range(len(self.versions)), 2)
        }

    def summary(self, *, requests: bool = False) -> dict[str, Any]:
        """Return the evaluation as JSON.

        Args:
            requests: Include every request.
        """
        summary: dict[str, Any] = {
            "versions": [{"name": named.name, "version": named.version} for named in self.versions],
            "lookahead": self.lookahead,
            "tables": dict(self.tables),
            "counts": dict(sorted(self.counts.items())),
            "groups": {group: self._summarize_group(group) for group in self.groups},
        }
        if requests:
            summary["requests"] = [request.summary() for request in self.requests]
        return summary

    def _summarize_group(self, group: str) -> dict[str, Any]:
        names = [named.name for named in self.versions]
        return {
            "versions": [{"name": name, **self.figures(i, group).summary()} for i, name in enumerate(names)],
            "differences": [
                {"name": names[later], "against": names[earlier], **found.summary(), "clear": found.is_clear}
                for (later, earlier), found in self.differences(group).items()
            ],
        }


def evaluate(
    versions: Sequence[NamedDraft],
    embeddings_VH: Tensor,
    past: Iterable[PastRequest],
    lookahead: int,
    tables: Mapping[str, int],
    counts: Counter[str],
    report_progress: Callable[[int], None] = lambda _: None,
) -> RequestEvaluation:
    """Evaluate every version on every request.

    Args:
        versions: The drafts.
        embeddings_VH: The target's token embeddings. V target vocabulary, H hidden size.
        past: The requests.
        lookahead: Maximum number of draft tokens in a verify step.
        tables: Version of each table that was read, for the record.
        counts: Requests by outcome; read when the last one is evaluated.
        report_progress: Called after each request with the number of evaluated ones.

    Raises:
        UserError: no request, or one whose feature width differs from a draft's.
    """
    requests = []
    for one in past:
        requests.append(_evaluate_request(versions, embeddings_VH, one, lookahead))
        if not one.sampling.greedy:
            counts["tokens_outside_top_k"] += target_likelihood(one).outside
            counts["tokens_sampled"] += len(one.tokens_N) - one.prompt
        report_progress(len(requests))
    if not requests:
        incomplete = counts["incomplete"]
        raise UserError(
            f"no request to evaluate ({incomplete} skipped: each lacks a chunk)"
            if incomplete
            else "no request to evaluate: none of this target in that span; see `aurora traces stats`"
        )
    return RequestEvaluation(tuple(versions), lookahead, tables, tuple(requests), counts)


def _evaluate_request(
    versions: Sequence[NamedDraft], embeddings_VH: Tensor, one: PastRequest, lookahead: int
) -> EvaluatedRequest:
    width = one.features_NF.shape[1]
    for named in versions:
        if named.draft.shape.feature_width != width:
            raise UserError(
                f"{named}: feature width is {named.draft.shape.feature_width}, recorded were {width} values"
            )
    probabilities = (acceptance_probabilities(named.draft, embeddings_VH, one, lookahead) for named in versions)
    return EvaluatedRequest(one.request, one.label, one.sampling.greedy, tuple(map(expect_steps, probabilities)))
