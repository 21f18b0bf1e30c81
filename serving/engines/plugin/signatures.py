"""Compares the functions and records that hooks rely on with the installed server, which guarantees neither."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
from collections.abc import Mapping


def changed_signatures(expected: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return what differs from the expected parameters of functions, which are named in full."""
    found = []
    for target, names in expected.items():
        try:
            parameters = tuple(inspect.signature(pkgutil.resolve_name(target)).parameters)
        except (AttributeError, ImportError) as error:
            found.append(f"{target}: {error}")
        else:
            if parameters != names:
                found.append(f"{target} takes {', '.join(parameters)}")
    return found


def missing_fields(expected: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return what is missing of the expected fields of data classes and named tuples, which are named in full."""
    found = []
    for target, names in expected.items():
        record = pkgutil.resolve_name(target)
        fields = getattr(record, "_fields", None) or [field.name for field in dataclasses.fields(record)]
        if missing := [name for name in names if name not in fields]:
            found.append(f"{target} has no {', '.join(missing)}")
    return found
