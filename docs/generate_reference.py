"""Write the pages of ``docs/reference/`` from the code: ``python docs/generate_reference.py`` (``make reference``).

It also writes the schema of the Helm chart's values, which holds the settings. A test compares the files with what the
code builds, so that none of them is stale.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pyarrow as pa
import typer.main
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from exported import exported_metrics, node_application, registries  # noqa: E402
from prometheus_client import CollectorRegistry  # noqa: E402

from ops.cli.main import app  # noqa: E402
from ops.deploy import chart_schema  # noqa: E402
from schemas import batches, status  # noqa: E402
from schemas.settings import Duration, Settings, sections  # noqa: E402
from serving.http import requests  # noqa: E402

SETTINGS_INTRODUCTION = """\
Settings come from `aurora.toml`, then from `AURORA_SECTION__KEY` variables, then from `--set SECTION.KEY=VALUE`.
The later source wins.
A duration is a number of seconds, or text with a unit: `"500ms"`, `"30s"`, `"5m"`, `"2h"`, `"14d"`.
`aurora config show` prints the values that are in effect."""
TABLES_INTRODUCTION = """\
The Delta tables lie below `tables.uri`.
Any Delta reader opens them; [Read the tables](../guides/extend.md#read-the-tables) shows how.
16-bit floats are stored as binary, because Delta has no such type."""
COLUMNS = {
    "topic": "Kafka topic of the record.",
    "partition": "Kafka partition of the record.",
    "offset": "Kafka offset of the record.",
    "request": "Id of the request's sequence.",
    "chunk": "Number of the chunk in its request, from 0.",
    "node": "Name of the node (`serve.node`).",
    "target": "Fingerprint of the target.",
    "line": "Speculator line.",
    "label": "Label of the traffic (`x-aurora-label`).",
    "speculator": "Last version that a verify step of the chunk names; empty if none does.",
    "traces.speculator": "Version that drafted in this step, or that was active in a step without draft tokens; empty "
    "without one.",
    "time": "Time at the node.",
    "dead_letters.time": "Time of the Kafka record.",
    "promotions.time": "Time of the move.",
    "intents.time": "Time of the row.",
    "replays.time": "Time of the replay.",
    "cursors.time": "Time of the announcement.",
    "holds.time": "Time of the row.",
    "day": "UTC day of the Kafka record's time.",
    "cursors.day": "UTC day of the announcement.",
    "position": "Position of the first of `tokens` in the request.",
    "tokens": "Committed token ids: the root and the accepted draft tokens, or a piece of the prompt.",
    "accepted.tokens": "Committed token ids of the chunk.",
    "next_token": "The last bonus token: chosen and not consumed yet; null after the end.",
    "features": "bf16 [tokens, feature_width]: captured hidden states; empty with `recompute`.",
    "feature_width": "Width of the features: three times the hidden size.",
    "loss_mask": "Per token, whether the target's distribution after it is known.",
    "top_k": "Width of the recorded distributions.",
    "teacher_ids": "[masked tokens, top_k] the target's top token ids.",
    "rejected.teacher_ids": "[branch, top_k] the target's top token ids after each token of the branch.",
    "teacher_logprobs": "Their log-probabilities.",
    "verify_step": "Number of the verify step in its request; 0 is the prefill.",
    "root_position": "Position of the branch's root in the request.",
    "context": "Token ids before the branch; the last one is its root.",
    "branch": "Draft token ids from the root's child to the leaf.",
    "accepted_prefix": "Tokens of the branch that were accepted before the rejection.",
    "draft_logprobs": "The draft's log-probabilities of its tokens; NaN if unknown.",
    "draft_sources": "Drafters of each token of the draft, a sum of 1 (the version in `speculator`) and 2 (the suffix "
    "drafter); null if all are the version's.",
    "rejected.draft_sources": "As in `traces`, for each token of the branch.",
    "last_chunk": "Whether the chunk ends the request.",
    "prompt_key": "Hash of the conversation's first user message, or of the prompt's token ids.",
    "finish": "Why the request ended: `stop`, `length` or `error`.",
    "temperature": "Sampling temperature; 0 is greedy.",
    "top_p": "Sampling top-p.",
    "sampling_top_k": "Sampling top-k; 0 is off.",
    "seed": "Sampling seed.",
    "draft_tokens": "Draft token ids in the order of the tree's nodes.",
    "draft_parents": "Parent index of each node; -1 is the root.",
    "accepted": "Indices of the accepted nodes, from the root's child on.",
    "bonus": "The token that the target added; null inside the prompt.",
    "top_ids": "The target's top token ids at the root and after every draft token.",
    "top_logprobs": "Their log-probabilities.",
    "draft_us": "Drafting time in microseconds.",
    "verify_us": "Verification time in microseconds.",
    "start_time": "Time of the request's first row at the node; null if it was dropped, and in rows of older nodes.",
    "active_since": "Time at which the node swapped `speculator` in, or started with it; null without a version and in "
    "rows of older nodes.",
    "reason": "Reason code of the dead letter.",
    "detail": "The reason in words, with the values found.",
    "rows": "Number of verify steps according to the header; null if unreadable.",
    "size": "Bytes of the value.",
    "key": "Key of the record.",
    "value": "Value of the record, byte for byte.",
    "headers": "Headers of the record.",
    "alias": "Alias that moved.",
    "from_version": "Version that the alias named before.",
    "to_version": "Version that the alias names now; null if it was removed.",
    "actor": "Who or what moved the alias.",
    "why": "Reason of the move.",
    "figures": "JSON of the figures that decided the move.",
    "id": "Id of the move.",
    "state": "`intended`, `done` or `abandoned`.",
    "action": "Kind of the move.",
    "intent": "JSON of the moves (`schemas.events.Intent`).",
    "note": "Why the move was abandoned.",
    "new_topic": "Topic of the record that was published again.",
    "new_partition": "Its partition.",
    "new_offset": "Its offset.",
    "reader": "Name of the reader.",
    "table": "Table that was read.",
    "holds.table": "Table that is held.",
    "version": "Version up to which the reader has read.",
    "experiment": "Name of the experiment that holds the versions.",
    "after_version": "The hold covers additions after this version.",
    "up_to_version": "The hold covers additions up to this version.",
    "released": "Whether the hold has ended.",
}
_NOTE = "<!-- Generated by `make reference`; do not edit. -->"
_UNITS = (("d", 86_400.0), ("h", 3600.0), ("m", 60.0), ("s", 1.0), ("ms", 1e-3))
_SIGNS = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}


def pages() -> dict[str, str]:
    """Every page by its file name."""
    return {
        "settings.md": settings_page(),
        "cli.md": cli_page(),
        "metrics.md": metrics_page(),
        "tables.md": tables_page(),
        "http-api.md": http_page(),
    }


def settings_page() -> str:
    """Every setting with its type, default, bounds and meaning."""
    text = [
        "# Settings",
        _NOTE,
        SETTINGS_INTRODUCTION,
    ]
    for section, field in Settings.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        text += [f"## `[{section}]`", sentence_lines(inspect.cleandoc(model.__doc__ or ""))]
        meanings = attribute_docs(Path(sections.__file__).read_text(), model.__name__)
        rows = [
            (f"`{name}`", type_name(info), default_of(info), bounds_of(info), one_line(meanings.get(name, "")))
            for name, info in model.model_fields.items()
        ]
        text.append(table(("Setting", "Type", "Default", "Bounds", "Meaning"), rows))
    return "\n\n".join(text) + "\n"


def cli_page() -> str:
    """Every command with its arguments and options."""
    text = ["# Command line", _NOTE]
    root = typer.main.get_command(app)
    for path, command in commands(root, "aurora"):
        text += [f"{'#' * min(1 + len(path.split()), 4)} `{path}`", sentence_lines(command.help or "")]
        context = command.make_context(path, [], resilient_parsing=True)
        rows = [option_row(context, parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            text.append(table(("Option", "Meaning"), rows))
    return "\n\n".join(filter(None, text)) + "\n"


def tables_page() -> str:
    """Every Delta table with its columns."""
    text = [
        "# Tables",
        _NOTE,
        TABLES_INTRODUCTION,
    ]
    docs = module_docs(Path(batches.__file__).read_text())
    for name, schema in batches.TABLES.items():
        partitions = ", ".join(f"`{column}`" for column in batches.PARTITIONED_BY[name]) or "none"
        text += [f"## `{name}`", sentence_lines(docs[name.upper()]), f"Partition columns: {partitions}."]
        rows = [
            (f"`{f.name}`", f"`{arrow_type(f.type)}`", "yes" if f.nullable else "", column_meaning(name, f.name))
            for f in schema
        ]
        text.append(table(("Column", "Type", "Nullable", "Meaning"), rows))
    return "\n\n".join(text) + "\n"


def metrics_page() -> str:
    """Every Prometheus metric by process."""
    text = [
        "# Metrics",
        _NOTE,
        "Every process exports Prometheus metrics on `GET /metrics`; SGLang's and vLLM's own have those of the plugin.",
    ]
    for process, registry in registries().items():
        rows = [
            (f"`{m.name}`", m.kind, ", ".join(f"`{label}`" for label in m.labels), one_line(m.help))
            for m in exported_metrics(registry)
        ]
        text += [f"## {process[0].upper()}{process[1:]}", table(("Metric", "Type", "Labels", "Meaning"), rows)]
    return "\n\n".join(text) + "\n"


def http_page() -> str:
    """Every endpoint of a serving node with its parameters."""
    schema = node_application(CollectorRegistry()).openapi()
    models = schema["components"]["schemas"]
    text = [
        "# HTTP API",
        _NOTE,
        "The endpoints of a serving node.\n[Use the API](../guides/api.md) explains extensions, errors and drain.",
    ]
    for path, methods in schema["paths"].items():
        for method, endpoint in methods.items():
            text += [f"## `{method.upper()} {path}`", sentence_lines(endpoint.get("description", ""))]
            if body := endpoint.get("requestBody"):
                reference = body["content"]["application/json"]["schema"]
                text += [model_table(models, reference, "Parameter"), neutral_parameters(reference)]
            answer = (
                endpoint["responses"].get("200", {}).get("content", {}).get("application/json", {}).get("schema", {})
            )
            if "$ref" in answer:
                text.append(model_table(models, answer, "Field of the answer"))
    return "\n\n".join(filter(None, text)) + "\n"


def model_table(models: dict[str, Any], reference: dict[str, Any], head: str) -> str:
    """The fields of a JSON object."""
    name = reference["$ref"].rsplit("/", 1)[-1]
    model, meanings = models[name], field_docs(name)
    required = model.get("required", ())
    rows = []
    for name, field in model["properties"].items():
        default = "required" if name in required and head == "Parameter" else json_default(field)
        rows.append((f"`{name}`", json_type(field), default, one_line(meanings.get(name, ""))))
    return table((head, "Type", "Default", "Meaning"), rows)


def neutral_parameters(reference: dict[str, Any]) -> str:
    """The parameters that a request may name without effect."""
    model = getattr(requests, reference["$ref"].rsplit("/", 1)[-1], None)
    if model is None:
        return ""
    served = [
        f"`{name}` ({' or '.join(f'`{json.dumps(value)}`' for value in neutral)})" if neutral else f"`{name}`"
        for name, neutral in sorted(model.unsupported.items())
    ]
    ignored = ", ".join(f"`{name}`" for name in sorted(model.ignored))
    return (
        "Null stands for an absent value of every parameter.\n"
        "These are accepted with null or with the value that changes nothing, and otherwise rejected: "
        f"{', '.join(served)}.\n"
        f"These have no effect on the answer: {ignored}."
    )


def field_docs(model: str) -> dict[str, str]:
    """Docstrings below the fields of a request or status model, those of its base classes included."""
    for module in (status, requests):
        if found := getattr(module, model, None):
            source = Path(module.__file__).read_text()
            names = [base.__name__ for base in found.__mro__ if base.__module__ == module.__name__]
            return {name: doc for base in names for name, doc in attribute_docs(source, base).items()}
    return {}


def json_default(field: dict[str, Any]) -> str:
    """The default of a JSON field; nothing for null."""
    return f"`{json.dumps(field['default'])}`" if field.get("default") is not None else ""


def json_type(field: dict[str, Any]) -> str:
    """The type of a JSON field with its bounds."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(filter(None, map(json_type, field["anyOf"]))))
    if "$ref" in field:
        return "object"
    if field.get("type") == "null":
        return ""
    if "items" in field:
        return f"list of {json_type(field['items'])}"
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum")
    if low is None or low < -(2**53):
        return str(field.get("type", "any"))
    bounds = f" {low:g} to {high:g}" if high is not None else f" from {low:g}"
    return f"{field.get('type', 'any')}{bounds}"


def column_meaning(table_name: str, column: str) -> str:
    """What a column holds; a table's own meaning wins over the shared one."""
    return COLUMNS.get(f"{table_name}.{column}") or COLUMNS[column]


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The command and those below it, with the words that call them."""
    if not command.hidden:
        yield path, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from commands(inner, f"{path} {name}")


def option_row(context: Any, parameter: Any) -> tuple[str, str]:
    """One row of a command's table."""
    names, meaning = parameter.get_help_record(context) or (parameter.name, "")
    if parameter.param_type_name == "argument":
        names = parameter.metavar or parameter.name.upper()
    return f"`{names.strip()}`", one_line(meaning)


def attribute_docs(source: str, cls: str) -> dict[str, str]:
    """Docstrings below the fields of a class; a group of fields shares the docstring below its last one."""
    (found,) = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == cls]
    return docs_below(found.body)


def module_docs(source: str) -> dict[str, str]:
    """Docstrings below the assignments of a module."""
    return docs_below(ast.parse(source).body)


def docs_below(body: list[ast.stmt]) -> dict[str, str]:
    """Docstrings by the name that is assigned right above them."""
    docs = {}
    for above, below in itertools.pairwise(body):
        target = (
            above.target
            if isinstance(above, ast.AnnAssign)
            else above.targets[0]
            if isinstance(above, ast.Assign)
            else None
        )
        if isinstance(target, ast.Name) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[target.id] = inspect.cleandoc(str(below.value.value))
    return docs


def type_name(info: FieldInfo) -> str:
    """The type of a setting in words."""
    return " or ".join(dict.fromkeys(type_names(info.annotation, info.metadata)))


def type_names(annotation: Any, metadata: Iterable[Any] = ()) -> Iterator[str]:
    """The types of a union one by one."""
    seconds = get_args(Duration)[1]
    if any(part == seconds for part in metadata):
        yield "duration"
    elif get_origin(annotation) is Literal:
        yield " or ".join(f"`{choice}`" for choice in get_args(annotation))
    elif hasattr(annotation, "__metadata__"):
        yield from type_names(get_args(annotation)[0], annotation.__metadata__)
    elif annotation is SecretStr:
        yield "secret"
    elif get_origin(annotation) is dict:
        yield "table"
    elif isinstance(annotation, type):
        yield {"str": "text", "bool": "true or false", "int": "integer", "float": "number"}[annotation.__name__]
    else:
        for inner in get_args(annotation):
            yield from type_names(inner)


def default_of(info: FieldInfo) -> str:
    """The default of a setting as it is written in a file."""
    default = info.get_default(call_default_factory=True)
    if isinstance(default, SecretStr):
        return ""
    if type_name(info).startswith("duration") and isinstance(default, int | float):
        return f"`{duration(default)}`"
    return f"`{json.dumps(default)}`"


def duration(seconds: float) -> str:
    """A time span with the largest unit that keeps it whole."""
    unit, size = next((u for u in _UNITS if seconds and (seconds / u[1]).is_integer()), ("s", 1.0))
    return f"{seconds / size:g}{unit}"


def bounds_of(info: FieldInfo) -> str:
    """The bounds of a setting."""
    span = type_name(info).startswith("duration")
    found = []
    for part in info.metadata:
        if (sign := _SIGNS.get(type(part))) is not None:
            (bound,) = vars(part).values() if hasattr(part, "__dict__") else (getattr(part, part.__slots__[0]),)
            found.append(f"{sign} {duration(float(bound)) if span and bound else bound}")
    return ", ".join(found)


def arrow_type(kind: pa.DataType) -> str:
    """An Arrow type in short."""
    return re.sub(r"(item|element): ", "", str(kind)).replace(" not null", "")


def one_line(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


def sentence_lines(text: str) -> str:
    """Text with one sentence per line."""
    return re.sub(r"(?<=[.:;]) (?=[A-Z`])", "\n", one_line(text).replace("\\|", "|"))


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table without the columns that are empty in every row."""
    rows = list(rows)
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line[i] for i in kept)} |" for line in lines)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, content in pages().items():
        (FOLDER / file).write_text(content)
    chart_schema.FILE.write_text(chart_schema.build())
