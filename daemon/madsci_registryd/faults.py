"""Why a daemon does not start or goes on, with the exit status of each: one table, shown in docs/operations.md.

The numbers are those of sysexits.h where it has one that fits.
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar

from madsci_registry import errors


class StartFault(Exception):
    """The daemon cannot serve; nothing was overwritten. `error` is what a client is told."""

    status: ClassVar[int] = 71
    error_class: ClassVar[type[errors.RegistryError]] = errors.UnavailableError

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.error = self.error_class(message, path=path)


class CorruptDatabase(StartFault):
    """The database is damaged."""

    status = 65
    error_class = errors.CorruptError


class NotOurDatabase(CorruptDatabase):
    """The database is another program's, newer than this program, or open elsewhere: nothing is wrong with it."""


class AlreadyServed(StartFault):
    """Another daemon serves this registry."""

    status = 69


class CannotCreate(StartFault):
    """A folder or file cannot be made or written."""

    status = 73
    error_class = errors.PermissionDeniedError


class DiskFull(StartFault):
    """No space to start with."""

    status = 75
    error_class = errors.NoSpaceError


class NoPermission(StartFault):
    """The user may not use the folder or the database."""

    status = 77
    error_class = errors.PermissionDeniedError


class BadConfiguration(StartFault):
    """A setting, or a file system that cannot hold the database."""

    status = 78
    error_class = errors.UnsupportedError


class StorageFault(Exception):
    """An I/O error: what was being committed may or may not be on disk. The daemon answers nothing more and exits."""

    status: ClassVar[int] = 74


def os_fault(error: OSError, what: str) -> StartFault:
    """Say what an operating system's error at start means to a person."""
    message = f"{what}: {error.strerror}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return NoPermission(f"{message} (uid {os.geteuid()})", path=error.filename)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(message, path=error.filename)
    return CannotCreate(message, path=error.filename)
