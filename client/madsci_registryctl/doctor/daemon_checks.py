"""What `doctor` checks of the daemon and its clients: whether it answers, versions, age, who is known how surely."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madsci_registry.errors import (
    PermissionDeniedError,
    ProtocolVersionError,
    RegistryTimeoutError,
)
from madsci_registryctl.doctor import probes
from madsci_registryctl.doctor.case import AS_OWNER, Case
from madsci_registryctl.doctor.findings import Finding, Level
from madsci_registryctl.render import hint_of, whole_seconds

if TYPE_CHECKING:
    from madsci_registry.types import SessionInfo

RESTART = "registryctl stop, and start it again: locks stay with their holders"
DISTRIBUTION = "madsci-registryd"
_PROOFS = ("connection", "pid", "pidfd")
"""From the least sure to the surest."""
_SHOWN = 5
"""So many processes are named in one finding."""


def daemon(case: Case) -> list[Finding]:
    """Whether a daemon answers, and since when; else why not, and whether a client may start one."""
    if case.status:
        s = case.status
        age = f"up for {_span(_age_s(s['started_at']))}, since {whole_seconds(s['started_at'])}"
        found = f"{s['version']}, pid {s['pid']} of uid {s['uid']}, {age}"
        return [Finding("ok", "daemon", found)]
    assert case.error is not None, "there is a status, or why there is none"
    if case.is_unserved:
        return _absent(case)
    if isinstance(case.error, RegistryTimeoutError):
        return [_silent(case)]
    if isinstance(case.error, PermissionDeniedError):
        return [Finding("error", "daemon", case.error.message, AS_OWNER)]
    if isinstance(case.error, ProtocolVersionError):
        return [Finding("error", "daemon", case.error.message, f"use the same package on both sides: {RESTART}")]
    return [Finding("error", "daemon", case.error.message, hint_of(case.error))]


def _absent(case: Case) -> list[Finding]:
    from madsci_registry._autostart import hint, refusal

    why_not = refusal(case.endpoint)
    if why_not is None:
        return [Finding("note", "daemon", "none serves; the next client that needs one starts it")]
    return [Finding("warning", "daemon", f"none serves, and no client may start one: {why_not}", hint(case.endpoint))]


def _silent(case: Case) -> Finding:
    """Tell a daemon that hangs from one that is stopped, by what the kernel says of it."""
    assert case.error is not None
    pid = probes.listener(case.endpoint.lifeline).pid
    state = probes.process_state(pid) if pid else None
    if pid is None or state is None:
        fix = "look at it in the container or namespace in which it runs"
        return Finding("error", "daemon", f"{case.error.message}; it is not visible from here", fix)
    if state in "Tt":
        fix = f"kill -CONT {pid}, or end the debugger that stops it"
        return Finding("error", "daemon", f"pid {pid} does not answer: it is stopped", fix)
    if state == "D":
        fix = "look at the disk and the kernel log"
        return Finding("error", "daemon", f"pid {pid} does not answer: it waits for the disk", fix)
    end = f"kill -KILL {pid}"
    if pid == 1:  # systemd listens in its place, or it is the first process of a container
        end = "restart it by what started it (systemctl restart madsci-registryd, docker restart)"
    fix = f"ask again with a longer --timeout; if that does not help, {end}: locks stay with their holders"
    return Finding("error", "daemon", f"pid {pid} does not answer (it is in state {state})", fix)


def versions(case: Case) -> list[Finding]:
    """Whether the daemon is the one that is installed here, and speaks the protocol of this program."""
    from madsci_registry.protocol import PROTOCOL_VERSION

    if case.status is None:
        return []
    findings = []
    with suppress(PackageNotFoundError):
        installed, serves = version(DISTRIBUTION), case.status["version"]
        if installed != serves:
            fix = f"let the newer of the two serve: {RESTART}"
            findings.append(Finding("warning", "version", f"the daemon is {serves}, installed is {installed}", fix))
    spoken = case.status["protocol_version"]
    if spoken != PROTOCOL_VERSION:
        found = f"the daemon speaks protocol {spoken}, this program {PROTOCOL_VERSION}"
        findings.append(Finding("warning", "version", found, RESTART))
    return findings or [Finding("ok", "version", f"{case.status['version']} as installed, protocol {spoken}")]


def program(case: Case) -> list[Finding]:
    """Whether the daemon's program was replaced after it started, so that old code runs under the same version."""
    if case.status is None or not _runs_our_python(case.status["pid"]):
        return []
    changed_at = _installed_at()
    if changed_at is None or changed_at <= time.time() - _age_s(case.status["started_at"]):
        return []
    found = (
        f"its files were changed {_span(time.time() - changed_at)} ago, after the daemon started: it runs older code"
    )
    return [Finding("warning", "program", found, RESTART)]


def _runs_our_python(pid: int) -> bool:
    """Tell whether a process is of this very environment; another one's files say nothing about it."""
    with suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "surrogateescape").split("\0")
        return Path(line[0]).parent == Path(sys.executable).parent and any("registryd" in word for word in line)
    return False


def _installed_at() -> float | None:
    spec = find_spec("madsci_registryd")
    if spec is None or not spec.origin:
        return None
    with suppress(OSError):
        return max(file.stat().st_mtime for file in Path(spec.origin).parent.glob("*.py"))
    return None


def degraded(case: Case) -> list[Finding]:
    """What the daemon itself says is not as it should be; how surely holders are known is a check of its own."""
    said = case.status["degraded"] if case.status else []
    fix = 'see "When something is wrong" in docs/operations.md'
    others = [line for line in said if not line.startswith(("holders are proven", "registry.json"))]
    return [Finding("warning", "degraded", line, fix) for line in others]


def registry_json(case: Case) -> list[Finding]:
    """Whether registry.json is kept for old programs, which of them still write it, and what of that was refused."""
    if case.status is None or "export" not in case.status:
        return []
    export = case.status["export"]
    if export["state"] == "off":
        found = "not kept (export is off): an old program that uses it can hold what a new one holds"
        return [Finding("note", "registry.json", found)]
    findings = [_file_state(export)]
    if export["old_programs"]:
        shown = ", ".join(f"pid {o['pid']} on {o['host']}" for o in export["old_programs"][-_SHOWN:])
        fix = "registryctl dropin -- CMD..., or MADSCI_REGISTRY_DROPIN=1, has MADSci use the daemon"
        findings.append(Finding("note", "registry.json", f"old programs still write it: {shown}", fix))
    if export["refused"]:
        found = f"{_count(export['refused'], 'change')} by old programs refused since the daemon started"
        findings.append(Finding("warning", "registry.json", found, "registryctl history has each as `refused`"))
    if export["put_aside"]:
        found = f"it was not whole, and was put aside as {export['put_aside']}"
        findings.append(Finding("warning", "registry.json", found, "an old program was killed while it wrote it"))
    return findings


def _file_state(export: dict[str, Any]) -> Finding:
    if export["state"] == "on" and not export["busy"]:
        return Finding("ok", "registry.json", f"kept for old programs; {_count(export['claims'], 'name')} claimed")
    if export["state"] == "on":
        found = "locked by an old program for longer than 2 s: new names have to wait"
        return Finding("warning", "registry.json", found, "an old program that is stopped? `fuser` on its .lock file")
    level: Level = "error" if export["state"] == "stopped" else "warning"
    meant = "old programs are not kept apart from new ones" if level == "error" else "new names are refused"
    return Finding(level, "registry.json", f"{export['fault']}; {meant}", "remove or repair what the message names")


def clients(case: Case) -> list[Finding]:
    """Who is connected, who speaks an older protocol, and whose death is not noticed at once."""
    if case.status is None:
        return []
    others = [session for session in case.sessions if session.pid != os.getpid()]
    held = case.status["held"]
    return [
        Finding("ok", "clients", f"{_count(len(others), 'process')}; {_count(held, 'name')} held"),
        *_older(case, others),
        *_not_back(others),
        *_less_sure(case, others),
    ]


def _older(case: Case, others: list[SessionInfo]) -> Iterator[Finding]:
    """A daemon accepts its own protocol and the one before, so the next upgrade of it would shut these out."""
    assert case.status is not None
    newest = case.status["protocol_version"]
    older = [s for s in others if s.protocol_version is not None and s.protocol_version < newest]
    if older:
        spoken = ", ".join(
            str(v) for v in sorted({s.protocol_version for s in older if s.protocol_version is not None})
        )
        found = f"{_named(older)}: protocol {spoken}, the daemon speaks {newest}; a newer daemon may refuse it"
        yield Finding("warning", "clients", found, "restart these programs with the package that is installed now")


def _not_back(others: list[SessionInfo]) -> Iterator[Finding]:
    away = [s for s in others if not s.attached and s.held]
    if away:
        found = f"{_named(away)}: not connected since the daemon's restart, what it holds is kept"
        yield Finding("note", "clients", found, "a stopped or hung program; if it should not hold, end it")


def _less_sure(case: Case, others: list[SessionInfo]) -> Iterator[Finding]:
    """Those that the daemon knows less surely than it could, as in another PID namespace."""
    assert case.status is not None
    best = _PROOFS.index(case.status["proof"])
    by_connection = [s for s in others if s.proof == "connection" and s.held]
    if by_connection:
        found = f"{_named(by_connection)}: known by connection alone; its names are free 2 s after its death"
        yield Finding("note", "clients", f"{found}, and it has 10 s to come back after a restart of the daemon")
    unseen = [s for s in others if s.proof != "connection" and s.pid is None and s.held]
    if unseen:
        found = f"{_named(unseen)}: in another PID namespace; it has 10 s to come back after a restart of the daemon"
        yield Finding("note", "clients", found)
    lower = [s for s in others if _PROOFS.index(s.proof) < best and s not in by_connection]
    if lower:
        found = f"{_named(lower)}: known by {' and '.join(sorted({s.proof for s in lower}))} only"
        yield Finding("note", "clients", f"{found}, less surely than the daemon's own {case.status['proof']}")


def _named(sessions: list[SessionInfo]) -> str:
    shown = [session.label for session in sessions[:_SHOWN]]
    more = len(sessions) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _count(number: int, what: str) -> str:
    plural = what if number == 1 else f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number} {plural}"


def _age_s(started_at: str) -> float:
    began = datetime.fromisoformat(started_at.replace("Z", "+00:00"))  # Python 3.10 does not know the Z
    return max(0.0, time.time() - began.timestamp())


def _span(seconds: float) -> str:
    """Say a duration for people, in its largest unit."""
    for unit, length_s in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"
