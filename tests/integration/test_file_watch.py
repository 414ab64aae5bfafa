"""What an old program wrote just before another one was killed in mid-write: the daemon has a copy of it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers import PATIENCE_S, TESTS, DaemonProcess
from madsci_registry import RegistryClient
from madsci_registry.errors import HeldError
from madsci_registryd.file_watch import IN_CLOSE_WRITE, read_events, watch_folder

ROUNDS = 20
IN_CLOSE_NOWRITE = 0x10
"""inotify(7): who only read the file has closed it."""
COPIED_WITHIN_S = 10.0
"""The file's lock keeps the daemon's passes away meanwhile."""
TEARING = """
import fcntl, sys
for line in sys.stdin:
    with open(sys.argv[1] + ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("locked", flush=True)
        sys.stdin.readline()
        with open(sys.argv[1], "w"):
            print("torn", flush=True)
            sys.stdin.readline()
"""


class Program:
    """A process that is told a line and says one."""

    def __init__(self, *arguments: str | Path) -> None:
        command = [sys.executable, *map(str, arguments)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def ask(self, line: str) -> str:
        self.tell(line)
        return self.said()

    def tell(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def said(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()


@contextmanager
def started(*arguments: str | Path) -> Iterator[Program]:
    program = Program(*arguments)
    try:
        yield program
    finally:
        program.kill()


class Closings:
    """Tells when somebody who only read the file has closed it again since it was written."""

    def __init__(self, registry: Path) -> None:
        self._name = os.fsencode(registry.name)
        self._fd, _ = watch_folder(registry.parent, IN_CLOSE_WRITE | IN_CLOSE_NOWRITE)

    def wait(self, within_s: float) -> bool:
        deadline, was_read = time.monotonic() + within_s, False
        while not was_read and select.select([self._fd], [], [], max(deadline - time.monotonic(), 0.0))[0]:
            for mask, name in read_events(self._fd):
                if name == self._name:
                    was_read = not mask & IN_CLOSE_WRITE
        return was_read

    def close(self) -> None:
        os.close(self._fd)


@pytest.mark.timeout(300)
def test_what_an_old_program_wrote_just_before_another_was_killed_in_mid_write_counts(daemon: DaemonProcess) -> None:
    """An old program makes a name and holds it; before the daemon can have the file's lock, another one takes that,
    empties the file and is killed. The name keeps its ULID, and its holder keeps it; so twenty times."""
    copied = 0
    with (
        started(TESTS / "old_program.py", daemon.registry) as writer,
        RegistryClient(daemon.registry, autostart=False) as client,
    ):
        client.resolve("known", "node")
        for number in range(ROUNDS):
            name = f"made-{number}"
            closings = Closings(daemon.registry)
            with started("-c", TEARING, daemon.registry) as tearing:
                id = json.loads(writer.ask(json.dumps(["resolve", name])))["ok"]
                assert tearing.ask("lock") == "locked"
                copied += closings.wait(COPIED_WITHIN_S)
                assert tearing.ask("tear") == "torn"
            closings.close()
            with pytest.raises(HeldError) as refused:
                client.resolve(name, "node", wait=0)
            assert refused.value.old_lock and refused.value.old_lock.holder_pid == writer.pid
            assert client.lookup(name) == id
            assert json.loads(daemon.registry.read_bytes())["entries"][name]["id"] == id
    assert copied == ROUNDS
    assert len(list(daemon.registry.parent.glob("registry.json.broken-*"))) >= ROUNDS // 2
