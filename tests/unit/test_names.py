"""Names: one meaning per class and module within a package, and the words of the glossary in all text."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("schemas", "serving", "pipeline", "trainer", "ops", "ops/bench")
OLD_WORDS = (
    r"\bseats?\b|\bshelf\b|\bforests?\b|\blessons?\b|\bautops\w*|\bcloakroom\b|\bcaretaker\b",
    r"\baccept[ _]lengths?\b|\bheld[ _-]back\b|\bverify rounds?\b|\btaken back\b|\bpuller\b",
    r"\btold\b|\btells\b|\bwhoever\b|\bnobody\b|\bgoes on\b|\bgo on\b|\bstands? still\b|\bat fault\b|\blet go\b",
    r"\btakes? over\b|\bcame to that\b|\bhas its turn\b|\b(is|are) asked\b",
)


def files_of(package: str) -> Iterator[Path]:
    for path in sorted((ROOT / package).rglob("*.py")):
        if package != "ops" or not path.is_relative_to(ROOT / "ops" / "bench"):
            yield path


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_modules_of_a_package_share_a_name(package: str) -> None:
    found = defaultdict(list)
    for path in files_of(package):
        if path.name not in {"__init__.py", "__main__.py"}:
            found[path.stem].append(str(path.relative_to(ROOT)))
    assert [paths for paths in found.values() if len(paths) > 1] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_classes_of_a_package_share_a_name(package: str) -> None:
    found = defaultdict(list)
    for path in files_of(package):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_code_and_pages_use_none_of_the_old_words() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    texts = [*(path for package in PACKAGES[:5] for path in (ROOT / package).rglob("*.py")), *pages]
    old = re.compile("|".join(OLD_WORDS), re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts
        if path.name != "glossary.md"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if old.search(line)
    ]
    assert found == []
