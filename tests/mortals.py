"""Client processes that die on command, in all the ways there are; forked by a server, since whole ones take too long.

    mortals.py REGISTRY REPORTS PASSING

reads orders, one JSON object a line, on stdin: {"fork": number, "way": ..., "name": ...} and {"reap": pid}. All reports
go to the pipe REPORTS, one write a line: a mortal's number, then what it records (records.py), or in small letters

    begun pid               forked
    child pid               its own forked child, which lives on
    ready at                has what it shall hold, and waits for its death
    ended pid status        reaped

A mortal that shall die by itself does so upon SIGUSR1, and tells where its threads are upon SIGUSR2. The server reaps
nobody unasked, so a pid means who it meant. All of them end with the server (PR_SET_PDEATHSIG), and the server with who
started it. Its driver is victims.py.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import math
import os
import random
import signal
import socket
import stat
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hammer import is_held
from helpers import PATIENCE_S, until
from madsci_registry import Registration, RegistryClient
from stranger import Stranger

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

KILLED = -signal.SIGKILL
WAYS: dict[str, int] = {
    "SIGKILL": KILLED,
    "SIGTERM": -signal.SIGTERM,
    "SIGINT": -signal.SIGINT,
    "SIGSTOP, SIGKILL": KILLED,
    "zombie": KILLED,
    "child lives on": KILLED,
    "lifeline passed on": KILLED,
    "half-closed, resumed": KILLED,
    "exit": 0,
    "os._exit": 3,
    "exception": 1,
    "exec": KILLED,
    "closed without bye": KILLED,
    "half-closed for good": KILLED,
    "released": KILLED,
    "bye": 0,
    "while waiting": 0,
    "between request and answer": KILLED,
}
"""How a client may die, and the exit status that this leaves (`while waiting` has any of three signals)."""

OF_A_STRANGER = ("closed without bye", "half-closed for good")
"""Ours would come back and resume; these are clients of another kind."""


class Ordered(Exception):
    """What a mortal dies of that shall die of an exception."""


class Mortal:
    """One client process: takes a name, waits for its death, and dies."""

    def __init__(self, registry: Path, reports: int, passing: int, order: dict[str, Any]) -> None:
        self.registry = registry
        self.passing = passing
        self.number: int = order["fork"]
        self.way: str = order["way"]
        self.name: str = order["name"]
        self._reports = reports

    def say(self, *facts: object) -> None:
        """Report a line; one write, which also SIGKILL does not cut."""
        os.write(self._reports, " ".join(map(str, (self.number, *facts))).encode() + b"\n")

    def note(self, *facts: object) -> None:
        """Report a line with the instant."""
        self.say(*facts, f"{time.monotonic():.6f}")

    def live(self) -> None:
        if self.way in OF_A_STRANGER:
            self._live_as_a_stranger()
        self.client = RegistryClient(self.registry, timeout=PATIENCE_S, autostart=False)
        if self.way == "between request and answer":
            self._live_in_a_hurry()
        self.held = self._take()
        prepare = _PREPARE.get(self.way)
        if prepare is not None:
            prepare(self)
        self.note("ready")
        # A SIGINT that comes just before this call is seen after it only: hence no long one where that may be.
        while not signal.sigtimedwait({signal.SIGUSR1}, 0.2 if self.way == "SIGINT" else PATIENCE_S):
            pass
        if not is_held(self.held):
            self.note("L", self.name, self.held.fencing_token)
        _DIE[self.way](self)

    def _take(self) -> Registration:
        self.note("W", self.name)
        held = self.client.resolve(self.name, "node", wait=math.inf)
        self.note("G", self.name, held.fencing_token, held.id)
        return held

    def _live_in_a_hurry(self) -> NoReturn:
        """Take and release without a pause, so that there always is a request under way."""
        self.client.lookup(self.name)
        self.note("W", self.name)
        threading.Thread(target=self.kill_myself, args=(random.random() * 0.03,), daemon=True).start()
        while True:
            self.held = self._take()
            self.release()

    def _live_as_a_stranger(self) -> NoReturn:
        stranger = Stranger(self.registry)
        self.note("W", self.name)
        granted = stranger.resolve(self.name)
        self.note("G", self.name, granted["fencing_token"], granted["id"])
        self.note("ready")
        signal.sigwaitinfo({signal.SIGUSR1})
        self.note("C")
        stranger.lifeline.shutdown(socket.SHUT_RDWR if self.way == "closed without bye" else socket.SHUT_WR)
        while True:
            signal.pause()

    def release(self) -> None:
        self.note("R", self.name, self.held.fencing_token)
        self.held.release()

    def kill_myself(self, delay_s: float = 0.0) -> None:
        time.sleep(delay_s)
        self.note("K")
        os.kill(os.getpid(), signal.SIGKILL)

    # what precedes some deaths

    def fork_child(self) -> None:
        """Leave a child that keeps all descriptors: also a copy of the lifeline that our client cannot know of."""
        me, server = os.getpid(), os.getppid()
        os.dup(*lifelines_of_this_process())
        with warnings.catch_warnings():  # forking a process with threads is what shall be tested
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            outlive(me, server)
        self.say("child", pid)

    def pass_lifeline(self) -> None:
        """Give the driver a copy of the lifeline."""
        with socket.socket(fileno=os.dup(self.passing)) as passing:
            socket.send_fds(passing, [str(self.number).encode()], lifelines_of_this_process())

    def half_close(self) -> None:
        """Close one half of the lifeline; the daemon cuts the other, and our client comes back and holds on."""
        (before,) = lifelines_of_this_process().values()
        with socket.socket(fileno=os.dup(*lifelines_of_this_process())) as lifeline:
            lifeline.shutdown(socket.SHUT_WR)
        until(lambda: set(lifelines_of_this_process().values()) - {before}, "for the session to be resumed")
        self.held = self.client.resolve(self.name, "node")
        self.note("H", self.name, self.held.fencing_token)

    # deaths

    def exit(self) -> None:
        """Return, through whatever there is at exit and in finalizers."""
        self.note("K")

    def exit_at_once(self) -> None:
        self.note("K")
        os._exit(WAYS[self.way])

    def throw(self) -> None:
        self.note("K")
        raise Ordered

    def exec(self) -> None:
        self.note("C")
        os.execvp("sleep", ["sleep", "3600"])

    def release_and_die(self) -> None:
        self.release()
        self.kill_myself()

    def say_bye(self) -> None:
        self.note("R", self.name, self.held.fencing_token)
        self.client.close()


_PREPARE: dict[str, Callable[[Mortal], None]] = {
    "child lives on": Mortal.fork_child,
    "lifeline passed on": Mortal.pass_lifeline,
    "half-closed, resumed": Mortal.half_close,
}
_DIE: dict[str, Callable[[Mortal], None]] = {
    "exit": Mortal.exit,
    "os._exit": Mortal.exit_at_once,
    "exception": Mortal.throw,
    "exec": Mortal.exec,
    "released": Mortal.release_and_die,
    "bye": Mortal.say_bye,
}
BY_ITSELF = (*_DIE, *OF_A_STRANGER)
"""Who dies these ways does so upon SIGUSR1."""


def lifelines_of_this_process() -> dict[int, int]:
    """Return the descriptors that are connected to a daemon's lifeline, and the inode of each."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        number = int(entry.name)
        try:
            status = os.fstat(number)
            if stat.S_ISSOCK(status.st_mode):
                with socket.socket(fileno=os.dup(number)) as copy:
                    if str(copy.getpeername()).endswith(".life"):
                        found[number] = status.st_ino
        except OSError:
            continue
    return found


def outlive(parent: int, server: int) -> NoReturn:
    """Live on after the parent, as long as the server does."""
    while os.getppid() == parent:
        time.sleep(0.01)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    while os.getppid() == server:
        time.sleep(1)
    os._exit(0)


def say_what_was_not_ordered(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """Let the log hold only what nobody ordered."""
    if kind not in (Ordered, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def serve(registry: Path, reports: int, passing: int) -> Mortal | None:
    """Fork and reap as ordered; return in each forked child, and None in the server at the end of its input."""
    server = os.getpid()
    buffer = b""
    while piece := os.read(0, 1 << 16):
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if "reap" in order:
                _, status = os.waitpid(order["reap"], 0)
                said = f"{order['of']} ended {order['reap']} {os.waitstatus_to_exitcode(status)}\n"
            elif pid := os.fork():
                said = f"{order['fork']} begun {pid}\n"
            else:
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != server:
                    os._exit(0)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                sys.excepthook = say_what_was_not_ordered
                random.seed(order["fork"])
                faulthandler.register(signal.SIGUSR2)
                return Mortal(registry, reports, passing, order)
            os.write(reports, said.encode())
    return None


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    gc.collect()
    gc.freeze()  # what all share is not written to, so it stays shared
    registry, reports, passing = sys.argv[1:]
    mortal = serve(Path(registry), int(reports), int(passing))
    if mortal is not None:
        mortal.live()


if __name__ == "__main__":
    main()
