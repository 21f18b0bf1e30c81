"""``aurora dead``: what the stream could not use, why, and publishing it again after a fix."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ops.cli.terminal import AsJson, Config, Set, fail, hint, moment, opened, say, settings_of, told
from schemas.errors import UserError

if TYPE_CHECKING:
    from pipeline.dead_letters.queue import DeadLetter, RecordContent
    from schemas.settings import Settings

DUMPED_BYTES = 256

app = typer.Typer(no_args_is_help=True, help="Records that could not be used: list, explain, publish again.")

Reason = Annotated[str | None, typer.Option("--reason", help="Only those of this reason.")]
Since = Annotated[str | None, typer.Option("--since", help="Only those since then: 90s, 30m, 2h, 7d ago, or a time.")]
Id = Annotated[str, typer.Argument(help="TOPIC/PARTITION/OFFSET, or PARTITION/OFFSET of the traces topic.")]
Ids = Annotated[list[str] | None, typer.Argument(help="As for `aurora dead show`.")]


@app.command("list")
def list_(
    config: Config = None,
    set_: Set = None,
    reason: Reason = None,
    since: Since = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="So many of the newest.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show dead letters, newest first, and what became of those that were published again."""
    with told():
        settings = settings_of(config, set_)
        from pipeline.dead_letters.queue import DeadLetterFilter, DeadLetterQueue

        wanted = DeadLetterFilter((), reason, moment(since) if since else None, limit)
        letters = DeadLetterQueue(opened(settings), settings.kafka).find(wanted)
        if as_json:
            _write([_plain(letter) for letter in letters])
        elif letters:
            Console().print(_as_table(letters, settings))
            if len(letters) == limit:
                hint(f"the newest {limit}; --limit shows more")
        else:
            say("no dead letters")


@app.command()
def show(
    id_: Id,
    config: Config = None,
    set_: Set = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write the original bytes into this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Explain one dead letter, with everything that can still be read of it."""
    with told():
        settings = settings_of(config, set_)
        from pipeline.dead_letters.queue import DeadLetterFilter, DeadLetterQueue, parse_address

        address = parse_address(id_, settings.kafka.traces_topic)
        dead = DeadLetterQueue(opened(settings), settings.kafka)
        letters = dead.find(DeadLetterFilter((address,)))
        content = dead.read_contents([address]).get(address)
        if save is not None:
            _save(save, content)
        if as_json:
            _write([_plain(letter) | (_plain_content(content) if content else {}) for letter in letters])
            return
        for letter in letters:
            for line in _told(letter, content):
                say(line)


@app.command()
def replay(  # noqa: PLR0913, PLR0917 - one for each flag
    ids: Ids = None,
    config: Config = None,
    set_: Set = None,
    reason: Reason = None,
    since: Since = None,
    all_: Annotated[bool, typer.Option("--all", help="All but those that no fix can make usable.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also those that were published again before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show which, and publish nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish dead letters again as they were, each once."""
    with told():
        settings = settings_of(config, set_)
        from pipeline.dead_letters import queue

        if bool(ids) + bool(reason) + all_ != 1:
            raise UserError("say which: ids, --reason REASON, or --all (`aurora dead list` shows them)")
        addresses = tuple(queue.parse_address(one, settings.kafka.traces_topic) for one in ids or [])
        dead = queue.DeadLetterQueue(opened(settings), settings.kafka)
        wanted = queue.DeadLetterFilter(addresses, reason, moment(since) if since else None)
        plan = queue.plan_replay(dead.find(wanted), named=not all_, again=again)
        for why, count in plan.excluded.items():
            hint(f"{count} left out: {why}")
        done: list[dict[str, Any]] = []
        try:
            for letter, became in (
                [(one, None) for one in plan.dead_letters] if dry_run else dead.replay(plan.dead_letters)
            ):
                done.append({"letter": str(letter.address), "became": str(became) if became else None})
                if not as_json:
                    say(f"{letter.address} ({letter.reason})" + (f" -> {became}" if became else ""))
        finally:
            if as_json:
                _write({"replayed": done, "left_out": plan.excluded})
        hint(f"{len(done)} {'would be published' if dry_run else 'published'} again")


def _as_table(letters: Sequence[DeadLetter], settings: Settings) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("id", "time (UTC)", "reason"):
        table.add_column(column, overflow="fold", no_wrap=column != "reason")
    for column in ("rows", "bytes"):
        table.add_column(column, justify="right")
    table.add_column("published again", overflow="fold")
    for letter in letters:
        address = letter.address
        of_ours = address.topic == settings.kafka.traces_topic
        table.add_row(
            f"{address.partition}/{address.offset}" if of_ours else str(address),
            f"{letter.time:%Y-%m-%d %H:%M:%S}",
            letter.reason,
            "" if letter.rows is None else f"{letter.rows:,}",
            "" if letter.size is None else f"{letter.size:,}",
            _fate(letter),
        )
    return table


def _fate(letter: DeadLetter) -> str:
    if not letter.replays:
        return ""
    last = letter.replays[-1]
    became = f"{last.new_address.partition}/{last.new_address.offset}"
    return f"{last.time:%Y-%m-%d %H:%M:%S} as {became}" + (f": {last.reason} again" if last.reason else "")


def _told(letter: DeadLetter, content: RecordContent | None) -> Iterator[str]:
    """One letter, for a person."""
    from pipeline.dead_letters.diagnosis import diagnose, hexdump
    from pipeline.dead_letters.reasons import REASONS

    yield f"{letter.address}  {letter.time:%Y-%m-%d %H:%M:%S} UTC"
    yield f"reason   {letter.reason}"
    if known := REASONS.get(letter.reason):
        yield f"means    {known.meaning}"
        yield f"do       {known.action}"
    yield f"detail   {letter.detail}"
    for one in letter.replays:
        outcome = f"a dead letter again: {one.reason}" if one.reason else "not a dead letter again"
        yield f"replayed {one.time:%Y-%m-%d %H:%M:%S} UTC as {one.new_address}, {outcome}"
    if content is None:
        yield "nothing of it was read, so there is nothing to show and nothing to publish again"
        return
    if content.replay_of:
        yield f"came of  {content.replay_of}, published again"
    yield f"key      {_text(content.key)}"
    for name, value in content.headers:
        yield f"header   {name}: {_text(value)}"
    if content.value is None:
        yield "value    none"
        return
    yield f"value    {len(content.value):,} bytes"
    for layer, says in diagnose(content.value).items():
        yield f"  {layer:<9}{says}"
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
    hint(f"{len(content.value):,} bytes written to {file}")


def _plain(letter: DeadLetter) -> dict[str, Any]:
    """A letter as JSON."""
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


def _plain_content(content: RecordContent) -> dict[str, Any]:
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


def _write(value: object) -> None:
    def time_of(value: object) -> str:
        assert isinstance(value, datetime)
        return value.isoformat()

    sys.stdout.write(json.dumps(value, indent=2, default=time_of) + "\n")
