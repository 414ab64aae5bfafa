"""The driver of mortals (mortals.py): starts them, lets them die, sees them reaped, and keeps what they recorded."""

from __future__ import annotations

import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from helpers import PATIENCE_S, TESTS, environment
from mortals import BY_ITSELF, OF_A_STRANGER, WAYS
from records import Record

CUT_OFF = ("exec", *OF_A_STRANGER)
"""Who dies these ways lives on without a lifeline: the lock ends when the time to resume is over."""
DEADLY = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Victim:
    """One mortal, as its driver sees it."""

    def __init__(self, number: int, way: str, name: str, label: str) -> None:
        self.number = number
        self.way = way
        self.name = name
        self.record = Record(f"{number} ({way})", [], label=label)
        self.is_reaped = False
        self._facts: dict[str, list[str]] = {}
        self._changed = threading.Condition()

    def take(self, kind: str, line: str) -> None:
        with self._changed:
            if kind.isupper():
                self.record.lines.append(line)
            self._facts.setdefault(kind, line.split(" ")[1:])
            self._changed.notify_all()

    def take_lifeline(self, descriptor: int) -> None:
        self.take("passed", f"passed {descriptor}")

    def close_lifeline(self) -> None:
        """Close the copy of its lifeline that it gave away, if it did."""
        if descriptor := self._facts.pop("passed", None):
            os.close(int(descriptor[0]))

    def until(self, kind: str, patience_s: float = PATIENCE_S) -> list[str]:
        """Wait for the first report of a kind and return its facts."""
        with self._changed:
            there = self._changed.wait_for(lambda: kind in self._facts, patience_s)
            assert there, f"{self.record.client} on {self.name}: no {kind!r} in {patience_s} s, only {self._facts}"
            return self._facts[kind]

    @property
    def pid(self) -> int:
        return int(self.until("begun")[0])

    @property
    def token(self) -> int:
        return int(self.until("G")[1])

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a deadly signal; what it holds ends at the instant noted just before."""
        pid = self.pid
        self.record.killed_at = time.monotonic()
        os.kill(pid, number)

    def die(self, freeze_s: float = 0.0) -> None:
        """Begin its death."""
        if self.way in BY_ITSELF:
            os.kill(self.pid, signal.SIGUSR1)
            return
        if self.way == "SIGSTOP, SIGKILL":
            os.kill(self.pid, signal.SIGSTOP)
            time.sleep(freeze_s)
        self.kill({"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(self.way, signal.SIGKILL))


class Victims:
    """A fork server and its mortals. A context manager: none of them lives after it."""

    def __init__(self, registry: Path) -> None:
        self.all: list[Victim] = []
        self.dead = 0
        self.faults: list[str] = []
        self._log_path = registry.parent / "mortals.log"
        self._lock = threading.Lock()
        self._reports, reports = os.pipe()
        self._passed, passing = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with self._log_path.open("ab") as log, passing:
            self._server = subprocess.Popen(
                [sys.executable, str(TESTS / "mortals.py"), str(registry), str(reports), str(passing.fileno())],
                stdin=subprocess.PIPE,
                stderr=log,
                pass_fds=(reports, passing.fileno()),  # kept over exec too: the pipe ends when the last has ended
                env=environment(MADSCI_REGISTRY_AUTOSTART="0"),
                start_new_session=True,
            )
            os.close(reports)
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Victims:
        self._reader.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            print(f"what mortals said last:\n{self._end_of_log()}")
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert not self._reader.is_alive(), "mortals outlive their server"
        os.close(self._reports)
        self._passed.close()
        for victim in self.all:
            victim.close_lifeline()

    def _read(self) -> None:
        """Take reports and descriptors until the last mortal has ended."""
        buffer = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._reports, selectors.EVENT_READ)
            selector.register(self._passed, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._passed:
                        number, descriptors, _, _ = socket.recv_fds(self._passed, 64, 1)
                        self.all[int(number)].take_lifeline(*descriptors)
                        continue
                    piece = os.read(self._reports, 1 << 16)
                    if not piece:
                        return
                    *lines, buffer = (buffer + piece).split(b"\n")
                    for line in lines:
                        number, said = line.split(b" ", 1)
                        self.all[int(number)].take(said.split(b" ")[0].decode(), said.decode())

    def _order(self, **order: object) -> None:
        assert self._server.stdin
        with self._lock:
            self._server.stdin.write(json.dumps(order).encode() + b"\n")
            self._server.stdin.flush()

    def start(self, way: str, name: str, label: str | None = None) -> Victim:
        """Fork one that shall die in this way; its record bears the label, or else the way."""
        with self._lock:
            victim = Victim(len(self.all), way, name, label or way)
            self.all.append(victim)
        self._order(fork=victim.number, way=way, name=name)
        return victim

    def reap(self, victim: Victim) -> None:
        """Wait until a victim is dead, have it reaped, and judge its exit status."""
        self._reap(victim, victim.pid)
        status = int(victim.until("ended")[1])
        victim.is_reaped = True
        is_right = status == WAYS[victim.way] or (victim.way == "while waiting" and -status in DEADLY)
        with self._lock:
            self.dead += 1
            if not is_right:
                self.faults.append(f"{victim.record.client} ended with {status}; of this?\n{self._end_of_log()}")

    def _end_of_log(self) -> str:
        return self._log_path.read_text()[-3000:]

    def _reap(self, victim: Victim, pid: int) -> None:
        descriptor = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(PATIENCE_S * 1000):
                os.kill(pid, signal.SIGUSR2)  # upon which it tells where its threads are
                time.sleep(1)
                raise AssertionError(f"{victim.record.client}, process {pid}, does not die:\n{self._end_of_log()}")
        finally:
            os.close(descriptor)
        self._order(reap=pid, of=victim.number)

    def end(self, victim: Victim, freeze_s: float = 0.0) -> None:
        """Let a victim die, and have it reaped, unless its way is that this comes later."""
        victim.die(freeze_s)
        if victim.way not in (*CUT_OFF, "zombie"):
            self.reap(victim)

    def finish(self, victim: Victim) -> None:
        """Clear away what is left of a victim whose name somebody else has by now."""
        if victim.way in CUT_OFF:
            victim.until("C")
            victim.kill()
        if not victim.is_reaped:
            self.reap(victim)
        if victim.way == "child lives on":
            child = int(victim.until("child")[0])
            os.kill(child, signal.SIGKILL)
            self._reap(victim, child)
        if victim.way == "lifeline passed on":
            victim.until("passed")
            victim.close_lifeline()
