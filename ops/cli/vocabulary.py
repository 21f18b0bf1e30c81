"""``aurora vocabulary``: choose the draft vocabulary, the most frequent tokens of recorded outputs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli.terminal import AsJson, Config, Set, echo, echo_json, echo_note, load_settings, open_tables, user_errors
from schemas.atomic_file import atomic_write
from schemas.errors import UserError
from trainer.data.draft_vocabulary import Halves, choose_ids, coverage, special_ids, sum_halves

if TYPE_CHECKING:
    from pipeline.delta import DeltaLog


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
        from schemas.speculator.day_0_draft import read_config
        from schemas.speculator.target_fingerprint import target_fingerprint

        folder = Path(settings.target.path)
        try:
            target = target_fingerprint(folder, settings.target.fingerprint_cache)
        except CheckpointError as error:
            raise UserError(str(error)) from error
        halves = count_tokens(tables, target)
        total = read_config(folder)["vocab_size"]
        kept = special_ids(folder, total)
        ids = choose_ids(sum_halves(halves), kept, size or settings.speculator.draft_vocab_size, total)
        atomic_write(path, json.dumps(ids) + "\n")
        covered = coverage(halves, kept, ids, total)
        if as_json:
            echo_json({"file": str(path), "ids": len(ids), **asdict(covered)})
            return
        echo(f"{path}: {len(ids)} of {total} ids, {len(kept)} of them special")
        echo(f"covers {covered.chosen:.2%} of {covered.tokens} output tokens; the lowest ids {covered.lowest:.2%}")
        echo(f"a choice on one half of the requests covers {covered.unseen:.2%} of the other half")
        echo_note("nodes and trainer start the new line when they restart with this setting")


def count_tokens(tables: DeltaLog, target: str) -> Halves:
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
