"""The exit statuses of registryctl, in one table."""

from __future__ import annotations

import errno

from madsci_registry.errors import (
    NoSpaceError,
    PermissionDeniedError,
    RegistryError,
    UnsupportedError,
)

OK = 0
OTHER = 1
USAGE = 2
NOT_FOUND = 3
HELD = 4
TIMEOUT = 5
UNREACHABLE = 6
PERMISSION = 7
CONFLICT = 8
PROTOCOL = 9
INVALID = 10
ERRORS_FOUND = 11
"""`doctor` only: it did its work, and what it looked at has errors."""
LOCK_LOST = 123
"""`run` only: the lock was lost while the command ran."""
LOCK_NOT_GOT = 125
"""`run` only: the command was not started. 123 to 127 and 128 + n are what env, timeout and the shells use."""
NOT_EXECUTABLE = 126
COMMAND_NOT_FOUND = 127
INTERRUPTED = 130

BY_CODE = {
    "held": HELD,
    "not_found": NOT_FOUND,
    "name_taken": CONFLICT,
    "wrong_type": CONFLICT,
    "conflict": CONFLICT,
    "invalid": INVALID,
    "too_large": INVALID,
    "corrupt": INVALID,
    "permission_denied": PERMISSION,
    "timeout": TIMEOUT,
    "unknown_outcome": TIMEOUT,
    "unavailable": UNREACHABLE,
    "protocol_version": PROTOCOL,
    "quota": OTHER,
    "session_required": OTHER,
    "unsupported": OTHER,
    "stale_epoch": OTHER,
    "lock_lost": OTHER,
    "waiting": OTHER,
    "busy": OTHER,
    "no_space": OTHER,
    "lab_unavailable": OTHER,
    "compacted": OTHER,
    "internal": OTHER,
}
"""Every code of `madsci_registry.errors`."""

HELP = (
    "Exit status: 0 ok; 1 other; 2 usage; 3 not found; 4 held; 5 timeout; 6 daemon not reachable; 7 permission; "
    "8 conflict (name taken, wrong type, id); 9 protocol versions; 10 invalid or corrupt input; "
    "doctor: 11 errors found; run: the command's own, 125 lock not got, 123 lock lost."
)


def status_of(error: RegistryError) -> int:
    """Return the exit status of an error."""
    return BY_CODE.get(error.code, OTHER)


def of_os_error(error: OSError) -> RegistryError:
    """Name what the system refused (a file that cannot be written, a full disk) as an error of the registry."""
    path = None if error.filename is None else str(error.filename)
    message = f"{path}: {error.strerror}" if path else str(error)
    if isinstance(error, PermissionError):
        return PermissionDeniedError(message, path=path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(message, path=path)
    return UnsupportedError(message, reason=errno.errorcode.get(error.errno or 0, "unknown"))
