"""A daemon's forwarder and a real lab joined without a socket: what is lost between them is a test's choice."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx

from helpers import FakeClock
from madsci_registry.errors import LabUnavailableError, RegistryError
from madsci_registry_lab.registry import LabRegistry
from madsci_registry_lab.store import Entry
from madsci_registryd.forwarder import PACE_S, Forwarder
from madsci_registryd.lab_answers import refusal_of
from pair import Pair

Fault = Literal["", "away", "lost"]
"""away: nothing comes through; lost: the lab does what it is asked for, and its answer is lost."""


class InnerLab:
    """The lab's own routes and store in this process, asked as by a Gateway."""

    def __init__(self, folder: Path, clock: FakeClock) -> None:
        self._loop = asyncio.new_event_loop()
        self.registry = LabRegistry(f"sqlite:{folder / 'lab.db'}", clock=clock)
        transport = httpx.ASGITransport(app=self.registry.app())
        self._http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def post(self, route: str, body: dict[str, Any], *, within_s: float) -> dict[str, Any]:
        """Ask, and take the answer as a Gateway does."""
        self.asked.append((route, body))
        answer = self._loop.run_until_complete(self._http.post(route, json=body))
        if answer.status_code == 200:
            return dict(answer.json())
        raise refusal_of(answer.json()) or LabUnavailableError(f"the lab answered {answer.status_code}")

    def mark(self, host: str) -> tuple[int, int] | None:
        """Return up to where the lab has a host's changes, as its keepalives say."""
        mark = self.registry.store.mark(host)
        return (mark.epoch, mark.revision) if mark else None

    def find(self, name: str) -> Entry:
        return self.registry.store.find(name=name)

    def names(self) -> dict[str, str]:
        """Return its names and their ULIDs."""
        return {e.name: e.id for e in self.registry.store.entries("", 100_000)}

    def kinds(self, name: str) -> list[str]:
        """Return what has happened there to a name and its component."""
        return [event.kind for event in self.registry.store.history(name, 0, 1000)]

    def close(self) -> None:
        self._loop.run_until_complete(self._http.aclose())
        self._loop.close()
        self.registry.close()


class InnerLanes:
    """Calls to a lab, made in the turn after that in which they were sent."""

    def __init__(self, lab: InnerLab) -> None:
        self.lab = lab
        self.fault: Fault = ""
        self.waiting: deque[tuple[Callable[[Any], Any], Callable[[Any], None]]] = deque()

    def send(self, lane: str, call: Callable[[Any], Any], then: Callable[[Any], None]) -> None:
        assert lane == "tell"
        self.waiting.append((call, then))

    def work(self) -> int:
        """Make the calls that wait, and hand out what comes of them; return how many those were."""
        calls = [self.waiting.popleft() for _ in range(len(self.waiting))]
        for call, then in calls:
            then(self._result(call))
        return len(calls)

    def _result(self, call: Callable[[Any], Any]) -> Any:
        if self.fault == "away":
            return LabUnavailableError("the lab is away")
        try:
            answer = call(self.lab)
        except RegistryError as error:
            return error
        return LabUnavailableError("the answer was lost") if self.fault == "lost" else answer


class Host:
    """Who the daemon is in the lab."""

    def __init__(self, name: str = "here", epoch: int = 1) -> None:
        self.name = name
        self.epoch = epoch


class Forwarding:
    """A daemon's core with its forwarder, and a lab. A context manager."""

    def __init__(self, folder: Path, lab: InnerLab | None = None, *, name: str = "here") -> None:
        self.folder = folder
        self.clock = FakeClock()
        self._made_lab = lab is None
        self.lab = lab or InnerLab(folder, FakeClock())
        self.lanes = InnerLanes(self.lab)
        self.host = Host(name)
        self.pair = Pair(folder / f"{name}.db", self.clock)
        self.away: list[str] = []
        self.open()

    def open(self) -> None:
        """Make a forwarder, as a start of the daemon does."""
        self.lanes.waiting.clear()
        self.forwarder = Forwarder(self.pair.core, self.lanes.send, self.host, on_away=self._on_away)
        self.client = self.pair.session(f"client-{self.host.name}")

    def _on_away(self, error: LabUnavailableError) -> None:
        self.away.append(error.message)
        self.forwarder.pause()

    def sent(self, route: str = "/registry/changes") -> list[dict[str, Any]]:
        """Return what was sent to a route of the lab."""
        return [body for asked, body in self.lab.asked if asked == route]

    def names_sent(self) -> list[str]:
        """Return the names of all changes that were sent, in order, repeats included."""
        return [change["component"]["name"] for body in self.sent() for change in body["changes"]]

    def restart(self) -> None:
        """Kill the daemon and start it again; its client is a new one."""
        self.pair.dead = set(self.pair.core.registrar.sessions)
        self.pair.restart()
        self.pair.dead.clear()
        self.open()

    def __enter__(self) -> Forwarding:
        return self

    def __exit__(self, *_: object) -> None:
        self.pair.close()
        if self._made_lab:
            self.lab.close()

    # the daemon's loop

    def turn(self) -> None:
        """Make one turn of the loop."""
        self.pair.turn()
        self.forwarder.pump()
        self.pair.commit()

    def run(self, turns: int = 2000) -> None:
        """Make turns until there is nothing left to do at once, answers of the lab included."""
        for _ in range(turns):
            self.turn()
            if self.lanes.work():
                self.clock.advance(PACE_S)
            if self.pair.core.timers.next_s() != 0 and not self.lanes.waiting:
                return
        raise AssertionError(f"not done after {turns} turns")

    def keepalive(self) -> None:
        """The lab answers a keepalive, with its mark, and all follows that it brings about."""
        self.forwarder.begin(self.lab.mark(self.host.name))
        self.run()

    def wait(self, seconds: float) -> None:
        """Let time pass and the loop do what is due."""
        self.clock.advance(seconds)
        self.run()

    # what clients do

    def make(self, name: str, **metadata: Any) -> str:
        """Make a component; return its ULID."""
        return str(self.client.resolve(name, acquire_lock=False, metadata=metadata).ok()["id"])

    def rename(self, old: str, new: str) -> None:
        self.client.send("rename", old=old, new=new, id=self.id_of(old)).ok()

    def retire(self, name: str) -> None:
        self.client.send("retire", name=name, id=self.id_of(name)).ok()

    def set(self, name: str, **metadata: Any) -> None:
        self.client.send("set_metadata", name=name, id=self.id_of(name), set=metadata).ok()

    def id_of(self, name: str) -> str:
        return str(self.client.get(name)["id"])
