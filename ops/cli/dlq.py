"""``aurora dlq``: list, explain and replay the records of the dead-letter queue."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ops.cli.terminal import (
    AsJson,
    Config,
    DryRun,
    Set,
    echo,
    echo_json,
    echo_note,
    fail,
    load_settings,
    new_table,
    open_tables,
    parse_time,
    user_errors,
)
from schemas.errors import UserError

if TYPE_CHECKING:
    from pipeline.dead_letters.queue import DeadLetter, RecordContent
    from schemas.settings import Settings

DUMPED_BYTES = 256

app = typer.Typer(no_args_is_help=True, help="Inspect and replay the dead-letter queue.")

Reason = Annotated[str | None, typer.Option("--reason", help="Only dead letters with this reason.")]
Since = Annotated[str | None, typer.Option("--since", help="Only dead letters since 90s, 30m, 2h, 7d ago, or a time.")]
Id = Annotated[str, typer.Argument(help="TOPIC/PARTITION/OFFSET, or PARTITION/OFFSET of the traces topic.")]
Ids = Annotated[list[str] | None, typer.Argument(help="Ids, as for `aurora dlq show`.")]


@app.command("list")
def list_(
    config: Config = None,
    set_: Set = None,
    reason: Reason = None,
    since: Since = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Number of newest dead letters.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List dead letters, newest first, with the outcome of replays."""
    with user_errors():
        settings = load_settings(config, set_)
        from pipeline.dead_letters.queue import DeadLetterFilter, DeadLetterQueue

        wanted = DeadLetterFilter((), reason, parse_time(since) if since else None, limit)
        letters = DeadLetterQueue(open_tables(settings), settings.kafka).find(wanted)
        if as_json:
            _print_json([_letter_json(letter) for letter in letters])
        elif letters:
            Console().print(_build_table(letters, settings))
            if len(letters) == limit:
                echo_note(f"the newest {limit}; --limit shows more")
        else:
            echo("no dead letters")


@app.command()
def show(
    id_: Id,
    config: Config = None,
    set_: Set = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write the original bytes to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show one dead letter with its reason, headers and a diagnosis of its bytes."""
    with user_errors():
        settings = load_settings(config, set_)
        from pipeline.dead_letters.queue import DeadLetterFilter, DeadLetterQueue, parse_address

        address = parse_address(id_, settings.kafka.traces_topic)
        dead = DeadLetterQueue(open_tables(settings), settings.kafka)
        letters = dead.find(DeadLetterFilter((address,)))
        content = dead.read_contents([address]).get(address)
        if save is not None:
            _save(save, content)
        if as_json:
            _print_json([_letter_json(letter) | (_content_json(content) if content else {}) for letter in letters])
            return
        for letter in letters:
            for line in _describe_letter(letter, content):
                echo(line)


@app.command()
def replay(  # noqa: PLR0913, PLR0917 - one for each flag
    ids: Ids = None,
    config: Config = None,
    set_: Set = None,
    reason: Reason = None,
    since: Since = None,
    all_: Annotated[bool, typer.Option("--all", help="All dead letters except those that no fix can repair.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Include dead letters that were already replayed.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Publish dead letters again unchanged, each once."""
    with user_errors():
        settings = load_settings(config, set_)
        from pipeline.dead_letters import queue

        if bool(ids) + bool(reason) + all_ != 1:
            raise UserError("choose dead letters by ids, --reason REASON, or --all (`aurora dlq list` shows them)")
        addresses = tuple(queue.parse_address(one, settings.kafka.traces_topic) for one in ids or [])
        dead = queue.DeadLetterQueue(open_tables(settings), settings.kafka)
        wanted = queue.DeadLetterFilter(addresses, reason, parse_time(since) if since else None)
        plan = queue.plan_replay(dead.find(wanted), named=not all_, again=again)
        for why, count in plan.excluded.items():
            echo_note(f"{count} skipped: {why}")
        done: list[dict[str, Any]] = []
        try:
            planned = [(letter, None) for letter in plan.dead_letters]
            for letter, became in planned if dry_run else dead.replay(plan.dead_letters):
                done.append({"letter": str(letter.address), "became": str(became) if became else None})
                if not as_json:
                    echo(f"{letter.address} ({letter.reason})" + (f" -> {became}" if became else ""))
        finally:
            if as_json:
                _print_json({"replayed": done, "excluded": plan.excluded})
        echo_note(f"{len(done)} {'would be published' if dry_run else 'published'} again")


def _build_table(letters: Sequence[DeadLetter], settings: Settings) -> Table:
    table = new_table("id", "time (UTC)", "reason", "replayed", right=("rows", "bytes"))
    for column in table.columns[:2]:
        column.no_wrap = True
    for letter in letters:
        address = letter.address
        is_trace = address.topic == settings.kafka.traces_topic  # PARTITION/OFFSET names a record of the first log
        table.add_row(
            f"{address.partition}/{address.offset}" if is_trace else str(address),
            f"{letter.time:%Y-%m-%d %H:%M:%S}",
            letter.reason,
            _describe_replay(letter),
            "" if letter.rows is None else f"{letter.rows:,}",
            "" if letter.size is None else f"{letter.size:,}",
        )
    return table


def _describe_replay(letter: DeadLetter) -> str:
    if not letter.replays:
        return ""
    last = letter.replays[-1]
    became = f"{last.new_address.partition}/{last.new_address.offset}"
    return f"{last.time:%Y-%m-%d %H:%M:%S} as {became}" + (f": {last.reason} again" if last.reason else "")


def _describe_letter(letter: DeadLetter, content: RecordContent | None) -> Iterator[str]:
    """Yield the lines that explain one dead letter."""
    from pipeline.dead_letters.diagnosis import diagnose, hexdump
    from pipeline.dead_letters.reasons import REASONS

    yield f"{letter.address}  {letter.time:%Y-%m-%d %H:%M:%S} UTC"
    yield f"reason   {letter.reason}"
    if known := REASONS.get(letter.reason):
        yield f"means    {known.meaning}"
        yield f"fix      {known.action}"
    yield f"detail   {letter.detail}"
    for one in letter.replays:
        outcome = f"a dead letter again: {one.reason}" if one.reason else "not a dead letter again"
        yield f"replayed {one.time:%Y-%m-%d %H:%M:%S} UTC as {one.new_address}, {outcome}"
    if content is None:
        yield "its content was not read, so it cannot be shown or replayed"
        return
    if content.replay_of:
        yield f"replay of {content.replay_of}"
    yield f"key      {_text(content.key)}"
    for name, value in content.headers:
        yield f"header   {name}: {_text(value)}"
    if content.value is None:
        yield "value    none"
        return
    yield f"value    {len(content.value):,} bytes"
    for layer, diagnosis in diagnose(content.value).items():
        yield f"  {layer:<9}{diagnosis}"
    for line in hexdump(content.value, DUMPED_BYTES):
        yield f"  {line}"


def _text(value: bytes | None) -> str:
    return "none" if value is None else value.decode(errors="backslashreplace")


def _save(file: Path, content: RecordContent | None) -> None:
    if content is None or content.value is None:
        fail("this dead letter has no bytes", code=2)
    try:
        file.write_bytes(content.value)
    except OSError as error:
        raise UserError(f"--save {file}: {error.strerror}") from error
    echo_note(f"{len(content.value):,} bytes written to {file}")


def _letter_json(letter: DeadLetter) -> dict[str, Any]:
    """Return a dead letter as JSON."""
    return {
        "id": str(letter.address),
        **letter.address._asdict(),
        "time": letter.time,
        "reason": letter.reason,
        "detail": letter.detail,
        "rows": letter.rows,
        "bytes": letter.size,
        "replays": [{"time": r.time, "became": str(r.new_address), "reason": r.reason} for r in letter.replays],
    }


def _content_json(content: RecordContent) -> dict[str, Any]:
    from pipeline.dead_letters.diagnosis import diagnose

    return {
        "key": _base64(content.key),
        "headers": [{"name": name, "value": _base64(value)} for name, value in content.headers],
        "value": _base64(content.value),
        "replay_of": content.replay_of,
        "layers": diagnose(content.value) if content.value is not None else {},
    }


def _base64(value: bytes | None) -> str | None:
    return None if value is None else base64.b64encode(value).decode()


def _print_json(value: object) -> None:
    echo_json(value, default=datetime.isoformat)
