"""Tests that the reasons of dead letters are complete."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from pipeline import offsets
from pipeline.dead_letters import reasons
from pipeline.dead_letters.reasons import REASONS

CHECKOUT = Path(__file__).resolve().parents[3]
CODES = {"DUPLICATE": reasons.DUPLICATE, "UNREADABLE": reasons.UNREADABLE}


def find_reasons(tree: ast.AST) -> Iterator[str]:
    """Yield the reasons of every ``TraceError`` and ``Check`` in a module."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        place = {"TraceError": 0, "Check": 1}.get(node.func.id)
        if place is None:
            continue
        code = node.args[place]
        if isinstance(code, ast.Constant):
            yield str(code.value)
        elif isinstance(code, ast.Name):
            yield CODES[code.id]


def test_every_reason_in_the_code_is_explained_and_every_explained_one_is_used() -> None:
    files = [file for folder in ("schemas", "pipeline") for file in (CHECKOUT / folder).rglob("*.py")]
    codes = {code for file in files for code in find_reasons(ast.parse(file.read_text()))}
    assert codes | set(offsets.NEVER_READ) == set(REASONS)


def test_explanations_are_sentences() -> None:
    for reason in REASONS.values():
        assert all(text[0].isupper() and text.endswith(".") for text in (reason.meaning, reason.action))
