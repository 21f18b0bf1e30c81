"""The files that setuptools ships: production code and its data, no benchmarks and none of their prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from setuptools import Distribution
from setuptools.command.build_py import build_py
from setuptools.config.pyprojecttoml import apply_configuration

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shipped() -> set[str]:
    """Paths in the wheel, relative to the root of the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        distribution = Distribution({"script_name": "setup.py"})
        apply_configuration(distribution, "pyproject.toml")
        command = build_py(distribution)
        command.ensure_finalized()
        return {str(Path(source)) for source in command.get_output_mapping().values()}


def test_a_wheel_contains_no_benchmark_and_none_of_its_prompts(shipped: set[str]) -> None:
    assert (ROOT / "ops/bench/prompts/sql.jsonl").exists()
    assert not [path for path in shipped if path.startswith("ops/bench")]


@pytest.mark.parametrize(
    "path",
    [
        "schemas/settings/__init__.py",
        "ops/cli/main.py",
        "ops/demo/prompts/__init__.py",
        "ops/demo/prompts/code.jsonl",
        "ops/demo/prompts/math.jsonl",
        "ops/demo/prompts/SOURCES.md",
        "ops/local/kafka.lock",
    ],
)
def test_a_wheel_contains_production_code_and_its_data(shipped: set[str], path: str) -> None:
    assert path in shipped


def test_a_wheel_contains_every_production_module(shipped: set[str]) -> None:
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("schemas", "serving", "pipeline", "trainer", "ops")
        for path in (ROOT / folder).rglob("*.py")
    }
    missing = {path for path in modules - shipped if not path.startswith("ops/bench/")}
    assert not missing
