"""Measures the daemon against what it stands on, in one run: a bare pyzmq echo and bare SQLite commits.

Everything is pinned to one CPU: otherwise the time to wake a halted virtual CPU hides everything else. What is compared
is measured in turns, so that both see the same machine. Exit status 1 where a bound is not met.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import apsw
import zmq

from helpers import DaemonProcess, environment
from madsci_registry import RegistryClient

HERE = Path(__file__).parent
ROUNDS = 20
CALLS_A_ROUND = 200
CROWD_S = 4.0
MANY, FEW = 10_000, 10


class Row(NamedTuple):
    """A line of the table. `bound` None: shown, not judged."""

    what: str
    value: str
    ratio: float | None = None
    against: str = ""
    bound: float | None = None
    at_least: bool = False

    @property
    def passed(self) -> bool:
        if self.bound is None or self.ratio is None:
            return True
        return self.ratio >= self.bound if self.at_least else self.ratio <= self.bound


def in_turns(*calls: Callable[[], object]) -> list[float]:
    """Return the median duration of each call in microseconds, measured in turns."""
    taken: list[list[int]] = [[] for _ in calls]
    for round_number in range(ROUNDS + 1):
        for call, durations in zip(calls, taken, strict=True):
            for _ in range(CALLS_A_ROUND):
                begin = time.perf_counter_ns()
                call()
                if round_number:  # the first round warms up
                    durations.append(time.perf_counter_ns() - begin)
    return [statistics.median(durations) / 1000 for durations in taken]


@contextmanager
def echo(folder: Path) -> Iterator[Callable[[], object]]:
    """Run the echo server; give a call that sends it what a lookup is, and receives it."""
    address = f"ipc://{folder}/echo.sock"
    server = subprocess.Popen([sys.executable, str(HERE / "echo.py"), address], stdout=subprocess.PIPE)
    assert server.stdout
    server.stdout.readline()
    body = json.dumps(
        {"op": "lookup", "v": 1, "token": "f" * 64, "epoch": 1_790_000_000, "seq": 12345, "name": "n-1"}
    ).encode()
    context = zmq.Context()
    request = context.socket(zmq.REQ)
    request.connect(address)

    def call() -> bytes:
        request.send(body)
        return request.recv()

    try:
        yield call
    finally:
        request.close(0)
        context.term()
        server.kill()
        server.wait()
        server.stdout.close()


@contextmanager
def commits(folder: Path, synchronous: str) -> Iterator[Callable[[], object]]:
    """Open a bare database; give a call that commits one small row."""
    db = apsw.Connection(str(folder / f"bare-{synchronous}.db"))
    db.execute("PRAGMA journal_mode=WAL; PRAGMA locking_mode=EXCLUSIVE")
    db.execute(f"PRAGMA synchronous={synchronous}; CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT) STRICT")
    try:
        yield lambda: db.execute("INSERT INTO t (a) VALUES ('a component of a laboratory, about this long')")
    finally:
        db.close()


@contextmanager
def registry(folder: Path, names: int) -> Iterator[RegistryClient]:
    """Run a daemon that knows so many names; give a client of it."""
    folder.mkdir()
    with DaemonProcess(folder / "registry.json", "--log-level", "warning") as daemon:
        with RegistryClient(daemon.registry) as client:
            client.resolve_many(((f"n-{i}", "node") for i in range(names)), acquire_lock=False)
            yield client
        daemon.signal(signal.SIGTERM)
        daemon.wait()


def take_and_give(client: RegistryClient) -> Callable[[], object]:
    """Give a call that takes a known name's lock and releases it."""

    def call() -> None:
        client.resolve("n-1", "node").release()

    return call


def crowd(folder: Path, processes: int) -> float:
    """Let so many processes resolve new names; return how many they made together in a second."""
    with ExitStack() as stack:
        client = stack.enter_context(registry(folder / f"crowd-{processes}", 1))
        path = client.status()["registry"]
        members = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(HERE / "crowd.py"), path, f"c{i}", str(CROWD_S)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment(),
                    text=True,
                )
            )
            for i in range(processes)
        ]
        for member in members:
            assert member.stdout
            member.stdout.readline()
        for member in members:
            assert member.stdin
            member.stdin.write("go\n")
            member.stdin.flush()
        return sum(int(member.communicate()[0]) for member in members) / CROWD_S


def measure(folder: Path) -> list[Row]:
    """Measure everything and return the table."""
    with ExitStack() as stack:
        bare = stack.enter_context(echo(folder))
        full = stack.enter_context(commits(folder, "FULL"))
        normal = stack.enter_context(commits(folder, "NORMAL"))
        few = stack.enter_context(registry(folder / "few", FEW))
        many = stack.enter_context(registry(folder / "many", MANY))
        echo_us, lookup_us = in_turns(bare, lambda: few.lookup("n-1"))
        pair_us, full_us, normal_us = in_turns(take_and_give(few), full, normal)
        few_us, many_us = in_turns(lambda: few.lookup("n-7"), lambda: many.lookup("n-7777"))
        few_pair_us, many_pair_us = in_turns(take_and_give(few), take_and_give(many))
    one, sixteen = crowd(folder, 1), crowd(folder, 16)
    return [
        Row("bare echo (pyzmq REQ, ROUTER)", f"{echo_us:.0f} us"),
        Row("lookup", f"{lookup_us:.0f} us", lookup_us / echo_us, "echo", 1.8),
        Row("bare commit, synchronous=FULL", f"{full_us:.0f} us"),
        Row("bare commit, synchronous=NORMAL", f"{normal_us:.0f} us"),
        Row(
            "resolve + release of a known name",
            f"{pair_us:.0f} us",
            pair_us / (2 * (echo_us + normal_us)),
            "2 echoes + 2 NORMAL commits",
        ),
        Row(f"lookup among {MANY:,} names", f"{many_us:.0f} us", many_us / few_us, f"among {FEW}", 1.25),
        Row(
            f"resolve + release among {MANY:,}",
            f"{many_pair_us:.0f} us",
            many_pair_us / few_pair_us,
            f"among {FEW}",
            1.25,
        ),
        Row("new names, 1 process", f"{one:,.0f}/s"),
        Row("new names, 16 processes", f"{sixteen:,.0f}/s", sixteen / one, "1 process", 2.0, at_least=True),
    ]


def show(rows: list[Row]) -> None:
    """Print the table."""
    for row in rows:
        line = f"{row.what:<36}{row.value:>12}"
        if row.ratio is not None:
            line += f"  {row.ratio:5.2f} x {row.against:<28}"
        if row.bound is not None:
            line += f"{'>=' if row.at_least else '<='} {row.bound:<5}{'PASS' if row.passed else 'FAIL'}"
        print(line)


def main() -> int:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(prefix="madsci-bench-") as folder:
        rows = measure(Path(folder))
    show(rows)
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
