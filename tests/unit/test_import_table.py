"""Who may import whom: the table of the architecture page, held over every import statement."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("schemas", "serving", "pipeline", "trainer", "ops")
ALLOWED = {
    "schemas": {"schemas"},
    "serving": {"serving", "schemas"},
    "pipeline": {"pipeline", "schemas"},
    "trainer": {"trainer", "schemas", "pipeline.delta"},
    "ops": set(FOLDERS),
}
WITHOUT_TORCH = (
    "schemas.trace.record",
    "schemas.batches",
    "schemas.events",
    "schemas.settings",
    "schemas.status",
    "schemas.draft_tree",
    "schemas.telemetry.logs",
    "schemas.telemetry.spans",
    "schemas.telemetry.trace_context",
    "pipeline.worker",
    "trainer.release.promoter",
    "ops.cli.main",
)


def imported(source: str, package: str = "") -> Iterator[str]:
    """Absolute names of everything that a module imports, wherever in it the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def ours(name: str) -> bool:
    return name.split(".", maxsplit=1)[0] in FOLDERS


def permitted(name: str, allowed: set[str]) -> bool:
    return any(name == known or name.startswith(f"{known}.") for known in allowed)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_the_table_allows(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder}/ is empty: the test would hold nothing"
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imported(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts))
        if ours(name) and not permitted(name, ALLOWED[folder])
    ]
    assert not wrong


def test_production_code_does_not_import_the_benchmarks() -> None:
    """``aurora`` loads the command group by name where a checkout has it; wheels and images do not contain it."""
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not path.is_relative_to(ROOT / "ops" / "bench")
        for name in imported(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts))
        if permitted(name, {"ops.bench"})
    ]
    assert not wrong


def test_every_kind_of_import_statement_is_seen() -> None:
    source = "import a.b\nfrom c import d\ndef f():\n    from . import e\n    from ..g import h\n"
    assert list(imported(source, "p.q")) == ["a.b", "c.d", "p.q.e", "p.g.h"]


def test_the_trainer_may_read_the_table_and_nothing_else_of_the_pipeline() -> None:
    assert permitted("pipeline.delta.DeltaLog", ALLOWED["trainer"])
    assert not permitted("pipeline.tables", ALLOWED["trainer"])
    assert not permitted("pipeline.offsets", ALLOWED["trainer"])


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_a_module_that_needs_no_torch_does_not_import_it(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_nothing_but_the_settings_reads_the_environment() -> None:
    """``os.environ`` may be handed on to a child, which is what ops does; reading a variable is for the settings."""
    readers = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                named = ast.unparse(node) if isinstance(node, ast.Subscript | ast.Call) else ""
                if named.startswith(("os.environ[", "os.environ.get(", "os.getenv(")):
                    readers.append(f"{path.relative_to(ROOT)}: {named}")
    assert not readers
