"""``aurora vocabulary``: the tokens that a draft can propose, chosen by how often answers hold them."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ops.cli.terminal import AsJson, Config, Set, hint, opened, say, settings_of, told
from schemas.errors import UserError

if TYPE_CHECKING:
    from pipeline.delta import DeltaLog

Counts = Mapping[int, int]
"""How often each token id was answered."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Share of the answered tokens that are among the ids: all others are misses, whatever the draft learns."""

    tokens: int
    """Answered tokens that were counted."""
    chosen: float
    unseen: float
    """Of one half of the requests by the ids that the other half would choose: what new traffic like it can expect."""
    lowest: float
    """By as many of the lowest ids, the choice of day 0."""


def vocabulary(
    config: Config = None,
    set_: Set = None,
    size: Annotated[
        int | None, typer.Option("--size", min=16, help="So many; else speculator.draft_vocab_size.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file: a new line begins with it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Choose the draft's vocabulary from answered tokens, and write it to speculator.draft_vocab_file."""
    with told():
        settings = settings_of(config, set_)
        path = Path(settings.speculator.draft_vocab_file)
        if not settings.speculator.draft_vocab_file:
            raise UserError(
                "set speculator.draft_vocab_file to the file that is to be written, here and where it is used"
            )
        if path.exists() and not overwrite:
            raise UserError(f"{path} is there and fixes a speculator line; --overwrite begins a new one")
        tables = opened(settings)
        from schemas.speculator.checkpoint import CheckpointError, target_fingerprint

        folder = Path(settings.target.path)
        try:
            target = target_fingerprint(folder)
        except CheckpointError as error:
            raise UserError(str(error)) from error
        halves = count(tables, target)
        total = _read(folder / "config.json")["vocab_size"]
        kept = special_ids(folder, total)
        ids = choose(_sum(halves), kept, size or settings.speculator.draft_vocab_size, total)
        write(path, ids)
        covered = coverage(halves, kept, ids, total)
        if as_json:
            sys.stdout.write(json.dumps({"file": str(path), "ids": len(ids), **asdict(covered)}, indent=2) + "\n")
            return
        say(f"{path}: {len(ids)} of {total} ids, {len(kept)} of them special")
        say(f"covers {covered.chosen:.2%} of {covered.tokens} answered tokens; the lowest ids {covered.lowest:.2%}")
        say(f"chosen on one half of the requests it would cover {covered.unseen:.2%} of the other")
        hint("nodes and trainer begin the new line when they are started with this setting")


def count(tables: DeltaLog, target: str) -> tuple[Counts, Counts]:
    """Answered tokens of a target in the table ``accepted``, whatever line drafted them; by two halves of the requests.

    Prompts are left out: a token counts if the target was asked what comes before it.

    Raises:
        UserError: there are none.
    """
    halves: tuple[dict[int, int], dict[int, int]] = ({}, {})
    # The mask says where the teacher is known, so the token that it teaches stands one further on.
    answers = (
        "select unnest(array_append(tokens, next_token)) as token, "  # noqa: S608 - a hash
        "unnest(array_prepend(false, loss_mask)) as answered, ascii(md5(request)) % 2 as half "
        f"from accepted where target = '{target}'"
    )
    sums = f"select token, half, count(*) as seen from ({answers}) where answered and token is not null group by 1, 2"  # noqa: S608
    for row in tables.query(sums).read_all().to_pylist():
        halves[row["half"]][row["token"]] = row["seen"]
    if not any(halves):
        raise UserError(f"the table accepted holds no answers of target {target}; let it serve for a while first")
    return halves


def choose(counts: Counts, kept: Collection[int], size: int, total: int) -> list[int]:
    """The ids to keep, ascending: those of ``kept``, then the most frequent ones; among equals the lowest.

    Args:
        counts: How often each id was answered.
        kept: Ids that stay in any case.
        size: How many to choose.
        total: Ids of the target.

    Raises:
        UserError: more ids are to be kept than there is room for.
    """
    size = min(size, total)
    if len(kept) > size:
        raise UserError(f"the target has {len(kept)} special tokens, so --size must be at least that; it is {size}")
    ranked = sorted(set(range(total)) - set(kept), key=lambda token: (-counts.get(token, 0), token))
    return sorted([*kept, *ranked[: size - len(kept)]])


def coverage(halves: tuple[Counts, Counts], kept: Collection[int], ids: Collection[int], total: int) -> Coverage:
    """What the ids cover of the counted tokens, beside the lowest ids and beside a choice made on other requests."""
    counts, size = _sum(halves), len(ids)
    tokens = sum(counts.values())
    crossed = sum(_covered(seen, choose(other, kept, size, total)) for seen, other in (halves, halves[::-1]))
    return Coverage(tokens, _covered(counts, ids) / tokens, crossed / tokens, _covered(counts, range(size)) / tokens)


def special_ids(folder: Path, total: int) -> list[int]:
    """Tokens that the tokenizer marks as special, and those that end an answer, as the target's own files say."""
    found: set[int] = set()
    tokenizer = _read(folder / "tokenizer.json").get("added_tokens") or []
    found.update(token["id"] for token in tokenizer if token.get("special"))
    added = _read(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    found.update(int(token) for token, described in added.items() if described.get("special"))
    for name in ("config.json", "generation_config.json"):
        ends = _read(folder / name).get("eos_token_id")
        found.update(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return sorted(token for token in found if token < total)


def write(path: Path, ids: list[int]) -> None:
    """Write the ids, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(ids) + "\n")
    unfinished.replace(path)


def _sum(halves: tuple[Counts, Counts]) -> dict[int, int]:
    one, other = halves
    return {token: one.get(token, 0) + other.get(token, 0) for token in one.keys() | other.keys()}


def _covered(counts: Counts, ids: Collection[int]) -> int:
    return sum(counts.get(token, 0) for token in ids)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
