"""Old and new programs at random on one registry.json: who holds, who dies, daemon too, and what the clock does."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from filed import FiledPair
from old_program import HEARTBEAT_S, OldHeldError, OldProgram
from pair import Client

NAMES = ("arm", "leg", "eye")
STEPS = 150


class World:
    """Three old programs and three new ones, and what each has been answered."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.pair = FiledPair(folder)
        self.numbers = itertools.count(1)
        self.ids: dict[str, str] = {}
        self.olds = [self.new_old() for _ in range(3)]
        self.beats = [0.0] * 3
        self.news = [self.new_client() for _ in range(3)]
        self.tokens: dict[tuple[str, str], int] = {}
        self.is_up = True
        self.grants = [0, 0]

    def new_old(self) -> OldProgram:
        return self.pair.old(next(self.numbers))

    def new_client(self) -> Client:
        return self.pair.session(f"s{next(self.numbers)}")

    def step(self) -> None:
        """Let one thing happen."""
        things = [self.old_takes, self.old_gives, self.new_takes, self.new_gives, self.pass_time] * 4
        things += [self.old_dies, self.new_dies, self.daemon_dies, self.set_clock, self.tear]
        self.random.choice(things)()
        if not self.is_up and self.random.random() < 0.5:
            self.daemon_comes()
        self.check()

    def answered(self, name: str, id: str) -> None:
        assert self.ids.setdefault(name, id) == id, f"{name} has a second ULID"

    def old_takes(self) -> None:
        old, name = self.random.choice(self.olds), self.random.choice(NAMES)
        lock = self.random.random() < 0.8
        try:
            self.answered(name, old.resolve(name, lock=lock))
        except OldHeldError:
            return
        if lock:
            self.grants[0] += 1
            for other in self.olds:  # where another's time was over
                if other is not old:
                    other.holds.discard(name)

    def old_gives(self) -> None:
        old = self.random.choice(self.olds)
        for name in sorted(old.holds):
            old.release(name)

    def old_dies(self) -> None:
        n = self.random.randrange(3)
        self.olds[n], self.beats[n] = self.new_old(), self.pair.clock.monotonic()

    def new_takes(self) -> None:
        if not self.is_up:
            return
        new, name = self.random.choice(self.news), self.random.choice(NAMES)
        asked = new.resolve(name, acquire_lock=self.random.random() < 0.8)
        if asked.code == "ok":
            answer = asked.ok()
            self.answered(name, answer["id"])
            if answer["fencing_token"]:
                self.grants[1] += 1
                self.tokens[new.id, name] = answer["fencing_token"]

    def new_gives(self) -> None:
        if self.is_up and self.tokens:
            (session, name), token = self.tokens.popitem()
            next(new for new in self.news if new.id == session).release(name, token)

    def new_dies(self) -> None:
        n = self.random.randrange(3)
        self.tokens = {key: token for key, token in self.tokens.items() if key[0] != self.news[n].id}
        if self.is_up:
            self.news[n].ended()
            self.news[n] = self.new_client()
        else:
            self.pair.dead.add(self.news[n].id)

    def daemon_dies(self) -> None:
        if not self.is_up:
            return
        if self.random.random() < 0.5:  # in the middle of a pass that nobody hears of
            self.pair.hold_passes = True
            self.random.choice(self.news).resolve(self.random.choice(NAMES))
            if self.pair.jobs:
                self.pair.export.run(self.pair.jobs.pop())
            self.pair.hold_passes = False
        self.pair.kill()
        self.is_up = False

    def daemon_comes(self) -> None:
        self.pair.revive()
        self.is_up = True
        for n, new in enumerate(self.news):
            if new.id in self.pair.core.registrar.sessions:
                new.resume()
            else:
                assert not any(session == new.id for session, _ in self.tokens), "a living holder was ended"
                self.news[n] = self.new_client()
        self.pair.turn()

    def set_clock(self) -> None:
        if self.is_up:  # of what an old program took while nobody looked, only that clock tells
            self.pair.turn()
            self.pair.clock.jump(self.random.choice([-86400.0, -3.0, 3.0, 86400.0]))

    def tear(self) -> None:
        """An old program is killed while it writes. What another wrote just before, unseen, cannot be known."""
        if not self.is_up:
            return
        self.pair.turn()
        if self.pair.registry.exists():
            whole = self.pair.registry.read_bytes()
            self.pair.registry.write_bytes(whole[: self.random.randrange(len(whole))])
            self.pair.turn()

    def pass_time(self) -> None:
        for _ in range(self.random.choice([1, 1, 5])):
            self.pair.clock.advance(2.5)
            for n, old in enumerate(self.olds):
                if self.pair.clock.monotonic() - self.beats[n] >= HEARTBEAT_S - 2.5:
                    self.beats[n] = self.pair.clock.monotonic()
                    for name in sorted(old.holds):
                        if not old.heartbeat(name):
                            raise AssertionError(f"{name} was taken from a living old program")
            if self.is_up:
                self.pair.turn()

    def check(self) -> None:
        """Nobody holds what a program of the other kind holds."""
        by_old = {name for old in self.olds for name in old.holds}
        by_new = {name for _, name in self.tokens}
        assert not by_old & by_new, f"held by both: {by_old & by_new}"


@pytest.mark.parametrize("start", range(0, 100, 20))
def test_old_and_new_programs_at_random_never_hold_one_name(tmp_path: Path, start: int) -> None:
    """Whatever old programs, new ones, daemon and clock do: one kind of holder, one ULID, no living holder ended."""
    old = new = 0
    for seed in range(start, start + 20):
        folder = tmp_path / str(seed)
        folder.mkdir()
        world = World(folder, seed)
        try:
            for _ in range(STEPS):
                world.step()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        finally:
            if world.is_up:
                world.pair.close()
        old, new = old + world.grants[0], new + world.grants[1]
    assert old > 60 and new > 60, "too few grants to show anything"
