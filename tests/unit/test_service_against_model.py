"""The service against its dict twin: any sequence of verbs, deaths, dropped connections, restarts and clock steps."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from model import Twin, Who
from pair import Asked, Client, Pair

NAMES = st.sampled_from(["arm", "leg", "eye"])
TYPES = st.sampled_from(["node", "node", "node", "manager"])
SLOTS = st.integers(0, 2)
INSTANCES = st.sampled_from(["i", "j"])


class ServiceAgainstTwin(RuleBasedStateMachine):
    """Three client processes, each replaced by a new one when it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.pair = Pair(self.folder / "registry.db")
        self.twin = Twin()
        self.serial = itertools.count()
        self.clients: list[Client] = [self._client() for _ in range(3)]
        self.waits: dict[int, tuple[Who, str, str, Asked, int, Client]] = {}

    def teardown(self) -> None:
        self.pair.close()
        shutil.rmtree(self.folder)

    def _client(self) -> Client:
        return self.pair.session(f"s{next(self.serial):04}")

    @rule(slot=SLOTS, instance=INSTANCES, name=NAMES, kind=TYPES, wait=st.booleans())
    def resolve(self, slot: int, instance: str, name: str, kind: str, wait: bool) -> None:
        client = self.clients[slot]
        who = (client.id, instance)
        seq = 1000 + next(self.serial)
        expected = self.twin.expect_resolve(who, name, kind, wait)
        asked = client.resolve(name, kind, instance=instance, wait_s=9.0 if wait else 0.0, seq=seq)
        if expected == "waits":
            assert asked.reply is None
            self.twin.queues.setdefault(name, []).append((who, seq))
            self.waits[seq] = (who, name, kind, asked, seq, client)
            return
        assert asked.code == expected
        if expected == "ok":
            self.twin.grant(who, name, kind, asked.ok())
            self._settle_same(name)

    @rule(name=NAMES)
    def queue_up(self, name: str) -> None:
        """Everybody wants the name and waits: queues of two and more."""
        for slot in range(3):
            self.resolve(slot=slot, instance="i", name=name, kind="node", wait=True)

    @rule(slot=SLOTS, name=NAMES)
    def resolve_without_lock(self, slot: int, name: str) -> None:
        asked = self.clients[slot].resolve(name, acquire_lock=False)
        thing = self.twin.things.get(name)
        if thing and thing.component_type != "node":
            assert asked.code == "wrong_type"
        elif thing:
            assert asked.ok()["id"] == thing.id
            thing.retired = False
        else:
            lock_free = asked.ok()
            self.twin.grant(("nobody", ""), name, "node", lock_free | {"fencing_token": 1 << 60})
            self.twin.free(name)
            self.twin.tokens[name] = self.twin.tokens.get(name, 0) if name in self.twin.away else 0
            self.twin.tokens[name] = self._last_token(name)

    def _last_token(self, name: str) -> int:
        row = self.pair.core.store.name_row(name)
        return row.last_token if row else 0

    @rule(slot=SLOTS, name=NAMES, right=st.booleans())
    def release(self, slot: int, name: str, right: bool) -> None:
        thing = self.twin.things.get(name)
        client = self.clients[slot]
        lock = thing.lock if thing else None
        if lock and lock[0][0] == client.id and right:
            assert client.release(name, lock[1], instance=lock[0][1])
            self._freed(name)
        else:
            assert not client.release(name, 12345)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.waits:
            return
        seq = data.draw(st.sampled_from(sorted(self.waits)))
        who, name, _, _, _, client = self.waits.pop(seq)
        self.twin.queues[name].remove((who, seq))
        self.pair.core.registrar.cancel(client.record, seq)
        self.pair.turn()

    @rule(slot=SLOTS)
    def die(self, slot: int) -> None:
        client = self.clients[slot]
        client.ended()
        self._gone(client)
        self.clients[slot] = self._client()

    @rule(slot=SLOTS)
    def bye(self, slot: int) -> None:
        client = self.clients[slot]
        self.pair.core.registrar.end_session(client.record, "it said bye")
        self.pair.core.registrar.commit()
        self._gone(client)
        self.clients[slot] = self._client()

    @rule(slot=SLOTS, late=st.booleans())
    def drop(self, slot: int, late: bool) -> None:
        """The connection ends and comes back, in time or not; what waited there is asked anew by nobody."""
        client = self.clients[slot]
        client.drop()
        if late:
            self.pair.wait(2.0)
            assert client.id not in self.pair.core.registrar.sessions
            self._gone(client)
            self.clients[slot] = self._client()
            return
        self.pair.wait(1.0)
        client.resume()
        for seq in [s for s, w in self.waits.items() if w[5] is client]:
            who, name, _, _, _, _ = self.waits.pop(seq)
            self.twin.queues[name].remove((who, seq))
            self.pair.core.registrar.cancel(client.record, seq)
            self.pair.turn()
        self._time_passed()

    @rule(old=NAMES, new=st.sampled_from(["arm", "leg", "eye", "nose"]), slot=SLOTS, force=st.booleans())
    def rename(self, old: str, new: str, slot: int, force: bool) -> None:
        thing = self.twin.things.get(old)
        if thing is None or old == new:
            return
        asked = self.clients[slot].send("rename", old=old, new=new, id=thing.id, force=force)
        if new in self.twin.things:
            assert asked.code == "name_taken"
        elif thing.lock and not force:
            assert asked.code == "held"
        else:
            moved = asked.ok()["component"]
            assert moved["id"] == thing.id
            self.twin.things[new] = self.twin.things.pop(old)
            self.twin.away[old] = thing.id
            if thing.lock:
                token = moved["fencing_token"]
                assert token == thing.lock[1] or token > self.twin.tokens.get(new, 0)
                assert token > self.twin.tokens.get(new, 0)
                thing.lock = (thing.lock[0], token)
                self.twin.tokens[new] = token
            self._settle_queue(old)

    @rule(name=NAMES, slot=SLOTS)
    def retire(self, name: str, slot: int) -> None:
        thing = self.twin.things.get(name)
        if thing is None:
            return
        asked = self.clients[slot].send("retire", name=name, id=thing.id)
        if thing.lock:
            assert asked.code == "held"
        else:
            assert asked.ok()["changed"] is not thing.retired
            thing.retired = True

    @rule(name=NAMES, slot=SLOTS)
    def break_lock(self, name: str, slot: int) -> None:
        thing = self.twin.things.get(name)
        if thing is None or thing.lock is None:
            return
        holder, token = thing.lock
        assert self.clients[slot].send("break_lock", name=name, fencing_token=token).ok()["broken"]
        assert self.pair.told[-1][0] == holder[0]
        self._freed(name)

    @rule(step=st.floats(-90_000, 90_000))
    def clock_steps(self, step: float) -> None:
        self.pair.clock.jump(step)
        self.pair.turn()

    @rule()
    def time_passes(self) -> None:
        self.pair.wait(9.0)
        for _, name, _, asked, seq, _ in list(self.waits.values()):
            assert asked.code in ("held", "wrong_type")
            who = self.waits.pop(seq)[0]
            self.twin.queues[name].remove((who, seq))

    @rule(dead=st.sets(SLOTS, max_size=2))
    def restart(self, dead: set[int]) -> None:
        for slot in dead:
            self.clients[slot].die()
        self.pair.restart()
        self.waits.clear()
        self.twin.queues.clear()
        for slot, client in enumerate(self.clients):
            if slot in dead:
                for name in self.twin.held_by(client.id):
                    self.twin.free(name)
                self.clients[slot] = self._client()
            elif client.id in self.pair.core.registrar.sessions:
                client.resume()
            else:
                assert not self.twin.held_by(client.id), "a living holder's session is gone"
                self.clients[slot] = self._client()

    def _gone(self, client: Client) -> None:
        """A session is over: its waits go, its names are the next ones'."""
        self.twin.forget_waits_of(client.id)
        for seq in [s for s, w in self.waits.items() if w[5] is client]:
            del self.waits[seq]
        for name in self.twin.held_by(client.id):
            self._freed(name)
        self._time_passed()

    def _time_passed(self) -> None:
        """Time has passed for the other waiters too: some may have been answered."""
        for seq, (who, name, _, asked, _, _) in list(self.waits.items()):
            if asked.code == "held":
                self.twin.queues[name].remove((who, seq))
                del self.waits[seq]

    def _freed(self, name: str) -> None:
        self.twin.free(name)
        self._settle_queue(name)

    def _settle_queue(self, name: str) -> None:
        """The first of the queue has the name now, with all requests of the same owner."""
        queue = self.twin.queues.get(name, [])
        while queue:
            who, seq = queue[0]
            asked, kind = self.waits[seq][3], self.waits[seq][2]
            if asked.code in ("wrong_type", "held"):
                queue.pop(0)
                del self.waits[seq]
                continue
            self.twin.grant(who, name, kind, asked.ok())
            self._settle_same(name)
            return

    def _settle_same(self, name: str) -> None:
        lock = self.twin.things[name].lock
        assert lock is not None
        for who, seq in list(self.twin.queues.get(name, [])):
            if who == lock[0] and self.waits[seq][3].code == "ok":
                self.twin.queues[name].remove((who, seq))
                assert self.waits.pop(seq)[3].ok()["fencing_token"] == lock[1]

    @invariant()
    def database_is_the_twin(self) -> None:
        """Names, ULIDs, locks, tokens and queues are what the twin says, and nobody is answered twice."""
        rows = {r.name: r for r in self.pair.core.store.components(limit=-1)}
        assert set(rows) == set(self.twin.things)
        for name, thing in self.twin.things.items():
            row = rows[name]
            lock = (tuple(row.lock.owner), row.lock.fencing_token) if row.lock else None
            assert (row.id, row.retired, lock) == (thing.id, thing.retired, thing.lock)
        for name in ("arm", "leg", "eye"):
            queue = [(tuple(c.owner), c.seq) for c in self.pair.core.queues.of_name(name)]
            assert queue == self.twin.queues.get(name, [])


TestServiceAgainstTwin = ServiceAgainstTwin.TestCase
TestServiceAgainstTwin.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
