"""Whether a hardened unit of the system, which runs as a user of its own, could run this program.

ProtectHome= and PrivateTmp= hide folders from it, and it has the rights of others on all files.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from madsci_registry.errors import UnsupportedError

PROGRAM = "madsci-registryd"
TRUSTED_UID = 0
"""Whose all of it has to be, as the system runs it: root."""
HIDDEN = {
    "/home": "ProtectHome= hides it",
    "/root": "ProtectHome= hides it",
    "/run/user": "ProtectHome= hides it",
    "/tmp": "PrivateTmp= hides it",
    "/var/tmp": "PrivateTmp= hides it",
}
"""Folders that a hardened unit does not see, and why (systemd.exec(5))."""


def program() -> Path:
    """Return the path of the daemon's program that was installed together with this one, its folders as installed.

    Raises:
        UnsupportedError: there is none (the packages were put on the path by hand).
    """
    try:
        for file in distribution("madsci-registryd").files or ():
            found = Path(os.path.normpath(str(file.locate())))
            if found.name == PROGRAM and found.parent.name == "bin" and found.exists():
                return found
    except PackageNotFoundError:
        pass
    reason = "madsci-registryd is not installed beside registryctl: pipx install madsci-registryd brings both"
    raise UnsupportedError(reason, reason=reason)


def installed_at() -> float:
    """Return when the running distribution was installed, as seconds since 1970; 0.0 where that is not known."""
    try:
        record = next(f for f in distribution("madsci-registryd").files or () if f.name == "RECORD")
        return Path(str(record.locate())).stat().st_mtime
    except (PackageNotFoundError, StopIteration, OSError):
        return 0.0


def parts(program: Path) -> list[Path]:
    """List all that has to be reached to run this program: itself, its interpreter, libraries and packages."""
    from importlib.util import find_spec

    packages = [spec.origin for name in ("madsci_registryd", "madsci_registry") if (spec := find_spec(name))]
    found = [program, Path(sys.executable), Path(os.__file__), *(Path(origin) for origin in packages if origin)]
    return list(dict.fromkeys(found))


def obstacles(paths: Sequence[Path]) -> list[str]:
    """Say what keeps a hardened unit from these paths, a sentence each; nothing: it reaches them."""
    ends = list(dict.fromkeys(end for path in paths for end in (*_links(path), Path(os.path.realpath(path)))))
    hidden = {folder: end for end in reversed(ends) for folder in HIDDEN if end.is_relative_to(folder)}
    closed = (sentence for end in ends if not any(map(end.is_relative_to, HIDDEN)) for sentence in _closed(end))
    return [*(f"{end} is in {folder}: {HIDDEN[folder]}" for folder, end in hidden.items()), *dict.fromkeys(closed)]


def _links(path: Path) -> Iterator[Path]:
    """Yield a path and each that its last part leads to, as a venv's python leads to another's."""
    for _ in range(40):  # MAXSYMLINKS of Linux
        yield path
        if not path.is_symlink():
            return
        path = Path(os.path.normpath(path.parent / path.readlink()))


def _closed(path: Path) -> Iterator[str]:
    for step in [*reversed(path.parents), path]:
        try:
            found = step.stat()
        except OSError as error:
            yield f"{step}: {error.strerror}"
            return
        mode, is_folder = stat.S_IMODE(found.st_mode), stat.S_ISDIR(found.st_mode)
        if found.st_uid != TRUSTED_UID:
            yield f"{step} belongs to uid {found.st_uid}, who could change it"
        needed = stat.S_IXOTH if is_folder else stat.S_IROTH
        if not mode & needed:
            yield f"{step} has mode {mode:04o}: other users may not {'enter' if is_folder else 'read'} it"
        writers = mode & (stat.S_IWOTH | (stat.S_IWGRP if found.st_gid else 0))
        if writers and not (is_folder and mode & stat.S_ISVTX):
            yield f"{step} has mode {mode:04o}: others than root may change it"
