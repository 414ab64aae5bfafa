"""The long runs of the promises, with counts: `make test` runs them small, `make chaos` large."""

from __future__ import annotations

import bisect
import random
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import apsw

from hammer import HammerProcess, Job, Role
from helpers import PATIENCE_S, DaemonProcess, Worker, until
from madsci_registry import RegistryClient
from records import Verdict, judge

START_S = 0.5
"""A daemon is up after about so long."""


class TimedDaemon(DaemonProcess):
    """A daemon that leaves a note of the instant at which its program was executed, for each start."""

    _NOTING = (
        "import os, sys, time; file = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600);"
        "os.write(file, b'%.6f\\n' % time.monotonic()); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    )

    @property
    def executions(self) -> list[float]:
        """The monotonic instants of all starts."""
        return [float(line) for line in self._notes.read_text().split()]

    @property
    def _notes(self) -> Path:
        return self.registry.parent / "executions"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", self._NOTING, str(self._notes), *super().command(*arguments)[1:]]


def hammer_and_kill(
    daemon: DaemonProcess,
    *,
    clients: int,
    client_kills: int,
    daemon_kills: int,
    seed: int,
    shared_names: int = 6,
    keepers: int = 0,
    queuers: int = 0,
    frozen: int = 0,
) -> Verdict:
    """Let clients hammer shared names while clients and the daemon are killed and replaced, in turn.

    Args:
        daemon: which serves at the beginning and the end.
        clients: how many take shared names for moments; these are killed, and queuers.
        client_kills: how many SIGKILLs of clients.
        daemon_kills: and of the daemon, in any order.
        seed: of the order, and of what the clients do.
        shared_names: how many names they share.
        keepers: how many more hold a name of their own all the time, which others try to get.
        queuers: how many more wait without end, and hold for a while what they get.
        frozen: how many at most are stopped at a time, each for some kills.
    """
    print(
        f"seed {seed}: {clients} clients, {keepers} keepers, {queuers} queuers, {client_kills} of them killed, ", end=""
    )
    print(f"the daemon killed {daemon_kills} times")
    herd = _Herd(daemon.registry, seed, shared_names, keepers)
    numbers: dict[Role, int] = {"hammer": clients, "keep": keepers, "queue": queuers}
    try:
        for role, number in numbers.items():
            for place in range(number):
                herd.add(role, place)
        victims = ["client"] * client_kills + ["daemon"] * daemon_kills
        herd.chance.shuffle(victims)
        herd.await_beginning()
        for victim in victims:
            herd.await_growth()
            herd.freeze_and_thaw(frozen)
            if victim == "daemon":
                _kill_daemon(daemon, herd.chance if frozen else None)
            else:
                herd.kill_one()
        herd.thaw_all()
        herd.await_growth()
        return herd.finish()
    finally:
        herd.end()


def _kill_daemon(daemon: DaemonProcess, chance: random.Random | None) -> None:
    """SIGKILL and start again; with `chance` at any moment, and now and then also while it starts."""
    if chance is not None:
        time.sleep(chance.random() * 0.1)
        if chance.random() < 0.1:
            daemon.kill()
            daemon.spawn()
            time.sleep(chance.random() * START_S)
    daemon.restart()


class _Herd:
    """The hammering clients of a run: living, frozen among them, and dead."""

    def __init__(self, registry: Path, seed: int, shared_names: int, kept_names: int) -> None:
        self.chance = random.Random(seed)
        self._registry = registry
        self._seed = seed
        self._shared_names = shared_names
        self._kept_names = kept_names
        self._living: list[HammerProcess] = []
        self._dead: list[HammerProcess] = []
        self._frozen: dict[HammerProcess, int] = {}
        """Who is stopped, and for how many more kills."""

    def add(self, role: Role, place: int) -> None:
        """Start one more; `place` tells keepers apart."""
        number = self._seed * 100_000 + len(self._living) + len(self._dead)
        record = self._registry.parent / f"record-{number}"
        job = Job(str(self._registry), str(record), number, role, place, self._shared_names, self._kept_names)
        self._living.append(HammerProcess(job))

    def kill_one(self) -> None:
        """SIGKILL one that is no keeper, and start another in its place."""
        victim = self.chance.choice([hammer for hammer in self._living if hammer.job.role != "keep"])
        victim.kill()
        self._frozen.pop(victim, None)
        self._living.remove(victim)
        self._dead.append(victim)
        self.add(victim.job.role, victim.job.place)

    def freeze_and_thaw(self, most: int) -> None:
        """Stop one more, if fewer than `most` are, for one to five kills; let those go on whose time is over."""
        for hammer in list(self._frozen):
            self._frozen[hammer] -= 1
            if self._frozen[hammer] == 0:
                del self._frozen[hammer]
                hammer.thaw()
        if len(self._frozen) < most:
            hammer = self.chance.choice([hammer for hammer in self._living if hammer not in self._frozen])
            hammer.freeze()
            self._frozen[hammer] = self.chance.randint(1, 5)

    def thaw_all(self) -> None:
        while self._frozen:
            self._frozen.popitem()[0].thaw()

    def await_beginning(self) -> None:
        until(lambda: all(h.record_bytes for h in self._living), "for every client to begin")

    def await_growth(self) -> None:
        """Wait until the clients have recorded some more, so that each kill hits work in progress."""
        enough = self._size_bytes() + 2000
        until(lambda: self._size_bytes() > enough, "for the clients to get something done")

    def _size_bytes(self) -> int:
        return sum(hammer.record_bytes for hammer in self._living)

    def finish(self) -> Verdict:
        """Let all finish what they are at, and judge what they have recorded."""
        for hammer in self._living:
            hammer.tell_to_stop()
        ended = [hammer.reap() for hammer in self._living]
        verdict = judge([hammer.recorded() for hammer in self._living + self._dead])
        verdict.faults += [f"a client ended with {status}" for status in ended if status]
        return verdict

    def end(self) -> None:
        """Kill whoever still runs."""
        for hammer in self._living:
            hammer.kill()


def check(daemon: DaemonProcess, verdict: Verdict, *, least_grants: int) -> None:
    """Fail on any broken promise, on an acknowledged identity that is not there, or where too little was done."""
    print(f"{verdict.grants} grants, {len(verdict.identities)} identities, errors {dict(verdict.errors)}")
    assert not verdict.faults, "\n".join(verdict.faults[:20])
    with RegistryClient(daemon.registry, timeout=30.0) as client:
        lost = [name for name, id in verdict.identities.items() if client.lookup(name) != id]
    assert not lost, f"acknowledged identities that are gone: {lost[:20]}"
    assert verdict.grants >= least_grants, f"void: only {verdict.grants} grants"


def restarts_s(daemon: TimedDaemon, verdict: Verdict) -> list[float]:
    """Return for each restart that granted something how long its first grant was after its execution."""
    executions = sorted(daemon.executions)[1:]
    grants = sorted(at for at in verdict.first_grants.values() if at > executions[0])
    return [at - executions[bisect.bisect(executions, at) - 1] for at in grants]


def descriptors_at_rest(daemon: DaemonProcess, patience_s: float = PATIENCE_S) -> Counter[str]:
    """Count what a daemon has open, kind by kind, while it serves one client and no other session is left."""
    with RegistryClient(daemon.registry, autostart=False) as observer:
        observer.resolve("observer", "node", acquire_lock=False)
        until(lambda: len(observer.sessions()) == 1, "for all other sessions to end", patience_s)
        return descriptors(daemon.pid)


def descriptors(pid: int) -> Counter[str]:
    """Count what a process has open, kind by kind."""
    found: Counter[str] = Counter()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:
            continue
        found["pidfd" if "pidfd" in target else re.sub(r":\[\d+\]$", "", target)] += 1
    return found


def check_nothing_left(daemon: DaemonProcess, at_rest: Counter[str], patience_s: float = PATIENCE_S) -> None:
    """Stop the daemon; fail where a descriptor of it, a session or a lock was left behind.

    Args:
        daemon: which has no clients any more.
        at_rest: `descriptors_at_rest` of this daemon, or another on the same registry, before it had any.
        patience_s: how long they may take to go: libzmq closes its connections when it comes to it.
    """
    left = descriptors_at_rest(daemon, patience_s)
    deadline = time.monotonic() + patience_s
    while left != at_rest:
        left.subtract(at_rest)
        assert time.monotonic() < deadline, f"not as many descriptors as before: {left}"
        time.sleep(0.05)
        left = descriptors_at_rest(daemon, patience_s)
    assert daemon.terminate() == 0
    check_database_at_rest(daemon.registry.with_suffix(".db"))


def check_database_at_rest(path: Path) -> None:
    """Fail where the database of a stopped daemon has a session or a lock, or is not whole."""
    database = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        rows = {table: list(database.execute(f"SELECT * FROM {table}")) for table in ("sessions", "locks")}
        assert not any(rows.values()), f"left in the database: {rows}"
        found = list(database.execute("PRAGMA integrity_check"))
        assert found == [("ok",)], found
    finally:
        database.close()


def hand_over_s(registry: Path, rounds: int) -> list[float]:
    """Kill the holder of a name `rounds` times; return how long after each kill the next waiter had it, in seconds."""
    holder, waiter, observer = Worker(registry), Worker(registry), Worker(registry)
    taken: list[float] = []
    try:
        holder.ask("resolve", "hand-over")
        for _ in range(rounds):
            waiter.tell("resolve", "hand-over", wait=60)
            until(lambda: observer.ask("get", "hand-over")["waiting"] == 1, "for the waiter to wait")
            killed_at = holder.kill()
            taken.append(waiter.answer()["at"] - killed_at)
            holder.__exit__()
            holder, waiter = waiter, Worker(registry)
            waiter.ask("hello")
    finally:
        for worker in (holder, waiter, observer):
            worker.__exit__()
    return taken


def spread_ms(seconds: list[float]) -> str:
    """Say the median, the 99th percentile and the worst, in milliseconds."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return f"p50 {statistics.median(ordered) * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, worst {ordered[-1] * 1e3:.1f} ms"


def fresh_seed() -> int:
    """Return a seed; tests print it, so that a failure can be looked at again."""
    return int(time.time()) % 100_000
