"""A lab on etcd driven at random through three replicas, while answers are lost, come twice, or requests come late.

The feed is the truth that everything else is compared with: what was answered is in it once, and who follows it sees no
name with two holders, no term that goes back, no component that is made twice.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any, Literal, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import etcd
from helpers import FakeClock
from lab_stores import LEASE_S, ULIDS, state
from madsci_registry.errors import (
    ConflictError,
    HeldError,
    NotFoundError,
    SessionRequiredError,
    UnavailableError,
)
from madsci_registry_lab.etcd_access import parse
from madsci_registry_lab.etcd_store import EtcdStore
from madsci_registry_lab.etcd_wire import Done, Range, Txn
from madsci_registry_lab.store import Change, Event, HeldInLabError, Lock, Mark, State, Want

pytestmark = pytest.mark.skipif(not etcd.is_here(), reason=etcd.WHY_NOT)

Fault = Literal["none", "twice", "lost", "late", "again later"]
"""What becomes of a transaction. twice: its first answer is lost, and the gateway sends it again. lost: it is done, and
nobody learns it. late: nobody learns of it, and it comes when much else has happened. again later: it is answered, and
comes once more later."""
FAULTS = st.sampled_from(["none", "none", "twice", "lost", "late", "again later"])
NAMES = st.sampled_from(["a", "a/", "a\u00e4", "b", "\U0001f52c"])
"""Some are the beginning of others."""
HOSTS = st.sampled_from(["h", "h1", "h/1"])
REPLICAS = st.integers(0, 2)
NUMBERS = st.integers(0, 7)

_numbers = itertools.count()
_Result = TypeVar("_Result")


class Network:
    """Between a replica and etcd: has one fault for the next transaction that writes."""

    def __init__(self, store: EtcdStore, late: list[Callable[[], object]]) -> None:
        self._plain, self._late = store._gateway.txn, late
        self.next: Fault = "none"
        store._gateway.txn = self._txn  # type: ignore[method-assign] # that is the point

    def _txn(self, request: Txn) -> Done:
        fault = self.next
        if fault == "none" or all(isinstance(op, Range) for op in request.then):
            return self._plain(request)
        self.next = "none"
        if fault == "twice":
            self._plain(request)
        elif fault == "again later":
            self._late.append(lambda: self._plain(request))
        elif fault == "late":
            self._late.append(lambda: self._plain(request))
            raise UnavailableError("nothing came back")
        elif fault == "lost":
            self._plain(request)
            raise UnavailableError("nothing came back")
        return self._plain(request)


class Lab:
    """Three replicas of one lab, the hosts' sessions, and what was answered."""

    def __init__(self, end: ExitStack) -> None:
        self.clock = FakeClock()
        access = parse(f"{etcd.shared().url}/random-{next(_numbers)}")
        self.stores = [end.enter_context(closing(EtcdStore(access, self.clock))) for _ in range(3)]
        self.late: list[Callable[[], object]] = []
        self.networks = [Network(store, self.late) for store in self.stores]
        self.start = self.stores[0].changes(None, 1).cursor
        self.told: Counter[tuple[object, ...]] = Counter()
        """Changes that were answered; a lock that is answered again is the same one."""
        self.sessions: dict[str, str] = {}
        self.marks: dict[str, int] = {}
        self.ops = itertools.count()
        for host in ("h", "h1", "h/1"):
            self.register(host, 0, "none")

    def doing(self, at: int, fault: Fault, operation: Callable[[EtcdStore], _Result]) -> _Result:
        """Do something at a replica; where its outcome is unknown, do it again at the next one."""
        self.networks[at].next = fault
        try:
            return operation(self.stores[at])
        except UnavailableError:
            return operation(self.stores[(at + 1) % 3])
        finally:
            self.networks[at].next = "none"

    def register(self, host: str, at: int, fault: Fault) -> None:
        self.sessions[host] = self.doing(at, fault, lambda s: s.register(host, "boot", LEASE_S, "")).id

    def resolve(self, host: str, name: str, n: int, at: int, fault: Fault, locking: bool) -> None:
        op, want = str(next(self.ops)), Want(proposal=n) if locking else None
        try:
            done = self.doing(at, fault, lambda s: s.resolve(host, op, state(name, n), self.sessions[host], want))
        except (HeldInLabError, SessionRequiredError, ConflictError):
            return
        if done.is_new:
            self.told["created", name, done.entry.id] += 1
        if done.lock is not None:
            self.told["granted", name, host, done.lock.term] = 1

    def acquire(self, host: str, names: list[str], at: int, fault: Fault) -> None:
        wants = [(name, Want()) for name in names]
        for lock in self.doing(at, fault, lambda s: s.acquire(host, self.sessions[host], wants)):
            if isinstance(lock, Lock):
                self.told["granted", lock.name, host, lock.term] = 1
            else:
                assert isinstance(lock, (HeldInLabError, NotFoundError, SessionRequiredError)), lock

    def release(self, host: str, at: int, fault: Fault) -> None:
        held = {lock.name: lock.term for lock in self.stores[at].locks(self.sessions[host])}
        released: list[str] = []
        for store in (at, at + 1):
            self.networks[at].next = fault if store == at else "none"
            try:
                released += self.stores[store % 3].release(host, self.sessions[host], {**held})
                break
            except UnavailableError:
                continue
        self.networks[at].next = "none"
        assert sorted(released) == sorted(held) or fault == "lost"
        for name in released:
            self.told["released", name, host, held[name]] += 1

    def tell(self, host: str, words: list[State], at: int, fault: Fault) -> None:
        after = self.marks.get(host, 0)
        changes = [Change(after + k, word) for k, word in enumerate(words, 1)]
        done = self.doing(at, fault, lambda s: s.apply(host, 1, after, after + len(words), changes))
        assert done.mark == Mark(1, after + len(words))
        self.marks[host] = after + len(words)

    def check(self) -> list[Event]:
        """Compare all replicas with each other, with what was answered, and with what the feed tells."""
        events = self.feed(self.stores[0], 1000)
        for store in self.stores[1:]:
            assert self.feed(store, random.randint(1, 30)) == events
        revisions = [event.revision for event in events]
        assert revisions == sorted(set(revisions))
        holders, terms = _followed(events)
        found = Counter(_told(event) for event in events)
        for told, count in self.told.items():
            assert found[told] == count, told
        assert max((found[key] for key in found if key[0] in ("created", "granted", "released")), default=1) == 1
        store = random.choice(self.stores)
        for entry in store.entries("", 1000):
            assert store.find(id=entry.id).name == store.find(name=entry.name).name == entry.name
            if entry.lock is not None:
                assert holders[entry.name] == (entry.lock.host, entry.lock.term)
            assert entry.term >= terms.get(entry.name, 0)
            for event in store.history(entry.name, 0, 1000):
                assert event in events or event.revision < revisions[0]
        held = [lock.name for session in self.sessions.values() for lock in store.locks(session)]
        assert len(held) == len(set(held))
        for host, revision in self.marks.items():
            assert store.mark(host) == Mark(1, revision)
        return events

    def feed(self, store: EtcdStore, limit: int) -> list[Event]:
        """Read all that a replica tells, once it has heard of all that was answered anywhere."""
        store.changes(None, 1)
        cursor, found = self.start, list[Event]()
        while (page := store.changes(cursor, limit)).events:
            found += page.events
            cursor = page.cursor
        return found


def _told(event: Event) -> tuple[object, ...]:
    if event.kind == "created":
        return ("created", event.name, event.id)
    kind = "granted" if event.kind == "moved" else event.kind  # with a renamed component
    return (kind, event.name, event.host, event.why.get("term"))


def _followed(events: list[Event]) -> tuple[dict[str, tuple[Any, int]], dict[str, int]]:
    """Return who holds what in the end, and the highest terms; each step must be possible."""
    holders: dict[str, tuple[Any, int]] = {}
    terms: dict[str, int] = {}
    for event in events:
        name = event.name or ""
        if event.kind in ("granted", "moved"):
            if event.kind == "moved":
                holders.pop(event.why["was"])
            assert name not in holders, f"{name} has two holders"
            assert event.why["term"] > terms.get(name, 0), f"the term of {name} does not grow"
            holders[name] = event.host, event.why["term"]
            terms[name] = event.why["term"]
        elif event.kind == "released":
            assert holders.pop(name) == (event.host, event.why["term"])
    return holders, terms


class Machine(RuleBasedStateMachine):
    """Three hosts at three replicas, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.end = ExitStack()
        self.lab = Lab(self.end)

    def teardown(self) -> None:
        try:
            self.arrive()
            self.lab.check()
        finally:
            self.end.close()

    @rule(host=HOSTS, name=NAMES, n=NUMBERS, at=REPLICAS, fault=FAULTS, locking=st.booleans())
    def resolve(self, host: str, name: str, n: int, at: int, fault: Fault, locking: bool) -> None:
        self.lab.resolve(host, name, n, at, fault, locking)

    @rule(host=HOSTS, names=st.lists(NAMES, min_size=1, unique=True), at=REPLICAS, fault=FAULTS)
    def acquire(self, host: str, names: list[str], at: int, fault: Fault) -> None:
        self.lab.acquire(host, names, at, fault)

    @rule(host=HOSTS, at=REPLICAS, fault=FAULTS)
    def release(self, host: str, at: int, fault: Fault) -> None:
        self.lab.release(host, at, fault)

    @rule(host=HOSTS, words=st.lists(st.tuples(NAMES, NUMBERS, st.booleans()), max_size=4), at=REPLICAS, fault=FAULTS)
    def tell(self, host: str, words: list[tuple[str, int, bool]], at: int, fault: Fault) -> None:
        self.lab.tell(host, [state(name, n, retired=retired) for name, n, retired in words], at, fault)

    @rule(host=HOSTS, at=REPLICAS, fault=FAULTS)
    def register(self, host: str, at: int, fault: Fault) -> None:
        self.lab.register(host, at, fault)

    @rule(name=NAMES, n=NUMBERS, at=REPLICAS, fault=FAULTS)
    def merge(self, name: str, n: int, at: int, fault: Fault) -> None:
        try:
            self.lab.doing(at, fault, lambda s: s.merge("h", name, ULIDS[n]))
        except (NotFoundError, HeldError):
            pass

    @rule(seconds=st.integers(1, 16), living=HOSTS, at=REPLICAS, fault=FAULTS)
    def pass_time(self, seconds: int, living: str, at: int, fault: Fault) -> None:
        """One host is heard, at any replica; others may lose their sessions."""
        lab = self.lab
        lab.register(living, at, "none")
        for n in range(seconds):
            lab.clock.advance(1)
            if n % 5 == 0:
                lab.doing((at + n) % 3, fault, lambda s: s.keep(living, lab.sessions[living], "boot"))
            for store in lab.stores[: 1 + n % 3]:
                store.expire()
        assert living in {session.host for session in lab.stores[at].sessions()}
        if seconds >= LEASE_S:
            for store in lab.stores:
                store.expire()

    @precondition(lambda self: self.lab.late)
    @rule()
    def arrive(self) -> None:
        """What was under way comes in."""
        while self.lab.late:
            self.lab.late.pop(0)()

    @invariant()
    def feed_is_possible(self) -> None:
        _followed(self.lab.feed(self.lab.stores[0], 1000))


def test_replicas_at_random_keep_what_they_answered() -> None:
    """Whatever answers are lost, or requests come late or twice: each answered change is told once and in order by all
    replicas, a name has one component and one holder, terms grow, marks do not go back."""
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=8, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


def test_hosts_at_once_at_three_replicas_keep_what_was_answered() -> None:
    """The same while nine threads write at once, to the same names."""
    with ExitStack() as end:
        lab = Lab(end)
        guard = threading.Lock()
        made: Counter[str] = Counter()
        granted: list[tuple[str, int]] = []

        def work(n: int) -> None:
            dice = random.Random(n)
            host, names = ("h", "h1", "h/1")[n % 3], ["a", "a/", "b", "c"]
            for k in range(25):
                store = dice.choice(lab.stores)
                lab.networks[lab.stores.index(store)].next = dice.choice(["none", "none", "twice", "again later"])
                name = dice.choice(names)
                done = store.resolve(host, f"{n}.{k}", state(name, 10 * n + names.index(name)), None, None)
                with guard:
                    made[name] += done.is_new
                (lock,) = store.acquire(host, lab.sessions[host], [(name, Want())])
                if isinstance(lock, Lock):
                    with guard:
                        granted.append((name, lock.term))
                    dice.choice(lab.stores).release(host, lab.sessions[host], {name: lock.term})
                elif not isinstance(lock, HeldInLabError):
                    raise lock
                if k % 5 == 0:
                    dice.choice(lab.stores).keep(host, lab.sessions[host], "boot")
                    dice.choice(lab.stores).expire()

        with ThreadPoolExecutor(9) as pool:
            for done in [pool.submit(work, n) for n in range(9)]:
                done.result()
        while lab.late:
            lab.late.pop()()
        events = lab.check()
        assert set(made.values()) == {1}
        told = {(event.name, event.why["term"]) for event in events if event.kind == "granted"}
        assert set(granted) <= told
        assert _followed(events)[0] == {}
