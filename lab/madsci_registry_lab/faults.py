"""Why a lab registry does not start or goes on, with its exit status (sysexits.h); shown in docs/lab.md."""

from __future__ import annotations

DAMAGED = 65
IN_USE = 69
CANNOT_CREATE = 73
IO_ERROR = 74
DISK_FULL = 75
BAD_CONFIGURATION = 78


class Fault(Exception):
    """The lab registry cannot serve; `status` is the exit status. Nothing was overwritten."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
