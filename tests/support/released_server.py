"""Fakes of another project's release: the functions and records that a plugin relies on, by their full names."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

Names = Mapping[str, tuple[str, ...]]


def function(parameters: tuple[str, ...]) -> Any:
    """Return a function with these parameters."""
    made: dict[str, Any] = {}
    exec(f"def made({', '.join(parameters)}): pass", made)
    return made["made"]


def install_fakes(monkeypatch: pytest.MonkeyPatch, signatures: Names, fields: Names) -> None:
    """Let every function and record be importable, as released."""
    parts: dict[str, Any] = {target: function(parameters) for target, parameters in signatures.items()}
    parts |= {target: dataclasses.make_dataclass("Record", names) for target, names in fields.items()}
    for target, part in parts.items():
        names = target.split(".")
        depth = next((i for i, name in enumerate(names) if name[:1].isupper()), len(names) - 1)
        for end in range(1, depth + 1):
            name = ".".join(names[:end])
            if name not in sys.modules or not hasattr(sys.modules[name], "of_the_test"):
                module = ModuleType(name)
                module.__path__ = []
                module.of_the_test = True  # type: ignore[attr-defined]
                monkeypatch.setitem(sys.modules, name, module)
        holder: Any = sys.modules[".".join(names[:depth])]
        for name in names[depth:-1]:
            if not hasattr(holder, name):
                setattr(holder, name, SimpleNamespace())
            holder = getattr(holder, name)
        setattr(holder, names[-1], part)
