"""Runs systemd's own commands, and says in a sentence what they refused."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from madsci_registry._endpoint import environment
from madsci_registry.errors import UnavailableError, UnsupportedError
from madsci_registryctl.service.plan import Command, Scope, systemctl

BOOTED = Path("/run/systemd/system")
"""Is there where systemd is PID 1: sd_booted(3)."""
LINGER = Path("/var/lib/systemd/linger")
JOURNALS = (Path("/var/log/journal"), Path("/run/log/journal"))


def require(scope: Scope) -> None:
    """Raise UnsupportedError, which says why, where this host's or this user's systemd cannot be told anything."""
    if shutil.which("systemctl") is None:
        _refuse("systemctl is not here: this host has no systemd")
    if not BOOTED.is_dir():
        _refuse(f"systemd is installed here, but does not run (no {BOOTED})")
    if scope == "user":
        done = _run(systemctl("user", "show", "--property=Version"))
        if done.returncode != 0:
            _refuse(
                f"no systemd of user {user_name()} is reached ({_said(done)}); log in as that user, not by su or sudo, "
                f"or have it run without a login: sudo loginctl enable-linger {user_name()}"
            )


def _refuse(reason: str) -> None:
    raise UnsupportedError(f"{reason}. Nothing was changed; `install --print` shows what would be", reason=reason)


def run(command: Command, hint: str) -> None:
    """Run a command of systemd. Raises UnavailableError with what it said; `hint` is what a person can do."""
    try:
        done = _run(command)
    except FileNotFoundError:
        raise UnavailableError(f"{command[0]} is not installed", hint=hint) from None
    if done.returncode != 0:
        raise UnavailableError(f"`{shlex.join(command)}` failed: {_said(done)}", hint=hint)


def shown(scope: Scope, unit: str, what: str) -> str:
    """Return a property of a unit as text; empty where there is none."""
    return _run(systemctl(scope, "show", "--value", f"--property={what}", unit)).stdout.strip()


def started_at(pid: int) -> float:
    """Return when a process started, as seconds since 1970 by today's clock. Raises OSError: it is gone."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    ticks = int(stat.rpartition(")")[2].split()[19])  # field 22 of proc_pid_stat(5)
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime_s + ticks / os.sysconf("SC_CLK_TCK")


def user_name() -> str:
    """Return the name of this process's user; its uid where it has none."""
    with suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return str(os.geteuid())


def lingers() -> bool:
    """Tell whether this user's services run without a login. True too where that may not be seen."""
    try:
        return (LINGER / user_name()).exists()
    except OSError:
        return True


def may_read_journal() -> bool:
    """Tell whether this user may read any of the journal's files; True too where there is no journal."""
    hosts = [folder for journal in JOURNALS for folder in journal.glob("*")]
    return not hosts or any(os.access(file, os.R_OK) for folder in hosts for file in folder.glob("*.journal"))


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        env={**environment(), **_manager_of_user(), "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""},
        check=False,
    )


def _manager_of_user() -> dict[str, str]:
    # Where a login set nothing (cron, a plain ssh command), systemctl --user would look nowhere.
    runtime = Path(f"/run/user/{os.geteuid()}")
    return {} if "XDG_RUNTIME_DIR" in environment() or not runtime.is_dir() else {"XDG_RUNTIME_DIR": str(runtime)}


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
