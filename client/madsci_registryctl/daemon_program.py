"""Runs the daemon's own program for what is done to a registry that nobody serves: `verify`, `rollback`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Exit statuses of madsci-registryd, see docs/operations.md.
DAMAGED = 65
"""The database, or registry.json, is damaged."""
SERVED = 69
"""A daemon serves the registry."""


def run(registry: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run `madsci-registryd --registry REGISTRY COMMAND` and return its exit status and what it printed."""
    from madsci_registry._autostart import clean_environment
    from madsci_registry._endpoint import environment

    return subprocess.run(
        [sys.executable, "-m", "madsci_registryd", "--registry", str(registry), command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        cwd="/",
        env=clean_environment(environment()),
        check=False,
    )
