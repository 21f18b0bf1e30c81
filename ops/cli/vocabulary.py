"""``aurora vocabulary``: choose the draft vocabulary, the most frequent tokens of recorded outputs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ops.cli.terminal import AsJson, Config, Set, echo, echo_json, echo_note, load_settings, open_tables, user_errors
from schemas.atomic_file import atomic_write
from schemas.errors import UserError

if TYPE_CHECKING:
    from pipeline.delta import DeltaLog

Counts = Mapping[int, int]
"""Token id -> count in the outputs."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Shares of output tokens within a draft vocabulary. A token outside of it is always rejected."""

    tokens: int
    """Output tokens counted."""
    chosen: float
    unseen: float
    """Share in one half of the requests with a vocabulary chosen on the other half: the estimate for new traffic."""
    lowest: float
    """Share with as many of the lowest ids, the vocabulary of day 0."""


def vocabulary(
    config: Config = None,
    set_: Set = None,
    size: Annotated[
        int | None, typer.Option("--size", min=16, help="Number of tokens. Default: speculator.draft_vocab_size.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file, which starts a new line.")] = False,
    as_json: AsJson = False,
) -> None:
    """Choose the draft vocabulary from recorded outputs and write it to speculator.draft_vocab_file."""
    with user_errors():
        settings = load_settings(config, set_)
        path = Path(settings.speculator.draft_vocab_file)
        if not settings.speculator.draft_vocab_file:
            raise UserError("set speculator.draft_vocab_file to the output file, here and in the processes that use it")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists and defines a speculator line; --overwrite starts a new one")
        tables = open_tables(settings)
        from schemas.speculator.checkpoint import CheckpointError
        from schemas.speculator.target_fingerprint import target_fingerprint

        folder = Path(settings.target.path)
        try:
            target = target_fingerprint(folder, settings.target.fingerprint_cache)
        except CheckpointError as error:
            raise UserError(str(error)) from error
        halves = count_tokens(tables, target)
        total = _read(folder / "config.json")["vocab_size"]
        kept = special_ids(folder, total)
        ids = choose_ids(_sum(halves), kept, size or settings.speculator.draft_vocab_size, total)
        atomic_write(path, json.dumps(ids) + "\n")
        covered = coverage(halves, kept, ids, total)
        if as_json:
            echo_json({"file": str(path), "ids": len(ids), **asdict(covered)})
            return
        echo(f"{path}: {len(ids)} of {total} ids, {len(kept)} of them special")
        echo(f"covers {covered.chosen:.2%} of {covered.tokens} output tokens; the lowest ids {covered.lowest:.2%}")
        echo(f"a choice on one half of the requests covers {covered.unseen:.2%} of the other half")
        echo_note("nodes and trainer start the new line when they restart with this setting")


def count_tokens(tables: DeltaLog, target: str) -> tuple[Counts, Counts]:
    """Return token counts of the outputs of a target in table ``accepted``, for two halves of the requests.

    All lines count; prompts do not: a token counts if the target computed it.

    Raises:
        UserError: the table has no outputs of the target.
    """
    halves: tuple[dict[int, int], dict[int, int]] = ({}, {})
    # The mask marks positions with a teacher distribution; the output token is at the next position.
    answers = (
        "select unnest(array_append(tokens, next_token)) as token, "  # noqa: S608 - a hash
        "unnest(array_prepend(false, loss_mask)) as answered, ascii(md5(request)) % 2 as half "
        f"from accepted where target = '{target}'"
    )
    sums = f"select token, half, count(*) as seen from ({answers}) where answered and token is not null group by 1, 2"  # noqa: S608
    for row in tables.query(sums).read_all().to_pylist():
        halves[row["half"]][row["token"]] = row["seen"]
    if not any(halves):
        raise UserError(f"the table accepted has no outputs of target {target}; serve some traffic first")
    return halves


def choose_ids(counts: Counts, kept: Collection[int], size: int, total: int) -> list[int]:
    """Return the ids in ascending order: those of ``kept``, then the most frequent ones, the lowest first among equals.

    Args:
        counts: Token counts.
        kept: Ids that are always included.
        size: Number of ids.
        total: Vocabulary size of the target.

    Raises:
        UserError: ``kept`` has more than ``size`` ids.
    """
    size = min(size, total)
    if len(kept) > size:
        raise UserError(
            f"the target has {len(kept)} special tokens, so --size must be at least {len(kept)}, not {size}"
        )
    ranked = sorted(set(range(total)) - set(kept), key=lambda token: (-counts.get(token, 0), token))
    return sorted([*kept, *ranked[: size - len(kept)]])


def coverage(halves: tuple[Counts, Counts], kept: Collection[int], ids: Collection[int], total: int) -> Coverage:
    """Return the coverage of the ids, of the lowest ids, and of a choice on other requests."""
    counts, size = _sum(halves), len(ids)
    tokens = sum(counts.values())
    crossed = sum(_covered(seen, choose_ids(other, kept, size, total)) for seen, other in (halves, halves[::-1]))
    return Coverage(tokens, _covered(counts, ids) / tokens, crossed / tokens, _covered(counts, range(size)) / tokens)


def special_ids(folder: Path, total: int) -> list[int]:
    """Return the special tokens of the tokenizer and the end-of-sequence tokens of the target."""
    found: set[int] = set()
    tokenizer = _read(folder / "tokenizer.json").get("added_tokens") or []
    found.update(token["id"] for token in tokenizer if token.get("special"))
    added = _read(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    found.update(int(token) for token, described in added.items() if described.get("special"))
    for name in ("config.json", "generation_config.json"):
        ends = _read(folder / name).get("eos_token_id")
        found.update(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return sorted(token for token in found if token < total)


def _sum(halves: tuple[Counts, Counts]) -> dict[int, int]:
    one, other = halves
    return {token: one.get(token, 0) + other.get(token, 0) for token in one.keys() | other.keys()}


def _covered(counts: Counts, ids: Collection[int]) -> int:
    return sum(counts.get(token, 0) for token in ids)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
