"""``python -m ops.deploy.package_audit PIP_AUDIT FILE..``: what is known against the pinned packages, or that nobody
could be asked.

pip-audit ends well also where it could ask about nothing: here a package that was not looked up is told, and is no
success.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_AUDITED = 3
_GO_ON = "--go-on"
"""Ends well where nothing was found and not everything could be asked: for machines without a way to the service."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one file."""

    asked: int
    """Packages that the service knows."""
    found: tuple[str, ...]
    """Vulnerabilities, with their packages and the versions without them."""
    unasked: tuple[str, ...]
    """Why packages were not looked up; each reason once."""

    @property
    def code(self) -> int:
        """Exit code."""
        return 1 if self.found else NOT_AUDITED if self.unasked or not self.asked else 0


def outcome(report: Any) -> Outcome:
    """What a report of pip-audit says."""
    packages = report["dependencies"]
    found = [
        f"{package['name']} {package['version']}: {one['id']}, fixed in {', '.join(one['fix_versions']) or 'none'}"
        for package in packages
        for one in package.get("vulns", [])
    ]
    unasked = dict.fromkeys(package["skip_reason"] for package in packages if "skip_reason" in package)
    return Outcome(sum("vulns" in package for package in packages), tuple(found), tuple(unasked))


def audit(program: str, file: Path) -> Outcome:
    """Ask about one requirement file."""
    options = [
        "--require-hashes",
        "--disable-pip",
        "--vulnerability-service=osv",
        "--format=json",
        "--progress-spinner=off",
    ]
    run = subprocess.run([program, *options, "-r", str(file)], capture_output=True, text=True, check=False)
    try:
        return outcome(json.loads(run.stdout))
    except ValueError:
        last = run.stderr.strip().splitlines() or [f"pip-audit ended with {run.returncode}"]
        return Outcome(0, (), (last[-1],))


def main(arguments: Sequence[str]) -> int:
    """Tell what became of each file; the exit code of the worst."""
    program, *files = [argument for argument in arguments if argument != _GO_ON]
    codes = set()
    for file in files:
        one = audit(program, Path(file))
        codes.add(one.code)
        word = {0: "nothing known", 1: "VULNERABLE", NOT_AUDITED: "NOT AUDITED"}[one.code]
        print(f"{file}: {word}; {one.asked} packages asked about")
        for line in (*one.found, *one.unasked):
            print(f"  {line}")
    if 1 in codes:
        return 1
    return NOT_AUDITED if NOT_AUDITED in codes and _GO_ON not in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
