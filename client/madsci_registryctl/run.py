"""`run`: holds a name while a command runs.

Theory of operation. The lock lives as long as this process. The command is its child, in the same process group, so
that the terminal's Ctrl-C and Ctrl-Z reach both; the kernel kills the child when this process dies (PR_SET_PDEATHSIG).
The main thread waits for what happens: `ended` is said by a thread that waits for the child without reaping it, `lost`
by the client. Only the main thread signals and reaps the child, and Python runs signal handlers there too, so
a signal can never reach another process that got the child's pid.
"""

from __future__ import annotations

import ctypes
import os
import queue
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from madsci_registry._endpoint import environment
from madsci_registry.errors import RegistryError
from madsci_registry.types import COMPONENT_TYPES
from madsci_registryctl import exits
from madsci_registryctl.invocation import Command, Invocation, complete_name, seconds
from madsci_registryctl.render import print_error

if TYPE_CHECKING:
    from types import FrameType

    from madsci_registry.registration import Registration
    from madsci_registry.types import ComponentType

FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
"""What a terminal sends to its whole foreground process group."""
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

_Happening = Literal["ended", "lost"]


@click.command("run", cls=Command)
@click.argument("name", shell_complete=complete_name)
@click.option("--type", "component_type", type=click.Choice(COMPONENT_TYPES), required=True)
@click.option("--wait", "wait_s", type=seconds, default=0.0, metavar="S",
              help="Wait so many seconds for a held name; inf: for ever.  [default: 0]")  # fmt: skip
@click.option("--grace", "grace_s", type=seconds, default=10.0, metavar="S",
              help="From TERM to KILL when the lock is lost.  [default: 10]")  # fmt: skip
@click.argument("command", metavar="-- CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def run_command(
    context: click.Context,
    name: str,
    component_type: ComponentType,
    wait_s: float,
    grace_s: float,
    command: tuple[str, ...],
) -> None:
    """Hold NAME while CMD runs; its exit status is handed on (128 + n for signal n).

    CMD sees MADSCI_COMPONENT_ID, MADSCI_COMPONENT_NAME and MADSCI_FENCING_TOKEN. TERM, HUP, INT, QUIT, USR1 and USR2
    are forwarded to it. The lock ends when CMD ends.

    Exit status 125: the lock was not got and CMD not started. 123: the lock was lost (broken by an operator); CMD got
    TERM, and KILL after the grace. If registryctl dies, by any means, the kernel kills CMD, but not CMD's own
    children, and for a few milliseconds CMD and the next holder may both live: whatever CMD writes to should refuse a
    fencing token below the highest that it has seen.
    """
    context.exit(_run(context.obj, name, component_type, wait_s, grace_s, command))


def _run(
    invocation: Invocation,
    name: str,
    component_type: ComponentType,
    wait_s: float,
    grace_s: float,
    command: Sequence[str],
) -> int:
    fault = _command_fault(command[0])
    if fault:
        return fault
    with ExitStack() as stack:
        try:
            client = stack.enter_context(invocation.client())
            registration = client.resolve(name, component_type, wait=wait_s)
        except RegistryError as error:
            print_error(error, as_json=invocation.as_json)
            return exits.LOCK_NOT_GOT
        for warning in registration.warnings:
            invocation.say(f"registryctl: {warning}")
        return _supervise(invocation, registration, command, grace_s)


def _command_fault(program: str) -> int | None:
    """Return a shell's exit status for a program that cannot be started, having said so; None if it can."""
    if shutil.which(program):
        return None
    if os.sep in program and Path(program).exists():
        click.echo(f"registryctl: {program}: not executable", err=True)
        return exits.NOT_EXECUTABLE
    click.echo(f"registryctl: {program}: command not found", err=True)
    return exits.COMMAND_NOT_FOUND


def _supervise(invocation: Invocation, registration: Registration, command: Sequence[str], grace_s: float) -> int:
    with _Happenings() as happenings, _Forwarder() as forwarder:
        registration.on_lost(lambda _registration: happenings.put("lost"))
        try:
            child = _start(registration, command)
        except FileNotFoundError as error:  # also the interpreter of a script
            click.echo(f"registryctl: {error.filename}: {error.strerror}", err=True)
            return exits.COMMAND_NOT_FOUND
        except OSError as error:
            click.echo(f"registryctl: {command[0]}: {error.strerror}", err=True)
            return exits.NOT_EXECUTABLE
        forwarder.forward_to(child)
        threading.Thread(target=_tell_end, args=(child.pid, happenings), daemon=True).start()
        if happenings.get() == "lost":
            invocation.say(f"registryctl: the lock on {registration.name} is lost; stopping the command")
            _end(child, happenings, grace_s)
            lost = True
        else:
            lost = not registration.held
        status = child.wait()
    if lost:
        return exits.LOCK_LOST
    return status if status >= 0 else 128 - status


def _start(registration: Registration, command: Sequence[str]) -> subprocess.Popen[bytes]:
    child_environment = {
        **environment(),
        "MADSCI_COMPONENT_ID": registration.id,
        "MADSCI_COMPONENT_NAME": registration.name,
        "MADSCI_FENCING_TOKEN": str(registration.fencing_token),
    }
    assert threading.current_thread() is threading.main_thread(), "the kernel kills the child when this thread ends"
    # Safe with threads: all that it calls is bound before the fork, so that it loads and imports nothing.
    return subprocess.Popen(command, env=child_environment, preexec_fn=_dying_with_parent())  # noqa: PLW1509


def _dying_with_parent() -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl
    getppid, leave, parent_pid, kill = os.getppid, os._exit, os.getpid(), int(signal.SIGKILL)

    def die_with_parent() -> None:
        prctl(PR_SET_PDEATHSIG, kill, 0, 0, 0)
        if getppid() != parent_pid:  # it died before the call, which then never fires
            leave(exits.LOCK_LOST)

    return die_with_parent


class _Happenings:
    """What the main thread waits for, told by other threads. A context manager of the main thread.

    It waits on a descriptor that signals wake as well. On a lock or a queue it could sleep through one: Python runs a
    handler when a sleep is interrupted, and a signal may come just before the sleep begins.
    """

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[_Happening] = queue.SimpleQueue()
        self._ready, self._wake = socket.socketpair()
        self._ready.setblocking(False)
        self._wake.setblocking(False)

    def __enter__(self) -> _Happenings:
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)  # the sockets stay open: a thread may still have something to tell

    def put(self, happening: _Happening) -> None:
        self._told.put(happening)
        with suppress(BlockingIOError):  # full: the main thread is awake
            self._wake.send(b"\0")

    def get(self, timeout_s: float | None = None) -> _Happening | None:
        """Return the next happening; None: there was none in so many seconds."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with suppress(queue.Empty):
                return self._told.get_nowait()
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                return None
            select.select([self._ready], [], [], left_s)
            with suppress(BlockingIOError):
                self._ready.recv(4096)


def _tell_end(pid: int, happenings: _Happenings) -> None:
    with suppress(ChildProcessError):  # the main thread reaped it first
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    happenings.put("ended")


def _end(child: subprocess.Popen[bytes], happenings: _Happenings, grace_s: float) -> None:
    child.terminate()
    deadline = time.monotonic() + grace_s
    while True:
        happening = happenings.get(max(0.0, deadline - time.monotonic()))
        if happening == "ended":
            return
        if happening is None:
            child.kill()
            return


class _Forwarder:
    """Forwards signals to a child, those too that came before it was there. A context manager of the main thread."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Forwarder:
        # What was ignored when registryctl began (nohup, a shell's background job) stays ignored by both.
        listened = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._forward) for number in listened}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def forward_to(self, child: subprocess.Popen[bytes]) -> None:
        """Send the child what came until now, and from now on what comes."""
        self._child = child
        while self._early:
            child.send_signal(self._early.pop(0))

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        # The terminal sends it to a child as well, and twice means something else to many programs.
        is_told = number in FROM_TERMINAL and _has_child() and _in_foreground()
        if self._child is not None and not is_told:
            self._child.send_signal(number)
        elif not is_told:
            self._early.append(number)


def _has_child() -> bool:
    """Tell whether a child is running, though its start may not have come back to us yet."""
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _in_foreground() -> bool:
    """Tell whether this process group is the one that its controlling terminal talks to."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
