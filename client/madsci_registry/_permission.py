"""What to say where file modes keep a program from its daemon."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from madsci_registry.errors import PermissionDeniedError


def closed_to_you(socket: Path) -> PermissionDeniedError:
    """Say who this process is, what stands between it and the socket, and which settings of the daemon would help."""
    groups = ", ".join(str(group) for group in sorted({os.getegid(), *os.getgroups()}))
    message = f"you are uid {os.geteuid()} (groups {groups}) and may not use {socket}"
    for place in (socket, *socket.parents):
        try:
            found = place.lstat()
        except OSError:
            continue
        message += f": {place} is {stat.filemode(found.st_mode)} of uid {found.st_uid}, group {found.st_gid}"
        break
    message += "; the daemon's settings access or allow_uids would let you in"
    return PermissionDeniedError(message, uid=os.geteuid(), path=str(socket))
