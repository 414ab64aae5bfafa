"""Runs registryctl as a process, as a person would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers import PATIENCE_S


class Ctl:
    """registryctl on one registry."""

    def __init__(self, registry: Path) -> None:
        self.registry = registry

    def words(self, *arguments: str | Path) -> list[str]:
        """Return the command line."""
        return [sys.executable, "-m", "madsci_registryctl", "--registry", str(self.registry), *map(str, arguments)]

    def __call__(self, *arguments: str | Path, status: int = 0, stdin: str = "") -> str:
        """Run it, check its exit status and return its stdout."""
        return self.run(*arguments, status=status, stdin=stdin).stdout

    def run(self, *arguments: str | Path, status: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run it and check its exit status."""
        done = subprocess.run(
            self.words(*arguments), input=stdin, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == status, f"{arguments}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str | Path, status: int = 0, stdin: str = "") -> Any:
        """Run it with --json and return what it printed."""
        return json.loads(self("--json", *arguments, status=status, stdin=stdin))

    def error(self, *arguments: str | Path, status: int, stdin: str = "") -> dict[str, Any]:
        """Run it with --json and return the error that it printed."""
        answer = self.json(*arguments, status=status, stdin=stdin)
        assert list(answer) == ["error"]
        error: dict[str, Any] = answer["error"]
        return error

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Begin it; its stdin, stdout and stderr are pipes."""
        pipe = subprocess.PIPE
        return subprocess.Popen(self.words(*arguments), stdin=pipe, stdout=pipe, stderr=pipe, text=True)
