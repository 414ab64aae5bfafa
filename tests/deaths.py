"""Deaths by the thousand: names go from hand to hand while their holders die in all ways. `make test` runs few.

On a lane, one name goes from holder to holder: the next one waits, the holder dies in its way, the next one has the
name, and only then is cleared away what the dead one left (a zombie, a child, a descriptor, a process that has no
lifeline). Others die in the queue before it is their turn. Lanes run beside each other in threads. In a crowd, each
holds a name of its own at the same time, and all die at about once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from helpers import DaemonProcess, until
from madsci_registry import Registration, RegistryClient
from madsci_registry.protocol import RESUME_S
from mortals import WAYS
from records import Record, Verdict, judge
from rounds import spread_ms
from victims import DEADLY, Victim, Victims

IN_THE_QUEUE = ("while waiting", "between request and answer")
"""Who dies these ways holds nothing, or only for a moment."""
FREEZES_S = (0.0, 0.05, RESUME_S + 0.5)
"""How long a holder is stopped before it is killed; in the longest one, a connection would have been given up."""
BESIDE = "SIGKILL beside the crowd"
AT_ONCE = "SIGKILL of all the crowd at once"


def die_by_the_thousand(
    daemon: DaemonProcess, *, deaths: int, lanes: int, crowd: int, waiters: int, hand_overs: int, seed: int
) -> Verdict:
    """Let so many clients die, and judge what they recorded.

    Args:
        daemon: which serves.
        deaths: how many in all; whoever is not named below dies on a lane.
        lanes: how many names go from hand to hand at the same time.
        crowd: how many have a name each, and die at once.
        waiters: how many of these names are waited for; who gets them dies too.
        hand_overs: how often a name changes hands beside the crowd.
        seed: of who dies in which way.
    """
    print(f"seed {seed}: {deaths} client deaths, {crowd} sessions at once, {waiters} of their names waited for")
    chance = random.Random(seed)
    with Victims(daemon.registry) as victims, RegistryClient(daemon.registry, timeout=30.0) as observer:
        run = _Run(victims, observer, chance)
        run.crowd(crowd, waiters, hand_overs)
        run.lanes(lanes, _dealt(deaths - len(victims.all), chance), seed)
        assert victims.dead == len(victims.all) == deaths
        records = [victim.record for victim in victims.all]
        records.append(_take_all(observer, {victim.name for victim in victims.all}))
        verdict = judge(records)
        verdict.faults += victims.faults + run.faults
    for label, seconds in sorted(verdict.hand_overs.items()):
        print(f"  {label}: {len(seconds)} hand-overs, {spread_ms(seconds)}")
    return verdict


def _dealt(count: int, chance: random.Random) -> list[str]:
    """Return so many ways to die, each as often as any other, in any order."""
    ways = (list(WAYS) * (count // len(WAYS) + 1))[:count]
    chance.shuffle(ways)
    return ways


def _take_all(observer: RegistryClient, names: set[str]) -> Record:
    """Take all names at once: none is left locked."""
    record = Record("the observer", [])
    for name, granted in zip(names, observer.resolve_many((name, "node") for name in names), strict=True):
        if isinstance(granted, Registration):
            record.lines.append(f"G {name} {granted.fencing_token} {granted.id} {time.monotonic():.6f}")
        else:
            record.lines.append(f"L {name} 0 {time.monotonic():.6f}")
    record.killed_at = time.monotonic()
    observer.release_all()
    return record


class _Run:
    """One run: the crowd, then the lanes."""

    def __init__(self, victims: Victims, observer: RegistryClient, chance: random.Random) -> None:
        self.victims = victims
        self.observer = observer
        self.chance = chance
        self.faults: list[str] = []

    def crowd(self, size: int, waiters: int, hand_overs: int) -> None:
        """Have so many sessions at once, hand a name over beside them, kill all at once; then their heirs die."""
        began = time.monotonic()
        crowd = [self.victims.start("SIGKILL", f"crowd-{i}", AT_ONCE) for i in range(size)]
        for victim in crowd:
            victim.until("ready", 120.0)
        sessions = self.observer.status()["sessions"]
        print(f"{sessions} sessions after {time.monotonic() - began:.1f} s")
        assert sessions > size
        self._hand_over(hand_overs)
        ways = [way for way in WAYS if way not in IN_THE_QUEUE]
        heirs = [self.victims.start(ways[i % len(ways)], f"crowd-{i}", "any way at once") for i in range(waiters)]
        until(lambda: self.observer.status()["waiting"] == waiters, "for the heirs to wait", 120.0)
        self._all_die(crowd, heirs)
        self._all_die(heirs, [])

    def _hand_over(self, times: int) -> None:
        """Let one name go from hand to hand, its holders killed one by one while the next one waits."""
        holder = self.victims.start("SIGKILL", "hand-over", BESIDE)
        for _ in range(times):
            holder.until("ready")
            heir = self.victims.start("SIGKILL", "hand-over", BESIDE)
            until(lambda: self.observer.get("hand-over").waiting == 1, "for the heir to wait")
            self.victims.end(holder)
            holder = heir
        holder.until("ready")
        self.victims.end(holder)

    def _all_die(self, dying: list[Victim], heirs: list[Victim]) -> None:
        for victim in dying:
            victim.die()
        for heir in heirs:
            heir.until("ready", 120.0)
        for victim in dying:
            self.victims.finish(victim)

    def lanes(self, count: int, ways: list[str], seed: int) -> None:
        """Run lanes beside each other, the ways dealt out to them."""
        with ThreadPoolExecutor(count) as pool:
            running = [
                pool.submit(_Lane(self, f"lane-{i}", random.Random(f"{seed}-{i}")).run, ways[i::count])
                for i in range(count)
            ]
        for lane in running:
            lane.result()


class _Lane:
    """One name and those through whose hands it goes."""

    def __init__(self, run: _Run, name: str, chance: random.Random) -> None:
        self.victims = run.victims
        self.faults = run.faults
        self.name = name
        self.chance = chance

    def run(self, ways: Iterable[str]) -> None:
        """Let the holders die in these ways, one after the other."""
        holder: Victim | None = None
        queue: list[Victim] = []
        for way in ways:
            if way in IN_THE_QUEUE:
                # A name that nobody holds is granted, often to who does not live to hear of it.
                is_free = way != "while waiting" and self.chance.random() < 0.5
                queue.append(self.victims.start(way, f"{self.name}-aside" if is_free else self.name))
            else:
                holder, queue = self._hand_over(holder, queue, way), []
        self._kill(queue)
        if holder is not None:
            self.victims.end(holder)
            self.victims.finish(holder)

    def _hand_over(self, holder: Victim | None, queue: list[Victim], way: str) -> Victim:
        """Let the holder die, and some who wait before and after it; return the next holder."""
        for victim in queue:
            victim.until("W")
        heir = self.victims.start(way, self.name)
        heir.until("W")
        time.sleep(self.chance.random() * 0.05)
        early = queue[: self.chance.randint(0, len(queue))]
        self._kill(early)
        if holder is not None:
            self.victims.end(holder, self.chance.choice(FREEZES_S))
        self._kill(queue[len(early) :])
        heir.until("ready")
        if holder is not None:
            self.victims.finish(holder)
            if all(victim in early and victim.way == "while waiting" for victim in queue):
                self._check_nobody_between(holder, heir)
        return heir

    def _kill(self, queue: list[Victim]) -> None:
        for victim in queue:
            victim.until("W")
            if victim.way == "while waiting":
                time.sleep(self.chance.random() * 0.03)
                victim.kill(self.chance.choice(DEADLY))
            self.victims.reap(victim)

    def _check_nobody_between(self, holder: Victim, heir: Victim) -> None:
        """Who was dead before the name was free was granted nothing: each grant counts the token up by one."""
        if heir.token != holder.token + 1:
            self.faults.append(f"{self.name}: somebody dead was granted it between {holder.token} and {heir.token}")
