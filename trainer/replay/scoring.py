"""The acceptance of versions on the requests of the past: each request once, by every version in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor

from schemas.errors import UserError
from trainer.replay import acceptance_figures
from trainer.replay.acceptance_figures import Figures, Interval
from trainer.replay.chains import chances, likelihood
from trainer.replay.drafts import Named
from trainer.replay.past_requests import Past
from trainer.replay.stream import UNLABELLED
from trainer.replay.verify_steps import VerifySteps, run

ALL, GREEDY, SAMPLED = "all", "greedy", "sampled"


@dataclass(frozen=True, slots=True)
class Scored:
    """A request, and the verify steps that each version would have run for it, in the order of the versions."""

    request: str
    label: str | None
    greedy: bool
    verify_steps: tuple[VerifySteps, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Every version over every request."""

    versions: tuple[Named, ...]
    longest: int
    """Tokens that a verify step drafts at most."""
    tables: Mapping[str, int]
    """The states that were read."""
    scored: tuple[Scored, ...]
    counts: Mapping[str, int]
    """Requests by what became of them, and tokens of sampled answers that were not among the target's recorded ones."""

    @property
    def groups(self) -> dict[str, list[Scored]]:
        """Requests together, by how they were answered where both kinds are there, and by their labels."""
        found = {ALL: list(self.scored)}
        kinds = {GREEDY: [s for s in self.scored if s.greedy], SAMPLED: [s for s in self.scored if not s.greedy]}
        if all(kinds.values()):
            found |= kinds
        labels = sorted({s.label or UNLABELLED for s in self.scored})
        if labels != [UNLABELLED]:
            found |= {f"label {name}": [s for s in self.scored if (s.label or UNLABELLED) == name] for name in labels}
        return found

    def figures(self, version: int, group: str) -> Figures:
        """Of a version by its place, over a group."""
        return acceptance_figures.of([scored.verify_steps[version] for scored in self.groups[group]])

    def differences(self, group: str) -> dict[tuple[int, int], Interval]:
        """By how much each version is above each one before it, request by request."""
        pairs = combinations(range(len(self.versions)), 2)
        of_group = self.groups[group]
        return {
            (later, earlier): acceptance_figures.difference(
                [s.verify_steps[later] for s in of_group], [s.verify_steps[earlier] for s in of_group]
            )
            for earlier, later in pairs
        }

    def summary(self, *, requests: bool = False) -> dict[str, Any]:
        """As JSON; with every request where asked."""
        told: dict[str, Any] = {
            "versions": [{"name": named.name, "version": named.version} for named in self.versions],
            "lookahead": self.longest,
            "tables": dict(self.tables),
            "counts": dict(sorted(self.counts.items())),
            "groups": {group: self._group(group) for group in self.groups},
        }
        if requests:
            told["requests"] = [_request(scored) for scored in self.scored]
        return told

    def _group(self, group: str) -> dict[str, Any]:
        names = [named.name for named in self.versions]
        return {
            "versions": [{"name": name, **self.figures(i, group).summary()} for i, name in enumerate(names)],
            "differences": [
                {"name": names[later], "against": names[earlier], **found.summary(), "clear": found.is_clear}
                for (later, earlier), found in self.differences(group).items()
            ],
        }


def score(
    versions: Sequence[Named],
    embeddings_VH: Tensor,
    past: Iterable[Past],
    longest: int,
    tables: Mapping[str, int],
    counts: Counter[str],
    done: Callable[[int], None] = lambda _: None,
) -> Score:
    """Score every request by every version.

    Args:
        versions: The drafts.
        embeddings_VH: The target's.
        past: The requests.
        longest: K: tokens that a verify step drafts at most.
        tables: The states that they come from, for the record.
        counts: What became of the requests; read when the last one is scored.
        done: Told after each request how many are done.

    Raises:
        UserError: no request, or one whose features are of another width than the drafts'.
    """
    scored = []
    for one in past:
        scored.append(_scored(versions, embeddings_VH, one, longest))
        if not one.sampling.greedy:
            counts["tokens_outside_top_k"] += likelihood(one).outside
            counts["tokens_sampled"] += len(one.tokens_N) - one.prompt
        done(len(scored))
    if not scored:
        left = counts["incomplete"]
        raise UserError(
            f"no request to score ({left} left out: a chunk of each is missing)"
            if left
            else "no request to score: none of this target in that span; see `aurora traces stats`"
        )
    return Score(tuple(versions), longest, tables, tuple(scored), counts)


def _scored(versions: Sequence[Named], embeddings_VH: Tensor, one: Past, longest: int) -> Scored:
    width = one.features_NF.shape[1]
    for named in versions:
        if named.draft.shape.feature_width != width:
            raise UserError(f"{named}: takes {named.draft.shape.feature_width} values a token; recorded were {width}")
    verify_steps = tuple(run(chances(named.draft, embeddings_VH, one, longest)) for named in versions)
    return Scored(one.request, one.label, one.sampling.greedy, verify_steps)


def _request(scored: Scored) -> dict[str, Any]:
    return {
        "request": scored.request,
        "label": scored.label,
        "greedy": scored.greedy,
        "verify_steps": [round(r.verify_steps, 6) for r in scored.verify_steps],
        "accepted": [round(r.accepted, 6) for r in scored.verify_steps],
    }
