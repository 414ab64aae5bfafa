"""What `doctor` checks of the sockets: their folder, their modes, their paths, and who listens where none answers."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from madsci_registryctl.doctor import probes
from madsci_registryctl.doctor.case import AS_OWNER, Case, exists
from madsci_registryctl.doctor.findings import Finding

SOCKET_PATH_MAX_BYTES = 107
"""What sun_path holds (unix(7)), without its final NUL."""


def socket_folder(case: Case) -> list[Finding]:
    """Whether the folder of the sockets is there, whose it is, and who else may write to it."""
    folder = case.endpoint.socket.parent
    try:
        found = folder.stat()
    except FileNotFoundError:
        return [Finding("ok", "socket folder", f"{folder} is not there yet; the daemon makes it")]
    if not stat.S_ISDIR(found.st_mode):
        return [Finding("error", "socket folder", f"{folder} is no folder", "move it away")]
    owner = [*_owner_findings(case, folder, found.st_uid), *_above(case, folder)]
    return [*owner, *_folder_mode(case.endpoint.socket, found)] or [
        Finding("ok", "socket folder", f"{folder}, mode {stat.S_IMODE(found.st_mode):04o}")
    ]


def _owner_findings(case: Case, folder: Path, owner: int) -> Iterator[Finding]:
    me = os.geteuid()
    if me not in (0, owner) and case.status is None:  # else the daemon's settings let us in
        yield Finding("error", "socket folder", f"{folder} belongs to uid {owner}, not to you (uid {me})", AS_OWNER)
    if case.status and case.status["uid"] != owner and owner != 0:
        found = (
            f"{folder} belongs to uid {owner}, who can replace the sockets; the daemon is uid {case.status['uid']}'s"
        )
        yield Finding("warning", "socket folder", found, f"run the daemon as uid {owner}, or chown the folder")


def _folder_mode(socket: Path, found: os.stat_result) -> Iterator[Finding]:
    folder, mode = socket.parent, stat.S_IMODE(found.st_mode)
    if mode & stat.S_ISVTX and mode & 0o022:
        said = f"{folder} has mode {mode:04o}: anybody may put a socket there first"
        yield Finding("warning", "socket folder", said, "use a --socket in a folder of mode 0700")
    elif mode & 0o022:
        said = f"{folder} has mode {mode:04o}: others may replace its sockets"
        yield Finding("error", "socket folder", said, f"chmod 700 {folder}")
    elif mode & 0o055 and not _is_open(socket):
        said = f"{folder} has mode {mode:04o}: others may look into it, though not use a socket of mode 0600"
        yield Finding("note", "socket folder", said, f"chmod 700 {folder}")


def _is_open(socket: Path) -> bool:
    """Tell whether the daemon's setting `access` lets in others than its own user."""
    try:
        return bool(stat.S_IMODE(socket.stat().st_mode) & 0o066)
    except OSError:
        return False


def _above(case: Case, folder: Path) -> Iterator[Finding]:
    """Who may write to the registry's folder may replace run/ and the database."""
    above = case.endpoint.registry.parent if case.endpoint.registry else None
    if above is None or above == folder or not exists(above):
        return
    found = above.stat()
    mode = stat.S_IMODE(found.st_mode)
    # Many systems give each user a group of its own with the same number, and a umask that lets it write.
    others = 0o002 if found.st_gid == found.st_uid else 0o022
    if mode & others and not mode & stat.S_ISVTX:
        said = f"{above} has mode {mode:04o}: others may replace the database and run/"
        yield Finding("warning", "socket folder", said, f"chmod go-w {above}")


def sockets(case: Case) -> list[Finding]:
    """Whether the sockets are there and whose they are; where no daemon answered, what stands in their place."""
    paths = (case.endpoint.socket, case.endpoint.lifeline)
    if case.status:
        answer = f"{paths[0].name} and {paths[1].name} answer"
        access, allowed = case.status.get("access", "owner"), case.status.get("allow_uids", [])
        if access != "owner" or allowed:
            others = f" and uids {', '.join(map(str, allowed))}" if allowed else ""
            return [Finding("ok", "sockets", f"{answer}; the settings let in {access}{others}")]
        open_ones = [path for path in paths if _mode(path) & 0o022]
        if not open_ones:
            return [Finding("ok", "sockets", f"{answer}; only their owner may use them")]
        return [
            Finding("error", "sockets", f"{path} has mode {_mode(path):04o}: others may use it", f"chmod 600 {path}")
            for path in open_ones
        ]
    states = {path: probes.listener(path) for path in paths}
    if all(found.state == "missing" for found in states.values()):
        return [Finding("ok", "sockets", "none is there, as no daemon serves")] if case.is_unserved else []
    is_one_alone = any(found.state == "listening" for found in states.values())
    return [
        finding
        for path, found in states.items()
        if found.state != "missing" or is_one_alone
        for finding in _silent_socket(case, path, found)
    ]


def _silent_socket(case: Case, path: Path, found: probes.Listener) -> Iterator[Finding]:
    if found.state == "dead":
        yield Finding("note", "sockets", f"{path} was left by a daemon that died; the next one replaces it")
    elif found.state == "no socket":
        yield Finding("error", "sockets", f"{path} is no socket: no daemon can listen there", f"move {path} away")
    elif found.state == "missing":
        yield Finding("error", "sockets", f"{path} is missing", "a daemon that serves makes it again within a second")
    elif case.is_unserved:
        who = f"pid {found.pid}" if found.pid else "a process that is not visible here"
        fix = "look at that process; a daemon has both of its sockets"
        yield Finding("error", "sockets", f"{who} listens at {path}, and is no daemon that answers", fix)


def socket_paths(case: Case) -> list[Finding]:
    """Whether the sockets' paths fit a socket address."""
    longest = max(len(os.fsencode(path)) for path in (case.endpoint.socket, case.endpoint.lifeline))
    if longest <= SOCKET_PATH_MAX_BYTES:
        return []
    found = f"{longest} bytes long, {SOCKET_PATH_MAX_BYTES} fit a socket address: they are reached through procfs"
    fix = "programs in other languages have to do that too (docs/protocol.md), or use a shorter --socket"
    return [Finding("note", "socket paths", found, fix)]


def other_daemon(case: Case) -> list[Finding]:
    """Where none serves here: whether a daemon serves the database at another socket."""
    database = case.endpoint.database
    if database is None or not case.is_unserved:
        return []
    lock = database.with_name(f"{database.name}.lock")
    pid = probes.flock_holder(lock)
    if pid is None:
        return []
    found = f"pid {pid} serves {database}, but not at {case.endpoint.socket}"
    noted = _noted_socket(lock)
    fix = f"for clients: MADSCI_REGISTRY_SOCKET={noted}" if noted else f"find out what pid {pid} is, and end it"
    return [Finding("error", "daemon", found, fix)]


def _noted_socket(lock: Path) -> str | None:
    with suppress(OSError, ValueError):
        notes = json.loads(lock.read_bytes())
        return str(notes["socket"]) if isinstance(notes, dict) and notes.get("socket") else None
    return None


def _mode(path: Path) -> int:
    with suppress(OSError):  # a daemon that serves makes a missing one again
        return stat.S_IMODE(path.stat().st_mode)
    return 0
