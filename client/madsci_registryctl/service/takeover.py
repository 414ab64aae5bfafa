"""Hands a registry over from a daemon that a client started to the service. Locks stay: both read the same database.

Clients that hold or wait would start the next daemon at once, before systemd has started its own. So the lock that a
client takes for that, run/NAME.start, is held until the service runs.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from madsci_registry.cgroups import place_of
from madsci_registry.client import RegistryClient
from madsci_registry.errors import BusyError, ConflictError, RegistryTimeoutError, UnavailableError
from madsci_registryctl.service import systemd
from madsci_registryctl.service.plan import SOCKET, Service
from madsci_registryctl.stop import connect, peer_pid, process, terminate

STARTING_S = 10.0
"""How long a client may be at starting a daemon: twice its own default deadline."""


def check(service: Service) -> None:
    """Raise ConflictError where a daemon serves the registry that is neither the service nor a client's own."""
    with _other_daemon(service):
        pass


@contextmanager
def handed_over(service: Service) -> Iterator[int | None]:
    """End the daemon that a client has started, and keep clients from starting one within the block.

    Yields its pid, None: there was none.

    Raises:
        ConflictError: somebody else's daemon serves the registry. BusyError: a client does not finish starting one.
    """
    with _start_lock(service), _other_daemon(service) as found:
        if found is None:
            yield None
            return
        lifeline, pid = found
        with process(lifeline, pid) as pidfd:
            terminate(pidfd, pid)
        yield pid


def check_served(service: Service) -> None:
    """Ask the registry whether it is this service's daemon that answers.

    Raises:
        ConflictError: another one does. UnavailableError: none does, such as where a person's own unit has the name.
    """
    try:
        with RegistryClient(str(service.registry), autostart=False, timeout=STARTING_S) as client:
            pid = client.status()["pid"]
    except (UnavailableError, RegistryTimeoutError) as error:
        found = state(service, service.unit)
        raise UnavailableError(f"{service.unit} is {found}, but does not serve: {error.message}") from None
    with suppress(OSError):
        if place_of(Path(f"/proc/{pid}/cgroup").read_text()).unit != service.unit:
            raise ConflictError(f"{service.registry} is served, but not by {service.unit}: by {_described(pid)}")


def state(service: Service, unit: str) -> str:
    """Return the ActiveState of a unit of the service's systemd."""
    return systemd.shown(service.scope, unit, "ActiveState")


@contextmanager
def _other_daemon(service: Service) -> Iterator[tuple[socket.socket, int] | None]:
    units = [service.unit, *([SOCKET] if service.folder is None else [])]
    if any(state(service, unit) in ("active", "reloading") for unit in units):
        yield None
        return
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as lifeline:
        try:
            lifeline.settimeout(STARTING_S)
            connect(lifeline, service.run / "registry.life")
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            yield None
            return
        lifeline.setblocking(False)
        pid = peer_pid(lifeline)
        if not _is_autostarted(service, pid):
            raise ConflictError(f"{service.registry} is served already, by {_described(pid)}")
        yield lifeline, pid


def _described(pid: int) -> str:
    place = None
    with suppress(OSError):
        place = place_of(Path(f"/proc/{pid}/cgroup").read_text())
    if place is not None and (place.unit or place.container):
        stop = place.stop_command or f"kill {pid}"
        return f"pid {pid} in {place.unit or f'container {place.container}'}; `{stop}` ends it, then try again"
    return f"pid {pid}; `kill {pid}` ends it (locks stay), then try again"


def _is_autostarted(service: Service, pid: int) -> bool:
    """Tell whether a client of the folder's owner has started this daemon; the socket may be a link to another's."""
    process = Path(f"/proc/{pid}")
    try:
        words = (process / "cmdline").read_text(errors="replace").split("\0")
        return (
            service.folder is not None
            and "--autostarted" in words
            and process.stat().st_uid == service.folder.stat().st_uid
        )
    except OSError:
        return False


@contextmanager
def _start_lock(service: Service) -> Iterator[None]:
    try:
        # The folder may be another user's and we root: a link is not followed, a FIFO not waited for, nothing is made.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        lock = os.open(service.run / "registry.start", flags)
    except OSError:
        yield  # no client has started a daemon here
        return
    try:
        deadline = time.monotonic() + STARTING_S
        while not _locked(lock):
            if time.monotonic() > deadline:
                raise BusyError(f"a client has been starting a daemon of {service.registry} for {STARTING_S:g} s")
            time.sleep(0.02)
        yield
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
