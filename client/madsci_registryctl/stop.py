"""`stop`: ends the daemon, found by what the kernel says of its socket's other end. Never starts one."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from madsci_registry._permission import closed_to_you
from madsci_registry.cgroups import place_of
from madsci_registry.errors import (
    PermissionDeniedError,
    RegistryError,
    RegistryTimeoutError,
    UnavailableError,
    UnsupportedError,
)
from madsci_registryctl.invocation import Command, Invocation
from madsci_registryctl.render import print_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from madsci_registry._endpoint import Endpoint

# A daemon ends within a second; a slow disk's last checkpoint may take some more.
STOP_WAIT_S = 30.0
# struct ucred: pid, uid, gid (unix(7), SO_PEERCRED).
_UCRED = struct.Struct("3i")


@click.command("stop", cls=Command)
@click.pass_obj
def stop_command(invocation: Invocation) -> None:
    """Stop the daemon (SIGTERM) and wait until it is gone; exit status 6 if none serves.

    Asks first where names are held or waited for, since those clients start it again. Locks stay with their holders.
    """
    with _connected(invocation.endpoint(), invocation.timeout) as lifeline:
        pid = peer_pid(lifeline)
        with process(lifeline, pid) as pidfd:
            _refuse_service(pid)
            question = _objection(invocation, pid)
            if question:
                invocation.confirm(question)
            terminate(pidfd, pid)
    if invocation.as_json:
        print_json({"stopped": True, "pid": pid})
    else:
        invocation.say(f"madsci-registryd (pid {pid}) has stopped.")


@contextmanager
def _connected(endpoint: Endpoint, timeout_s: float) -> Iterator[socket.socket]:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as lifeline:
        lifeline.settimeout(timeout_s)
        try:
            connect(lifeline, endpoint.lifeline)
        except PermissionError:
            raise closed_to_you(endpoint.lifeline) from None
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            path = str(endpoint)
            raise UnavailableError(f"no daemon serves {path}: nothing to stop", path=path) from None
        except TimeoutError:
            raise RegistryTimeoutError(f"the daemon does not accept connections on {endpoint.lifeline}") from None
        lifeline.setblocking(False)
        yield lifeline


def connect(lifeline: socket.socket, path: Path) -> None:
    """Connect a stream socket to a path of any length. Raises OSError."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:  # through procfs, since a path may be longer than the 107 bytes of a socket address
        lifeline.connect(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def peer_pid(connection: socket.socket) -> int:
    """Return the pid of the process that listens at the connection's other end, as the kernel knows it.

    Raises:
        UnsupportedError: that process is in a PID namespace that cannot be seen from here.
    """
    pid, _uid, _gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if pid <= 0:
        raise UnsupportedError("the daemon's pid is not visible here (another container): stop it there")
    return int(pid)


@contextmanager
def process(lifeline: socket.socket, pid: int) -> Iterator[int]:
    """Open a pidfd of the daemon at the other end of its lifeline. Raises UnavailableError: it has just ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise UnavailableError("the daemon has just ended") from None
    try:
        # The pid may have been given to another process, but only if the daemon is dead, and then the line has ended.
        if _ended(lifeline):
            raise UnavailableError("the daemon has just ended")
        yield pidfd
    finally:
        os.close(pidfd)


def _ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def _refuse_service(pid: int) -> None:
    """Raise UnsupportedError where systemd would start the daemon again: it holds the sockets, or has the unit."""
    try:
        program = Path(f"/proc/{pid}/comm").read_text().strip()
        place = place_of(Path(f"/proc/{pid}/cgroup").read_text())
    except OSError:
        return
    if program == "systemd":
        command = "systemctl stop madsci-registryd.socket madsci-registryd.service"
        raise UnsupportedError(f"systemd holds its sockets, and would start it again. To stop both: {command}")
    if place.unit and place.unit.startswith("madsci-registryd"):
        reason = f"the daemon is the service {place.unit}, which systemd would start again"
        raise UnsupportedError(f"{reason}. To stop it: {place.stop_command}", reason=reason)


def _objection(invocation: Invocation, pid: int) -> str | None:
    """Say why a person should be asked first, or None."""
    try:
        with invocation.client(autostart=False) as client:
            status = client.status()
    except RegistryError as error:
        return f"madsci-registryd (pid {pid}) does not say who uses it ({error.message}). Stop it?"
    if not status["held"] and not status["waiting"]:
        return None
    return (
        f"{status['held']} names are held and {status['waiting']} requests wait; "
        f"those clients will start the daemon again. Stop it?"
    )


def terminate(pidfd: int, pid: int) -> None:
    """End a daemon (SIGTERM) and wait until it is gone. Raises PermissionDeniedError, RegistryTimeoutError."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError:
        raise PermissionDeniedError(f"you may not stop the daemon (pid {pid}): it is another user's") from None
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    if not poller.poll(STOP_WAIT_S * 1000):
        raise RegistryTimeoutError(f"the daemon (pid {pid}) was told to stop and still runs after {STOP_WAIT_S:g} s")
