"""Every store of a lab, driven at random: terms, holders and ULIDs against what was answered before."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from helpers import FakeClock
from lab_stores import LEASE_S, STORES, ULIDS, Host, state
from madsci_registry.errors import ConflictError, HeldError, NotFoundError, SessionRequiredError
from madsci_registry_lab.store import Change, GivenAwayError, HeldInLabError, Lock

NAMES = st.sampled_from(["arm", "leg", "eye"])
HOSTS = st.sampled_from(["a", "b", "c"])
NUMBERS = st.integers(0, 5)
EXAMPLES = {"etcd": 6}
"""Each step of it is a few requests."""


class Lab(RuleBasedStateMachine):
    """Three hosts and three names on one store; what was promised is remembered here."""

    kind = "sqlite"

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.end = ExitStack()
        folder = Path(self.end.enter_context(tempfile.TemporaryDirectory()))
        self.stores = self.end.enter_context(STORES[self.kind](folder, self.clock))
        self.store = self.stores.open()
        self.hosts = {name: Host(self.store, name) for name in ("a", "b", "c")}
        self.held: dict[str, Lock] = {}
        """By name: the lock of a session that lives, as it was answered."""
        self.terms: dict[str, int] = {}
        """By name: the highest term that was answered."""
        self.known: set[str] = set()
        """ULIDs that were answered."""
        self.marks = {"a": 0, "b": 0, "c": 0}

    def teardown(self) -> None:
        self.end.close()

    @rule(host=HOSTS, name=NAMES, n=NUMBERS)
    def resolve(self, host: str, name: str, n: int) -> None:
        try:
            self.known.add(self.hosts[host].resolve(name, n))
        except ConflictError:
            assert self.store.find(id=ULIDS[n]).name != name

    @rule(host=HOSTS, name=NAMES, n=NUMBERS, retired=st.booleans(), sync=st.booleans(), at=st.integers(0, 9))
    def tell(self, host: str, name: str, n: int, retired: bool, sync: bool, at: int) -> None:
        after = self.marks[host]
        change = Change(after + 1, state(name, n, at=at, retired=retired))
        self.store.apply(host, 1, None if sync else after, after + 1, [change])
        self.marks[host] += 1
        if all(c.id != ULIDS[n] for c in self.store.conflicts(decided=False, after=("", ""), limit=99)):
            self.known.add(ULIDS[n])
        self.look_again()

    @rule(host=HOSTS, name=NAMES, go_on=st.booleans(), proposal=st.integers(0, 50))
    def lock(self, host: str, name: str, go_on: bool, proposal: int) -> None:
        term = self.terms.get(name) if go_on else None
        try:
            lock = self.hosts[host].lock(name, proposal, term)
        except HeldInLabError:
            assert self.held[name].host != host
        except GivenAwayError:
            assert go_on
        except NotFoundError:
            assert name not in self.held
        else:
            before = self.held.get(name)
            if before is not None:
                assert lock == before
            elif go_on and lock.term == term:
                assert self.store.given([name])[name] == (term, host)
            else:
                assert lock.term > max(self.terms.get(name, 0), proposal)
            self.held[name] = lock
            self.terms[name] = lock.term

    @rule(name=NAMES, wrong=st.booleans())
    def release(self, name: str, wrong: bool) -> None:
        lock = self.held.get(name)
        if lock is not None:
            released = self.store.release(lock.host, lock.session, {name: lock.term + wrong})
            assert released == ([] if wrong else [name])
            if released:
                del self.held[name]

    @rule(name=NAMES, n=NUMBERS)
    def merge(self, name: str, n: int) -> None:
        try:
            assert self.store.merge("a", name, ULIDS[n]).id == ULIDS[n]
        except (NotFoundError, HeldError):
            pass

    @rule(host=HOSTS)
    def boot(self, host: str) -> None:
        self.hosts[host] = Host(self.store, host)
        self.held = {name: lock for name, lock in self.held.items() if lock.host != host}

    @rule(seconds=st.integers(1, 20), living=HOSTS)
    def pass_time(self, seconds: int, living: str) -> None:
        for _ in range(seconds):
            self.clock.advance(1)
            try:
                self.hosts[living].keep()
            except SessionRequiredError:
                self.boot(living)
            self.store.expire()
        left = {s.host for s in self.store.sessions()}
        assert living in left
        self.held = {name: lock for name, lock in self.held.items() if lock.host in left}
        if seconds >= LEASE_S:
            assert left == {living}
        for gone in self.hosts.keys() - left:
            self.boot(gone)

    @rule()
    def restart(self) -> None:
        self.stores.close()
        self.clock.advance(1)
        self.store = self.stores.open()
        for host in self.hosts.values():
            host.store = self.store

    def look_again(self) -> None:
        """A rename may have moved a lock to a name whose terms were lower or higher: it is the same host's, and the
        terms of that name have grown."""
        found = {lock.name: lock for host in self.hosts.values() for lock in self.store.locks(host.session.id)}
        assert len(found) == len(self.held)
        for name, lock in found.items():
            if name not in self.held:
                assert lock.term > self.terms.get(name, 0)
                self.terms[name] = lock.term
        self.held = found

    @invariant()
    def locks_are_as_answered(self) -> None:
        """Whoever was answered a lock has it, and nobody else."""
        found = [lock for host in self.hosts.values() for lock in self.store.locks(host.session.id)]
        assert {lock.name: lock for lock in found} == self.held
        assert len(found) == len(self.held)

    @invariant()
    def ulids_are_never_forgotten(self) -> None:
        """Every ULID that was answered is found, and is one of its component's."""
        for id in self.known:
            entry = self.store.find(id=id)
            assert id in (entry.id, *entry.other_ids)

    @invariant()
    def terms_never_go_back(self) -> None:
        """No name has a lower term than the highest that was answered for it."""
        for name, (term, _) in self.store.given([*self.terms]).items():
            assert term >= self.terms[name]


@pytest.mark.parametrize("kind", STORES)
def test_store_at_random_keeps_what_it_answered(kind: str) -> None:
    """Whatever hosts do, in whatever order, over restarts and silences: terms only grow, each lock is one host's, no
    ULID is forgotten."""
    machine = type("Machine", (Lab,), {"kind": kind})
    quiet = [HealthCheck.too_slow]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES.get(kind, 20), stateful_step_count=40, deadline=None, suppress_health_check=quiet
        ),
    )
