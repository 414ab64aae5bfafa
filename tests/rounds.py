"""The long runs of the promises, with counts: `make test` runs them small, `make chaos` large."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from pathlib import Path

from hammer import HammerProcess, Verdict, judge
from helpers import DaemonProcess, Worker, until


def hammer_and_kill(
    daemon: DaemonProcess, *, clients: int, client_kills: int, daemon_kills: int, seed: int, shared_names: int = 6
) -> Verdict:
    """Let `clients` processes hammer shared names while clients and the daemon are killed and replaced, in turn."""
    print(f"seed {seed}: {clients} clients, {client_kills} of them killed, the daemon killed {daemon_kills} times")
    chance = random.Random(seed)
    numbers = itertools.count(seed * 100_000)

    def another() -> HammerProcess:
        number = next(numbers)
        return HammerProcess(daemon.registry, daemon.registry.parent / f"record-{number}", number, shared_names)

    living = [another() for _ in range(clients)]
    dead: list[HammerProcess] = []
    victims = ["client"] * client_kills + ["daemon"] * daemon_kills
    chance.shuffle(victims)
    _await_records(living)
    for victim in victims:
        _await_growth(living)
        if victim == "daemon":
            daemon.restart()
        else:
            place = chance.randrange(clients)
            living[place].kill()
            dead.append(living[place])
            living[place] = another()
    _await_growth(living)
    ended = [hammer.stop() for hammer in living]
    verdict = judge(living + dead)
    verdict.faults += [f"a client ended with {status}" for status in ended if status]
    return verdict


def _await_records(living: list[HammerProcess]) -> None:
    until(lambda: all(h.record.exists() and h.record.stat().st_size for h in living), "for every client to begin")


def _await_growth(living: list[HammerProcess]) -> None:
    """Wait until the clients have recorded some more, so that each kill hits work in progress."""

    def size_bytes() -> int:
        return sum(h.record.stat().st_size for h in living if h.record.exists())

    enough = size_bytes() + 2000
    until(lambda: size_bytes() > enough, "for the clients to get something done")


def check(daemon: DaemonProcess, verdict: Verdict, *, least_grants: int) -> None:
    """Fail on any broken promise, on an acknowledged identity that is not there, or where too little was done."""
    from madsci_registry import RegistryClient

    print(f"{verdict.grants} grants, {len(verdict.identities)} identities, errors {dict(verdict.errors)}")
    assert not verdict.faults, "\n".join(verdict.faults[:20])
    with RegistryClient(daemon.registry, timeout=30.0) as client:
        lost = [name for name, id in verdict.identities.items() if client.lookup(name) != id]
    assert not lost, f"acknowledged identities that are gone: {lost[:20]}"
    assert verdict.grants >= least_grants, f"void: only {verdict.grants} grants"


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
