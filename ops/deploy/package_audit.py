"""Audit the pinned packages: ``python -m ops.deploy.package_audit PIP_AUDIT FILE..`` lists their known vulnerabilities.

pip-audit also exits with 0 if it could look up nothing. This command reports packages that were not looked up, and
fails.
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
_ALLOW_UNAUDITED = "--allow-unaudited"
"""Exit with 0 if some packages could not be looked up and no vulnerability was found: for machines without network."""


@dataclass(frozen=True, slots=True)
class AuditResult:
    """Audit of one requirements file."""

    audited: int
    """Packages that were looked up."""
    vulnerabilities: tuple[str, ...]
    """With package and fixed versions."""
    skip_reasons: tuple[str, ...]
    """Why packages were not looked up; each reason once."""

    @property
    def code(self) -> int:
        """Exit code."""
        return 1 if self.vulnerabilities else NOT_AUDITED if self.skip_reasons or not self.audited else 0


def parse_report(report: Any) -> AuditResult:
    """Parse a JSON report of pip-audit."""
    packages = report["dependencies"]
    found = [
        f"{package['name']} {package['version']}: {one['id']}, fixed in {', '.join(one['fix_versions']) or 'none'}"
        for package in packages
        for one in package.get("vulns", [])
    ]
    skip_reasons = dict.fromkeys(package["skip_reason"] for package in packages if "skip_reason" in package)
    return AuditResult(sum("vulns" in package for package in packages), tuple(found), tuple(skip_reasons))


def audit(program: str, file: Path) -> AuditResult:
    """Audit one requirements file."""
    options = [
        "--require-hashes",
        "--disable-pip",
        "--vulnerability-service=osv",
        "--format=json",
        "--progress-spinner=off",
    ]
    run = subprocess.run([program, *options, "-r", str(file)], capture_output=True, text=True, check=False)
    try:
        return parse_report(json.loads(run.stdout))
    except ValueError:
        last = run.stderr.strip().splitlines() or [f"pip-audit ended with {run.returncode}"]
        return AuditResult(0, (), (last[-1],))


def main(arguments: Sequence[str]) -> int:
    """Print the result of each file; return the exit code of the worst."""
    program, *files = [argument for argument in arguments if argument != _ALLOW_UNAUDITED]
    codes = set()
    for file in files:
        one = audit(program, Path(file))
        codes.add(one.code)
        word = {0: "no known vulnerabilities", 1: "VULNERABLE", NOT_AUDITED: "NOT AUDITED"}[one.code]
        print(f"{file}: {word}; {one.audited} packages audited")
        for line in (*one.vulnerabilities, *one.skip_reasons):
            print(f"  {line}")
    if 1 in codes:
        return 1
    return NOT_AUDITED if NOT_AUDITED in codes and _ALLOW_UNAUDITED not in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
