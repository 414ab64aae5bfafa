"""Three hosts and their lab, driven at random: no name is confirmed twice, tokens grow, holders know what they hold.

Time passes, connections are cut, answers get lost, daemons and the lab are started anew, processes die, components are
renamed by force. What each client believes follows from answers and lines alone.
"""

from __future__ import annotations

import itertools
import tempfile
from contextlib import ExitStack
from pathlib import Path

from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from lab_pairs import joined
from madsci_registry import protocol
from madsci_registryd.store import Lock
from pair import Asked, Client

NAMES = st.sampled_from(["arm", "leg"])
ALL_NAMES = ["arm", "leg", "eye"]
HOSTS = st.sampled_from(["a", "b", "c"])
SLOTS = st.integers(0, 1)
HEALED_S = 35.0


class Lab(RuleBasedStateMachine):
    """Three hosts with two client processes each, and three names."""

    def __init__(self) -> None:
        super().__init__()
        self.end = ExitStack()
        self.hosts = self.end.enter_context(joined(Path(self.end.enter_context(tempfile.TemporaryDirectory()))))
        self.serial = itertools.count(1)
        for letter in "abc":
            self.hosts.start(letter)
        self.clients = {letter: [self._client(letter) for _ in range(2)] for letter in "abc"}
        self.waiting: list[tuple[str, Client, str, Asked]] = []
        self.held: dict[tuple[str, str, str], int] = {}
        """What clients believe: (host, session, name) to the token."""
        self.seqs: dict[Asked, int] = {}
        self.heard = dict.fromkeys("abc", 0)
        self.best: dict[str, tuple[int, tuple[str, str]]] = {}
        """By name: the highest token that was confirmed, and whose."""

    def _client(self, letter: str) -> Client:
        return self.hosts[letter].session(f"s{next(self.serial):04}")

    def teardown(self) -> None:
        try:
            self.heal()
        finally:
            self.end.close()

    # what happens

    @rule(letter=HOSTS, slot=SLOTS, name=NAMES, lock=st.sampled_from([True, True, True, False]), wait=st.booleans())
    def resolve(self, letter: str, slot: int, name: str, lock: bool, wait: bool) -> None:
        host, client = self.hosts[letter], self.clients[letter][slot]
        seq, wait_s = next(self.serial), 9.0 if wait and lock else 0.0
        asked = client.resolve(name, turn=False, seq=seq, acquire_lock=lock, wait_s=wait_s)
        self.seqs[asked] = seq
        host.settle()
        self.waiting.append((letter, client, name, asked))

    @rule(letter=HOSTS, slot=SLOTS, name=NAMES)
    def release(self, letter: str, slot: int, name: str) -> None:
        client = self.clients[letter][slot]
        token = self.held.pop((letter, client.id, name), None)
        if token is not None:
            assert client.release(name, token)
            self.hosts[letter].settle()

    @rule(letter=HOSTS, mode=st.sampled_from(["up", "up", "down", "deaf"]))
    def cut(self, letter: str, mode: str) -> None:
        self.hosts[letter].cut(mode)

    @rule(seconds=st.sampled_from([0.5, 2.0, 6.0, 17.0]))
    def wait(self, seconds: float) -> None:
        self.hosts.wait(seconds)

    @rule(seconds=st.sampled_from([1.0, 20.0]))
    def sleep(self, seconds: float) -> None:
        """All hosts sleep; the lab does not notice."""
        self.hosts.lab.clock.sleep(seconds)

    @rule(seconds=st.sampled_from([-100_000.0, 50.0]))
    def turn_clock(self, seconds: float) -> None:
        """The wall clock jumps."""
        self.hosts.lab.clock.jump(seconds)

    @rule(letter=HOSTS)
    def restart(self, letter: str) -> None:
        host = self.hosts[letter]
        self.waiting = [each for each in self.waiting if each[0] != letter or each[3].reply is not None]
        host.restart()
        host.settle()
        self.heard[letter] = len(host.told)
        for client in self.clients[letter]:
            self._resume(letter, client)

    @rule(letter=HOSTS, slot=SLOTS)
    def reconnect(self, letter: str, slot: int) -> None:
        client = self.clients[letter][slot]
        client.drop()
        self.hosts[letter].settle()
        self._resume(letter, client)

    def _resume(self, letter: str, client: Client) -> None:
        """Come back as a client does: the welcome says what is held, and what it is called by now."""
        host = self.hosts[letter]
        core = host.core
        if client.id not in core.registrar.sessions:  # it held nothing: a session that left no trace
            self.clients[letter][self.clients[letter].index(client)] = self._client(letter)
            assert not [key for key in self.held if key[:2] == (letter, client.id)]
            return
        client.resume()
        mine = {name: token for (at, id, name), token in self.held.items() if (at, id) == (letter, client.id)}
        holds = [protocol.Hold(name=name, instance="i", fencing_token=token) for name, token in mine.items()]
        for line in core.service.renamed_away(client.id, holds):
            if mine.get(line["name"]) == line["old_token"]:
                del mine[line["name"]]
                mine[line["to"]] = line["fencing_token"]
        there = {name: token for name, _, token in core.store.locks_of(client.id)}
        self._forget(letter, client)
        for name, token in mine.items():
            if there.get(name) == token:
                self.held[letter, client.id, name] = token
        for name, token in there.items():  # what it does not know it gives back
            if (letter, client.id, name) not in self.held and not self._is_awaited(client, name):
                client.release(name, token)
        host.settle()
        for _, _, _, asked in [each for each in self.waiting if each[1] is client and each[3].reply is None]:
            core.registrar.cancel(client.record, self.seqs[asked])  # it gives up what it had asked
        host.settle()
        self.waiting = [each for each in self.waiting if each[1] is not client or each[3].reply is not None]

    def _is_awaited(self, client: Client, name: str) -> bool:
        return any(each[1] is client and each[2] == name and each[3].reply is not None for each in self.waiting)

    def _forget(self, letter: str, client: Client) -> None:
        self.held = {key: token for key, token in self.held.items() if key[:2] != (letter, client.id)}

    @rule(letter=HOSTS, slot=SLOTS)
    def die(self, letter: str, slot: int) -> None:
        client = self.clients[letter][slot]
        client.ended()
        self.hosts[letter].settle()
        self.waiting = [each for each in self.waiting if each[1] is not client]
        self._forget(letter, client)
        self.clients[letter][slot] = self._client(letter)

    @rule(letter=HOSTS, old=NAMES, new=st.sampled_from(ALL_NAMES))
    def rename(self, letter: str, old: str, new: str) -> None:
        host = self.hosts[letter]
        row = host.core.store.by_name(old)
        if row is not None and old != new:
            self.clients[letter][0].send("rename", old=old, new=new, id=row.id, force=True, turn=False)
            host.settle()

    @rule()
    def restart_lab(self) -> None:
        self.hosts.lab.restart()

    # what has to be

    @invariant()
    def clients_know_what_they_hold(self) -> None:
        """What a client was told is what the daemon has: nobody lost, gained, or kept a lock unknowingly."""
        for letter, client, name, asked in [each for each in self.waiting if each[3].reply is not None]:
            self.waiting.remove((letter, client, name, asked))
            token = asked.ok()["fencing_token"] if asked.code == "ok" else None
            if token is not None:
                self.held[letter, client.id, name] = max(token, self.held.get((letter, client.id, name), 0))
        for letter, host in self.hosts.all.items():
            for session, line in host.told[self.heard[letter] :]:
                self._hear(letter, session, line)
            self.heard[letter] = len(host.told)
            mine = {key: token for key, token in self.held.items() if key[0] == letter}
            rows = host.core.store.components(limit=-1)
            held = [(row.name, row.lock) for row in rows if row.lock is not None]
            assert mine == {(letter, lock.owner.session, name): lock.fencing_token for name, lock in held}

    def _hear(self, letter: str, session: str, line: dict[str, object]) -> None:
        key = letter, session, str(line["name"])
        token, said = self.held.get(key), line["fencing_token"]
        assert isinstance(said, int)
        if line["op"] == "lost" and token is not None and token <= said:
            del self.held[key]
        elif line["op"] == "renamed" and token == line["old_token"]:
            del self.held[key]
            self.held[letter, session, str(line["to"])] = said
        elif line["op"] == "lab" and token == line["old_token"]:
            self.held[key] = said

    @invariant()
    def no_name_is_confirmed_twice(self) -> None:
        """At no time do two hosts have a name confirmed, connected or not; tokens of what is confirmed only grow."""
        for name in ALL_NAMES:
            confirmed = [(letter, lock) for letter, lock in self._locks(name) if self._is_confirmed(letter, name)]
            assert len(confirmed) <= 1, confirmed
            for letter, lock in confirmed:
                before, whose = self.best.get(name, (-1, ("", "")))
                now = lock.fencing_token, (letter, lock.acquired_at + lock.owner.session)
                assert now[0] > before or (now == (before, whose)), (name, now, before, whose)
                self.best[name] = now

    def _locks(self, name: str) -> list[tuple[str, Lock]]:
        rows = [(letter, host.core.store.by_name(name)) for letter, host in self.hosts.all.items()]
        return [(letter, row.lock) for letter, row in rows if row is not None and row.lock is not None]

    def _is_confirmed(self, letter: str, name: str) -> bool:
        row = self.hosts[letter].core.store.by_name(name)
        assert row is not None
        return self.hosts[letter].side.tenures.standing(row) == "confirmed"

    def _name_in_lab(self, letter: str, name: str) -> str:
        """Return under which name the lab has a lock: another one where it refuses a rename."""
        tenure = self.hosts[letter].side.tenures._tenures.get(name)
        return tenure.told_as or name if tenure else name

    def heal(self) -> None:
        """When all is well again, all that is held is confirmed, or known to be held twice; the lab has no lock that
        nobody uses."""
        for host in self.hosts.all.values():
            host.cut("up")
        self.hosts.wait(HEALED_S)
        self.clients_know_what_they_hold()
        self.no_name_is_confirmed_twice()
        store = self.hosts.lab.registry.store
        locks = {lock.name: lock.host for s in store.sessions() for lock in store.locks(s.id)}
        for letter, host in self.hosts.all.items():
            held = [name for name in ALL_NAMES if any(at == letter for at, _ in self._locks(name))]
            in_lab = {name: self._name_in_lab(letter, name) for name in held}
            assert {name for name, at in locks.items() if at == host.name} <= {*in_lab.values()}, (
                letter,
                in_lab,
                locks,
            )
            for name in held:
                if not self._is_confirmed(letter, name):
                    note(f"{letter} {name} {in_lab} {host.side.tenures.contested} {locks}")
                    is_refused = in_lab[name] != name or name not in {e.name for e in store.entries("", 1000)}
                    assert is_refused or host.side.tenures.contested[name] == locks[name]
            assert not +host.core.handlers._asking
        assert not [each for each in self.waiting if each[3].reply is None], "a request was never answered"


def test_hosts_and_lab_at_random() -> None:
    """Whatever happens to hosts and lab: a name is confirmed once, tokens grow, clients know what they hold, and all is
    in order within seconds of the last fault."""
    run_state_machine_as_test(
        Lab,
        settings=settings(
            max_examples=6, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
