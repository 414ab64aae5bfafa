"""An environment with the real MADSci, from the package index, and our wheel, built from this checkout.

It is kept in `.venv/madsci-*` for the next run; the wheel is installed anew when a source has changed. Nothing of the
checkout is on its path, so the wheel and its .pth are what is tested.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pwd
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers import PROJECT

# MADSci 0.8.1's node does not start with pydantic 2.14.
REQUIREMENTS = ("madsci-client", "madsci-node-module", "madsci-squid", "pydantic<2.14", "pytest")
INSTALL_S = 300


@contextmanager
def real_madsci() -> Iterator[Path]:
    """Yield the folder of the programs in an environment with MADSci and our wheel; nobody changes it meanwhile."""
    ours = [line for line in (PROJECT / "pyproject.toml").read_text().splitlines() if re.match(r' +"[\w-]+>=', line)]
    key = hashlib.sha256("\n".join([sys.version, *REQUIREMENTS, *ours]).encode()).hexdigest()[:12]
    folder = PROJECT / ".venv" / f"madsci-{key}"
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not _is_current(folder):
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_current(folder):
                _install(folder)
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield folder / "bin"


def _is_current(folder: Path) -> bool:
    stamp = folder / "sources"
    return stamp.exists() and stamp.read_text() == _sources()


def _sources() -> str:
    files = [
        f
        for part in ("client", "daemon", "lab")
        for f in (PROJECT / part).rglob("*")
        if f.suffix in (".py", ".pth", ".sql")
    ]
    digest = hashlib.sha256()
    for file in sorted([*files, PROJECT / "schema.sql", PROJECT / "pyproject.toml"]):
        digest.update(f"{file.relative_to(PROJECT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _install(folder: Path) -> None:
    sources, is_new = _sources(), not (folder / "sources").exists()
    out = folder.with_suffix(".wheel")
    shutil.rmtree(out, ignore_errors=True)
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(PROJECT))
    wheel = str(next(out.glob("*.whl")))
    if is_new:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        _pip(folder, wheel, *REQUIREMENTS)
    else:
        _pip(folder, "--no-deps", "--force-reinstall", wheel)
    shutil.rmtree(out)
    (folder / "sources").write_text(sources)


def _pip(folder: Path, *what: str) -> None:
    done = _try(str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *what)
    if (
        done.returncode
        and not os.environ.get("CI")
        and re.search("No matching distribution|NewConnection", done.stderr)
    ):
        pytest.skip(f"no package index: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def _run(*command: str) -> None:
    done = _try(*command)
    assert done.returncode == 0, done.stdout + done.stderr


def _try(*command: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MADSCI_"))}
    env["HOME"] = pwd.getpwuid(os.getuid()).pw_dir  # pip's configuration and cache
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=INSTALL_S, check=False)
