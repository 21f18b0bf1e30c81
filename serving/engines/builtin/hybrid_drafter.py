"""Drafts one tree per sequence from the suffix drafter and the speculator, as the planner finds them worth their time.

One verify step: the suffix drafter proposes a tree for every sequence, the planner decides for which of them the
speculator drafts as well, the two proposals of a sequence are merged, and the planner selects the draft tokens of all
sequences that the target verifies. After the forward, both proposals are compared with the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from schemas.trace.record import ROOT
from serving.engines.builtin.drafter import EMPTY_TREE, DraftTree, merge_trees
from serving.engines.builtin.eagle_drafter import EagleDrafter
from serving.engines.builtin.sequence import Sequence
from serving.engines.builtin.suffix_drafter import SuffixDrafter
from serving.planner.acceptance_model import DraftOutcome, SpeculatorOutcome
from serving.planner.latency_model import ForwardTiming
from serving.planner.planner import DraftBudget, DraftPlan, Planner, SequenceOutlook


@dataclass(slots=True)
class _Proposal:
    """What the drafters propose for one sequence, verified or not."""

    sequence: Sequence
    outlook: SequenceOutlook
    suffix: DraftTree
    speculator: DraftTree = EMPTY_TREE
    speculator_depth: int = 0
    """Depth to which the speculator could draft."""


@dataclass(frozen=True, slots=True)
class Drafts:
    """The drafts of one verify step."""

    trees: dict[int, DraftTree]
    """Tree to verify by slot."""
    timings: tuple[ForwardTiming, ...]
    """Duration of each draft step of the speculator."""
    plan: DraftPlan
    proposals: tuple[_Proposal, ...]


NO_DRAFTS = Drafts({}, (), DraftPlan((), DraftBudget(0)), ())


class HybridDrafter:
    """Drafts with a suffix drafter, a speculator, or both.

    Args:
        planner: Decides how much to draft and with which drafter.
        speculator: The EAGLE drafter, if any.
        suffix: The suffix drafter, if any.
        max_suffix_depth: Maximum depth of a suffix draft.
        max_nodes: Maximum number of draft tokens per sequence.
    """

    def __init__(
        self,
        planner: Planner,
        speculator: EagleDrafter | None,
        suffix: SuffixDrafter | None,
        *,
        max_suffix_depth: int,
        max_nodes: int,
    ) -> None:
        self._planner, self.speculator, self._suffix = planner, speculator, suffix
        self._max_suffix_depth, self._max_nodes = max_suffix_depth, max_nodes

    def draft(self, sequences: Seq[Sequence], decoding: int) -> Drafts:
        """Draft one tree per sequence.

        Args:
            sequences: Sequences past their prefill with room for two output tokens or more.
            decoding: Number of sequences past their prefill.
        """
        proposals = self._propose_suffixes(sequences, decoding)
        timings: list[ForwardTiming] = []
        plan = NO_DRAFTS.plan
        if self.speculator is not None:
            plan = self._planner.plan(decoding, [proposal.outlook for proposal in proposals])
            drafting = [proposals[i] for i in plan.drafting]
            for i, rows in plan.catch_up.items():
                if i not in plan.drafting:
                    self.speculator.read(proposals[i].sequence, rows)
            if drafting:
                drafted = [proposal.sequence for proposal in drafting]
                trees, timings = self.speculator.draft(drafted, plan.budget, self._planner.speculator)
                for proposal, tree in zip(drafting, trees, strict=True):
                    proposal.speculator = tree
                    proposal.speculator_depth = min(plan.budget.depth, proposal.sequence.room - 1)
        merged = [self._constrain(p.sequence, merge_trees(p.speculator, p.suffix)) for p in proposals]
        selected = self._select(merged, decoding)
        trees_by_slot = {p.sequence.slot: tree for p, tree in zip(proposals, selected, strict=True) if tree.nodes}
        return Drafts(trees_by_slot, tuple(timings), plan, tuple(proposals))

    def observe(
        self, drafts: Drafts, outputs: dict[int, list[int]], verify: ForwardTiming | None, draft_seconds: float = 0.0
    ) -> None:
        """Learn from a verify step.

        Args:
            drafts: The drafts of the verify step.
            outputs: Accepted tokens and bonus token by slot.
            verify: Duration of the target's forward; None if it read prompts.
            draft_seconds: Time for which the step drafted.
        """
        outcomes: list[DraftOutcome] = []
        reached: list[SpeculatorOutcome] = []
        for proposal in drafts.proposals:
            output, greedy = outputs[proposal.sequence.slot], proposal.outlook.greedy
            outcomes += list_outcomes(proposal.suffix, output, greedy=greedy)
            outcomes += list_outcomes(proposal.speculator, output, greedy=greedy)
            if proposal.speculator_depth:
                reached.append(
                    SpeculatorOutcome(
                        greedy,
                        proposal.outlook.confidence,
                        len(proposal.suffix.follow(output)),
                        len(proposal.speculator.follow(output)),
                        proposal.speculator_depth,
                    )
                )
        self._planner.observe_drafts(outcomes, reached)
        if verify is not None:
            tokens = sum(map(len, outputs.values()))
            self._planner.observe_latency(drafts.plan, tokens, verify, drafts.timings)
            self._planner.speedup.add(tokens, verify, draft_seconds)

    def finish(self, seq: Sequence) -> None:
        """Learn from a sequence whose output is complete."""
        if self._suffix is not None:
            self._suffix.finish(seq)

    def _propose_suffixes(self, sequences: Seq[Sequence], decoding: int) -> list[_Proposal]:
        min_chance = self._planner.limit_suffix_drafts(decoding)
        proposals = []
        for seq in sequences:
            tree = EMPTY_TREE
            if self._suffix is not None:
                tree = self._suffix.draft(
                    seq,
                    self._planner.suffix[seq.is_greedy],
                    depth=self._max_suffix_depth,
                    max_nodes=self._max_nodes,
                    min_chance=min_chance,
                )
            # A verify step commits the root and at most a path of so many nodes.
            catch_up = max(seq.num_cached_tokens - seq.num_draft_seen_tokens - self._max_nodes - 1, 0)
            outlook = SequenceOutlook(seq.is_greedy, [node.chance for node in tree.nodes], catch_up)
            proposals.append(_Proposal(seq, outlook, tree))
        return proposals

    def _constrain(self, seq: Sequence, tree: DraftTree) -> DraftTree:
        """Return the tree as far as the sequence's grammar allows it, with the tokens that the grammar forces."""
        if seq.grammar is None:
            return tree
        with seq.contain():
            return seq.grammar.constrain(tree, seq.output, min(self._max_nodes, seq.room - 1))
        return EMPTY_TREE

    def _select(self, trees: Seq[DraftTree], decoding: int) -> list[DraftTree]:
        """Keep the likeliest nodes of all trees, as far as the target verifies them."""
        ranked = sorted(
            (-node.chance, node.depth, tree_index, i)
            for tree_index, tree in enumerate(trees)
            for i, node in enumerate(tree.nodes)
        )
        kept: list[list[int]] = [[] for _ in trees]
        count = self._planner.select(decoding, [-rank[0] for rank in ranked])
        for _, _, tree_index, i in ranked[:count]:
            if len(kept[tree_index]) < self._max_nodes:
                kept[tree_index].append(i)
        return [tree.keep(sorted(nodes)) for tree, nodes in zip(trees, kept, strict=True)]


def list_outcomes(tree: DraftTree, output: Seq[int], *, greedy: bool) -> Iterator[DraftOutcome]:
    """Yield the outcome of the tokens that a drafter proposed after the root and after each accepted token.

    The output decides also about tokens that were not verified: it is the same whatever was drafted.

    Args:
        tree: Proposal of one drafter.
        output: Accepted tokens and bonus token.
        greedy: Whether the sequence decodes greedily.
    """
    path = tree.follow(output)
    for depth, parent in enumerate((ROOT, *path)):
        siblings = [i for i, node in enumerate(tree.nodes) if node.parent == parent]
        if siblings and depth < len(output):
            features = tuple((tree.nodes[i].confidence, tree.nodes[i].match_length) for i in siblings)
            accepted = siblings.index(path[depth]) if depth < len(path) else None
            yield DraftOutcome(tree.nodes[siblings[0]].source, greedy, features, accepted)
