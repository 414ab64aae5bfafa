"""What `doctor` checks of the registry's files and of the host: kernel, database, file system, disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from madsci_registry.types import Proof
from madsci_registryctl.doctor import probes
from madsci_registryctl.doctor.case import AS_OWNER, Case, exists
from madsci_registryctl.doctor.findings import Finding

WAL_MAX_BYTES = 16 << 20
"""What the write-ahead log stays below: it is checkpointed from 4 MiB on (wal_autocheckpoint of the daemon), and one
large import comes on top. With less than that free, even a release may be refused."""
LITTLE_SPACE_BYTES = 256 << 20
"""Room for the write-ahead log, a copy before an upgrade, and a log that is never cut."""

FOREIGN_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "glusterfs", "lustre", "afs")
"""Those that the daemon refuses, besides every fuse; a test holds them against its own list."""
PASSING_FILE_SYSTEMS = {
    "overlay": "it goes when the container is removed",
    "tmpfs": "it is gone after a reboot",
    "ramfs": "it is gone after a reboot",
}

_PROOF_MEANS: Mapping[Proof, str] = {
    "pidfd": "every holder is known by a pidfd of its process",
    "pid": "holders are known by pid and start time; a process in another PID namespace (a container) by its "
    "connection alone, so that its name is free 2 s after its death instead of at once",
    "connection": "holders are known by their connection alone: a name is free 2 s after its holder's death instead "
    "of at once, and a holder has 10 s to come back after a restart of the daemon",
}


def registry(case: Case) -> list[Finding]:
    """Which registry it is and why; whether the daemon serves that one."""
    endpoint = case.endpoint
    if endpoint.registry is None:
        return [Finding("ok", "registry", f"only the socket {endpoint.socket} is known ({endpoint.reason})")]
    with suppress(FileNotFoundError, NotADirectoryError):
        endpoint.registry.stat()  # since Python 3.12 exists() says no of what may not be seen
    found = f"{endpoint.registry} ({endpoint.reason})"
    served = case.status["registry"] if case.status else str(endpoint.registry)
    # A daemon in a container has other names for the same files: only one whose database is seen here is another one.
    if served != str(endpoint.registry) and case.status and exists(Path(case.status["database"])):
        fix = "name the registry or the socket, not both; registryctl where says what is chosen"
        return [Finding("error", "registry", f"{found}, but the daemon at this socket serves {served}", fix)]
    if case.status is None and not endpoint.exists():
        return [Finding("note", "registry", f"{found}; there is none yet, the first resolve makes it")]
    return [Finding("ok", "registry", found)]


def proof(case: Case) -> list[Finding]:
    """How surely a daemon knows that a holder lives: by its own word, else by what the kernel gives."""
    tier: Proof = case.status["proof"] if case.status else probes.kernel_proof()
    found = f"{tier}: {_PROOF_MEANS[tier]} (Linux {os.uname().release})"
    if tier == "pidfd":
        return [Finding("ok", "proof of life", found)]
    fix = "Linux 6.5 or later gives pidfd"
    if case.status and probes.kernel_proof() == "pidfd":
        fix = "this kernel gives pidfd: drop MADSCI_REGISTRYD_PROOF, or proof, from the daemon's settings"
    return [Finding("warning", "proof of life", found, fix)]


def database(case: Case) -> list[Finding]:
    """Whether the database is there, whose it is, and how large it and its write-ahead log are."""
    path = case.database
    if path is None:
        return []
    try:
        found = path.stat()
    except FileNotFoundError:
        return []
    if not stat.S_ISREG(found.st_mode):
        return [Finding("error", "database", f"{path} is no file", "move it away")]
    wal_bytes = _size_bytes(path.with_name(f"{path.name}-wal"))
    faults = [*_database_rights(path, found)]
    if wal_bytes > WAL_MAX_BYTES:
        fix = "close whatever else has the database open: an outside reader keeps the log from being checkpointed"
        faults.append(Finding("warning", "database", f"{path}-wal has {in_bytes(wal_bytes)}", fix))
    size = f"{in_bytes(found.st_size)}, and {in_bytes(wal_bytes)} of write-ahead log"
    return faults or [Finding("ok", "database", f"{path}, {size}")]


def _database_rights(path: Path, found: os.stat_result) -> Iterator[Finding]:
    me, mode = os.geteuid(), stat.S_IMODE(found.st_mode)
    if me not in (0, found.st_uid):
        yield Finding("error", "database", f"{path} belongs to uid {found.st_uid}, not to you (uid {me})", AS_OWNER)
    if mode & 0o022:
        yield Finding("error", "database", f"{path} has mode {mode:04o}: others may change it", f"chmod 600 {path}")
    elif mode & 0o044:
        yield Finding("note", "database", f"{path} has mode {mode:04o}: others may read it", f"chmod 600 {path}")


def container(case: Case) -> list[Finding]:
    """In a container: whether the registry's folder is mounted, so that other containers see the same registry."""
    from madsci_registry import containers
    from madsci_registry._autostart import lone_folder, mount_hint
    from madsci_registry._endpoint import environment

    if not containers.is_container(environment()):
        return []
    alone = lone_folder(case.endpoint)
    if alone:
        found = f"{alone}: each container would have a registry of its own"
        return [Finding("warning", "container", found, mount_hint(case.endpoint))]
    return [Finding("ok", "container", "the registry's folder is mounted, so that other containers may have it too")]


def file_system(case: Case) -> list[Finding]:
    """Whether the database's file system can hold it, and keeps it."""
    folder = _database_folder(case)
    if folder is None:
        return []
    kind = probes.file_system(folder)
    if kind in FOREIGN_FILE_SYSTEMS or kind.startswith("fuse"):
        found = f"{folder} is on {kind}, where SQLite's locks do not hold: no daemon starts there"
        return [Finding("error", "file system", found, _elsewhere(case, folder))]
    if kind in PASSING_FILE_SYSTEMS:
        found = f"{folder} is on {kind}: {PASSING_FILE_SYSTEMS[kind]}, and every identity with it"
        return [Finding("warning", "file system", found, "keep the registry on a disk or a mounted volume")]
    return [Finding("ok", "file system", f"{folder} is on {kind}")]


def _elsewhere(case: Case, folder: Path) -> str:
    registry = case.endpoint.registry or folder / "registry.json"
    stem = registry.name.removesuffix(".json")
    return (
        f"madsci-registryd --registry {registry} --state-dir /var/tmp/madsci-registry, and for the clients "
        f"MADSCI_REGISTRY_SOCKET=/var/tmp/madsci-registry/run/{stem}.sock"
    )


def disk_space(case: Case) -> list[Finding]:
    """Whether the database may be written, and has room to grow."""
    folder = _database_folder(case)
    if folder is None:
        return []
    left = probes.space(folder)
    if left.is_read_only:
        return [Finding("error", "disk space", f"{folder} is on a read-only file system", "mount it writable")]
    if left.free_inodes == 0:
        return [Finding("error", "disk space", f"no more files can be made in {folder} (no inodes)", "remove files")]
    found = f"{in_bytes(left.free_bytes)} free for {folder}"
    if left.free_bytes < WAL_MAX_BYTES:
        return [Finding("error", "disk space", f"{found}: changes will be refused (no_space)", "make room")]
    if left.free_bytes < LITTLE_SPACE_BYTES:
        return [Finding("warning", "disk space", found, "make room before changes are refused")]
    return [Finding("ok", "disk space", found)]


def _database_folder(case: Case) -> Path | None:
    return None if case.database is None else probes.nearest_folder(case.database.parent)


def in_bytes(count: int) -> str:
    """Say a number of bytes for people."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}"


def _size_bytes(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
