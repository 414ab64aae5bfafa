"""Passes over registry.json cut into their parts: asked for, made, heard of; whatever comes in between, at random."""

from __future__ import annotations

import errno
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from filed import FiledPair
from madsci_registryd.export import Job, Result
from madsci_registryd.registry_file import FileFault, RegistryFile
from old_program import OldHeldError, OldProgram
from pair import Asked, Client

NAMES = ("arm", "leg", "eye", "ear")
STEPS = 150
RUNS = 40


class Interleaved:
    """Two old programs, up to three new ones, and a daemon whose every step this class makes."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.pair = FiledPair(folder)
        self.pair.hold_passes = True
        self.olds: list[OldProgram] = [self.pair.old(1), self.pair.old(2)]
        self.numbers = itertools.count(1)
        self.news: dict[str, Client] = {}
        self.tokens: dict[tuple[str, str], int] = {}
        self.ids: dict[str, str] = {}
        self.moved: set[str] = set()
        """Names that a rename gave or took: their ULID may change."""
        self.waiting: list[tuple[Asked, str, tuple[str, ...]]] = []
        self.job: Job | None = None
        self.result: tuple[Result, bool] | None = None
        self.grants = [0, 0]

    def run(self) -> None:
        things = {
            self.new_asks: 10, self.new_gives: 5, self.old_takes: 8, self.old_gives: 4, self.time_passes: 10,
            self.job_comes: 10, self.pass_is_made: 10, self.pass_is_heard_of: 10, self.lock_is_stuck: 1,
            self.rename: 3, self.retire: 1, self.many_come: 0.5, self.new_dies: 1, self.daemon_dies: 0.7,
        }  # fmt: skip
        for _ in range(STEPS):
            self.random.choices(list(things), list(things.values()))[0]()
            self.check()
        self.come_to_rest()

    # programs

    def new(self) -> tuple[str, Client]:
        if len(self.news) < 3:
            name = f"s{next(self.numbers)}"
            self.news[name] = self.pair.session(name)
        return self.random.choice(list(self.news.items()))

    def new_asks(self) -> None:
        (session, client), name = self.new(), self.random.choice(NAMES)
        lock, wait_s = self.random.random() < 0.8, self.random.choice([0.0, 3.0])
        asked = client.resolve(name, acquire_lock=lock, wait_s=wait_s, turn=False)
        self.waiting.append((asked, session, (name,)))
        self.turn()

    def new_gives(self) -> None:
        if self.tokens:
            (session, name), token = self.random.choice(list(self.tokens.items()))
            del self.tokens[session, name]
            self.news[session].send("release", name=name, instance="i", fencing_token=token, turn=False)
            self.turn()

    def new_dies(self) -> None:
        if self.news:
            session = self.random.choice(list(self.news))
            self.news.pop(session).ended()
            self.tokens = {key: token for key, token in self.tokens.items() if key[0] != session}
            self.waiting = [each for each in self.waiting if each[1] != session]
            self.turn()

    def rename(self) -> None:
        (session, client), (old, new) = self.new(), self.random.sample(NAMES, 2)
        row = self.pair.core.store.by_name(old)
        busy = {name for _, name in self.tokens} | {name for _, _, names in self.waiting for name in names}
        if row is not None and not busy & {old, new}:
            self.moved |= {old, new}
            asked = client.send("rename", old=old, new=new, id=row.id, turn=False)
            self.waiting.append((asked, session, (old, new)))
            self.turn()

    def retire(self) -> None:
        row = self.pair.core.store.by_name(self.random.choice(NAMES))
        if row is not None:
            self.new()[1].send("retire", name=row.name, id=row.id, turn=False)
            self.turn()

    def old_takes(self) -> None:
        old, name, lock = self.random.choice(self.olds), self.random.choice(NAMES), self.random.random() < 0.75
        try:
            self.answered(name, old.resolve(name, lock=lock))
        except OldHeldError:
            return
        self.grants[0] += lock

    def old_gives(self) -> None:
        old = self.random.choice(self.olds)
        if old.holds:
            old.release(self.random.choice(sorted(old.holds)))

    def many_come(self) -> None:
        """An old program adds more than one turn takes in."""
        ids = {f"n{next(self.numbers)}": self.random.randbytes(8).hex() for _ in range(150)}
        entry: dict[str, Any] = {"component_type": "node", "metadata": {}, "lock": None}
        self.pair.edit(lambda entries: entries.update({name: {"id": id, **entry} for name, id in ids.items()}))

    # the daemon

    def turn(self) -> None:
        self.pair.core.timers.run_due()
        self.pair.core.registrar.commit()
        self.pair.bridge.pump()
        for each in list(self.waiting):
            asked, session, names = each
            if asked.reply is not None:
                self.waiting.remove(each)
                if asked.code == "ok" and len(names) == 1:
                    self.take(session, names[0], asked.ok())

    def take(self, session: str, name: str, answer: dict[str, Any]) -> None:
        self.answered(name, answer["id"])
        if answer["fencing_token"] and session in self.news:
            self.tokens[session, name] = answer["fencing_token"]
            self.grants[1] += 1

    def time_passes(self) -> None:
        self.pair.clock.advance(self.random.choice([0.3, 5.0, 6.0]))
        self.turn()
        for old in self.olds:
            for name in sorted(old.holds):
                if not old.heartbeat(name):
                    assert name in self.moved, f"{name} was taken from a living old program"
                    old.holds.discard(name)

    def job_comes(self) -> None:
        self.turn()
        if self.job is None and self.pair.jobs:
            self.job = self.pair.jobs.pop(0)

    def pass_is_made(self, *, may_fail: bool = True) -> None:
        if self.result is not None:
            return
        if self.job is not None:
            with pytest.MonkeyPatch.context() as patch:
                if may_fail and self.random.random() < 0.15:
                    patch.setattr(RegistryFile, "write", no_room)
                self.result = self.pair.export.run(self.job), True
            self.job = None
        elif not self.pair.jobs and not self.pair.bridge._is_running and self.pair.export.has_changed():
            self.result = self.pair.export.run(Job()), False

    def pass_is_heard_of(self) -> None:
        if self.result is not None:
            result, self.result = self.result, None
            self.pair.bridge.done(*result)
            self.turn()

    def lock_is_stuck(self) -> None:
        """A stopped old program has the file's lock for the length of a pass."""
        if self.job is not None and self.result is None:
            with self.olds[0].locked(), pytest.MonkeyPatch.context() as patch:
                patch.setattr("madsci_registryd.export.LOCK_WAIT_S", 0.0)
                self.result = self.pair.export.run(self.job), True
            self.job = None

    def daemon_dies(self) -> None:
        self.job = self.result = None
        self.pair.dead |= set(self.news)
        self.waiting, self.tokens, self.news = [], {}, {}
        self.pair.kill()
        self.pair.revive()
        self.turn()

    # what must be

    def answered(self, name: str, id: str) -> None:
        if name not in self.moved:
            assert self.ids.setdefault(name, id) == id, f"{name} has a second ULID"

    def check(self) -> None:
        by_both = {name for old in self.olds for name in old.holds} & {name for _, name in self.tokens}
        assert not by_both, f"held by both: {by_both}"

    def come_to_rest(self) -> None:
        """With time and nothing new, all are answered, and file, database and bridge say the same."""
        for _ in range(60):
            self.pass_is_heard_of()
            self.pair.clock.advance(0.3)
            self.job_comes()
            self.pass_is_made(may_fail=False)
            self.check()
        assert not [each for each in self.waiting if each[0].reply is None], "somebody was never answered"
        rows = self.pair.core.store.components(limit=-1)
        entries = self.pair.old().read()["entries"] if rows else {}
        assert {name: entry["id"] for name, entry in entries.items()} == {row.name: row.id for row in rows}
        held = {row.name for row in rows if row.lock}
        assert all(entries[name]["lock"]["holder_instance"].startswith("madsci-registryd") for name in held)
        bridge = self.pair.bridge
        assert not (bridge.minted or bridge.shown or bridge._asked_names), "something is kept for ever"
        assert bridge.claimed <= {row.name for row in rows} and bridge.claimed == self.pair.export.claims


def no_room(self: RegistryFile, parts: object) -> None:
    raise FileFault("no room", lasting=False) from OSError(errno.ENOSPC, "no room")


@pytest.mark.parametrize("start", range(0, 4 * RUNS, RUNS))
def test_passes_cut_into_their_parts_keep_every_promise(tmp_path: Path, start: int) -> None:
    """In whatever order requests, passes, failures, stuck locks, renames, deaths and old programs come: one kind of
    holder, one ULID, everybody answered, and in the end file, database and memory say the same."""
    old = new = 0
    for seed in range(start, start + RUNS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        world = Interleaved(folder, seed)
        try:
            world.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        world.pair.close()
        old, new = old + world.grants[0], new + world.grants[1]
    assert old > 60 and new > 60, "too few grants to show anything"
