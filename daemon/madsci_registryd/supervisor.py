"""What a service manager gives and wants to hear, by systemd's protocols: sd_notify(3) and sd_listen_fds(3).

Both are a few lines over a socket; the libraries for them need a C compiler, or have had no release for years. Where
no manager started the daemon, all of this does nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from madsci_registry.cgroups import innermost_unit, systemctl
from madsci_registryd import messages
from madsci_registryd.faults import BadConfiguration
from madsci_registryd.settings import Supervision

log = logging.getLogger(__name__)

_FIRST_FD = 3
"""SD_LISTEN_FDS_START."""


class Supervisor:
    """The manager that started this process, if any. One thread."""

    def __init__(self, given: Supervision) -> None:
        self._address = given.notify_socket
        self.alive_every_s = given.watchdog_s / 4 if given.watchdog_s else None
        """How often `alive` is to be said, None: nobody waits for it. Half of it would do; a loaded machine is slow."""
        self._socket: socket.socket | None = None

    def ready(self, status: str) -> None:
        """Both sockets listen."""
        self._say(f"READY=1\nSTATUS={status}\nMAINPID={os.getpid()}")

    def status(self, text: str) -> None:
        self._say(f"STATUS={text}")

    def reloading(self) -> None:
        self._say(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def starting_for(self, seconds: float) -> None:
        """The start takes longer: so many seconds more."""
        self._say(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def stopping(self) -> None:
        self._say("STOPPING=1")

    def alive(self) -> None:
        self._say("WATCHDOG=1")

    def leave_word(self, path: Path, *, in_container: bool) -> None:
        """Note beside the sockets who starts this daemon again when it is gone: no client should, then. Where nobody
        does, the note goes."""
        keeper = ("a container of its own", "start that container") if in_container else self._unit()
        try:
            if keeper is None:
                path.unlink(missing_ok=True)
            else:
                path.write_text("\n".join(keeper) + "\n", encoding="utf-8")
        except OSError as error:
            log.info("clients cannot be told who starts the daemon: %s", error)

    def _unit(self) -> tuple[str, str] | None:
        if self._address is None:
            return None
        with suppress(OSError):
            cgroup = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace")
            start = systemctl(cgroup, "start")
            if start is not None:
                return f"the systemd unit {innermost_unit(cgroup)}", start
        return "a service manager", "start its service"

    def _say(self, message: str) -> None:
        if self._address is None:
            return
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            self._socket.sendto(message.encode(), address)
        except OSError as error:  # a manager that is being replaced; the next word may reach it
            text, extra = "the service manager cannot be told %s: %s", messages.MANAGER_UNREACHABLE()
            log.warning(text, message.split("\n", 1)[0], error, extra=extra)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


def passed_sockets(count: int) -> dict[Path, socket.socket]:
    """Return the listening sockets that the manager passed, by the path that each is bound to.

    Raises: BadConfiguration where one is no listening Unix stream socket with a path.
    """
    found = {}
    for fd in range(_FIRST_FD, _FIRST_FD + count):
        try:
            sock = socket.socket(fileno=fd)
            path = sock.getsockname() if sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM else None
            is_listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        except OSError as error:
            raise BadConfiguration(f"LISTEN_FDS: descriptor {fd} cannot be used: {error.strerror}") from None
        if not isinstance(path, str) or not path.startswith("/") or not is_listening:
            raise BadConfiguration(f"LISTEN_FDS: descriptor {fd} is no listening Unix stream socket with a path")
        sock.set_inheritable(False)
        sock.setblocking(False)
        found[Path(path)] = sock
    return found
