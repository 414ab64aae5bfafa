"""A dict twin of the service: the same verbs in the simplest words, to compare with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Who = tuple[str, str]
"""(session, instance)"""


@dataclass
class Thing:
    """A component as the twin knows it."""

    id: str
    component_type: str
    retired: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    lock: tuple[Who, int] | None = None


class Twin:
    """Names to things, queues, and the highest token of each name."""

    def __init__(self) -> None:
        self.things: dict[str, Thing] = {}
        self.queues: dict[str, list[tuple[Who, int]]] = {}
        self.tokens: dict[str, int] = {}
        self.ids: set[str] = set()
        self.away: dict[str, str] = {}

    def expect_resolve(self, who: Who, name: str, component_type: str, wait: bool) -> str:
        """Say how a resolve with lock is answered: ok, wrong_type, held, or None-like "waits"."""
        thing = self.things.get(name)
        if thing and thing.component_type != component_type:
            return "wrong_type"
        if thing and thing.lock:
            if thing.lock[0] == who:
                return "ok"
            return "waits" if wait else "held"
        return "waits" if self.queues.get(name) and wait else "held" if self.queues.get(name) else "ok"

    def grant(self, who: Who, name: str, component_type: str, answer: dict[str, Any]) -> None:
        """Take a granted answer over, checking that it is what may be answered."""
        thing = self.things.get(name)
        if thing is None:
            assert answer["id"] not in self.ids, "a ULID was used twice"
            assert bool(answer["warnings"]) == (name in self.away)
            thing = self.things[name] = Thing(answer["id"], component_type)
            self.ids.add(thing.id)
        assert answer["id"] == thing.id
        thing.retired = False
        if thing.lock is None:
            assert answer["fencing_token"] > self.tokens.get(name, 0), "a token did not grow"
            thing.lock = (who, answer["fencing_token"])
            self.tokens[name] = answer["fencing_token"]
        assert thing.lock == (who, answer["fencing_token"])

    def free(self, name: str) -> None:
        self.things[name].lock = None

    def held_by(self, session: str) -> list[str]:
        return [n for n, t in self.things.items() if t.lock and t.lock[0][0] == session]

    def forget_waits_of(self, session: str) -> None:
        for queue in self.queues.values():
            queue[:] = [(who, key) for who, key in queue if who[0] != session]
