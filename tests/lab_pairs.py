"""Daemons' cores of several hosts and one real lab, joined without a socket: real stores and routes, clocks to turn."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from helpers import FakeClock
from madsci_registry.errors import LabUnavailableError, RegistryError
from madsci_registry_lab.registry import LabRegistry
from madsci_registryd import fragments
from madsci_registryd.bridge import Bridge
from madsci_registryd.clock import iso
from madsci_registryd.export import Export, Job
from madsci_registryd.lab_gateway import MARK, MARK_VALUE, Gateway
from madsci_registryd.lab_lanes import Lane, Lanes
from madsci_registryd.lab_side import LabSide
from madsci_registryd.settings import Settings
from old_program import OldProgram
from pair import Client, Pair

TURNS = 1000
GATHERED_S = 0.03
"""The forwarder waits a little for more changes."""


Twist = Callable[[str, int, Any], tuple[int, Any]]


class InProcess(httpx.BaseTransport):
    """Requests to a lab in this process, the one that runs just then."""

    def __init__(self, lab: LabInProcess) -> None:
        self._lab = lab

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self._lab.loop.run_until_complete(self._answer(request))

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        sent = httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
        self._lab.requests[request.url.path] += 1
        answer = await httpx.ASGITransport(self._lab.app).handle_async_request(sent)
        status, said = self._lab.twist(request.url.path, answer.status_code, json.loads(await answer.aread()))
        headers = {MARK: MARK_VALUE} if MARK in answer.headers else {}
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(json.dumps(said).encode()))


class TurnedLanes(Lanes):
    """Lanes without threads: a request is made when the test says so, or with the turn of its host."""

    def __init__(self, gateway: Gateway, lab: LabInProcess) -> None:
        self.lab = lab
        gateway._client.close()
        gateway._client = httpx.Client(transport=InProcess(lab))
        self._gateway = gateway
        self.jobs: list[tuple[Lane, Callable[[Gateway], Any], Callable[[Any], None]]] = []
        self.mode = "up"
        """up; down: nobody answers; deaf: what is asked is done, and the answer lost; slow: it takes for ever."""
        self.asked = 0
        """How many requests were made."""

    def send(self, lane: Lane, call: Callable[[Gateway], Any], then: Callable[[Any], None]) -> None:
        self.jobs.append((lane, call, then))

    def run(self) -> bool:
        """Make the requests that are there; True: there were some."""
        if self.mode == "slow":
            return False
        jobs, self.jobs = self.jobs, []
        for _, call, then in jobs:
            then(self._result(call))
        return bool(jobs)

    def _result(self, call: Callable[[Gateway], Any]) -> Any:
        self.asked += 1
        try:
            answer = call(self._gateway) if self.mode in ("up", "deaf") else None
        except RegistryError as error:
            answer = error
        return answer if self.mode == "up" else LabUnavailableError("it is away")

    def start(self) -> None:
        pass

    def stop(self) -> None:
        self.jobs.clear()


class LabInProcess:
    """The lab's service without HTTP. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lab.db"
        self.requests: Counter[str] = Counter()
        """How many there were, by route."""
        self.twist: Twist = lambda route, status, said: (status, said)
        """What becomes of an answer on its way: for labs that are not what they should be."""
        self.clock = FakeClock()
        self.loop = asyncio.new_event_loop()
        self._open()

    def _open(self) -> None:
        self.registry = LabRegistry(f"sqlite:{self.path}", clock=self.clock)
        self.app = self.registry.app()

    def restart(self, *, earlier: Callable[[], None] = lambda: None) -> None:
        """End and start it again; `earlier` may change its files in between."""
        self.registry.close()
        earlier()
        self._open()

    def __enter__(self) -> LabInProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.registry.close()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


class LabPair(Pair):
    """One host's daemon with a lab."""

    def __init__(self, path: Path, lab: LabInProcess, *, require: bool = False) -> None:
        self.lab = lab
        self.mode = "up"
        self.graced_s = 0.0
        self._settings = Settings(lab_url=("http://127.0.0.1",), lab_require=require)
        path.parent.mkdir(exist_ok=True)
        super().__init__(path, lab.clock)
        self.settle()

    def _open(self) -> None:
        super()._open()
        self.side = LabSide(
            self.core, self._settings, self.path, self.path.parent.name, lambda gateway: TurnedLanes(gateway, self.lab)
        )
        self.lanes = self.side.lanes
        assert isinstance(self.lanes, TurnedLanes)
        self.lanes.mode = self.mode
        self.side.open()
        if self.graced_s:  # as after an I/O error
            self.core.service.no_grants_before = self.clock.monotonic() + self.graced_s
        self.side.start()

    @property
    def name(self) -> str:
        """Its name in the lab."""
        return self.side.host.name

    def cut(self, mode: str) -> None:
        """Let requests to the lab go as `TurnedLanes.mode` says."""
        self.mode = self.lanes.mode = mode  # type: ignore[attr-defined]

    def commit(self) -> None:
        super().commit()
        self.side.pump()

    def settle(self) -> None:
        """Let everything happen that can without more time passing than changes are gathered for."""
        spare_s = GATHERED_S
        for _ in range(TURNS):
            self.turn()
            self.side.pump()
            if self.lanes.run():  # type: ignore[attr-defined]
                continue
            next_s = self.core.timers.next_s() or 0.0
            if next_s > spare_s:
                self.core.registrar.commit()
                return
            spare_s -= next_s
            self.clock.advance(next_s)
        raise AssertionError("it does not come to rest")

    def wait(self, seconds: float) -> None:
        """Let time pass, in steps, and everything happen that is due."""
        while seconds > 0:
            step = min(seconds, 0.5)
            self.clock.advance(step)
            self.lab.registry.store.expire()
            self.settle()
            seconds -= step


class FiledLabPair(LabPair):
    """One host's daemon with a lab and a registry.json beside its database."""

    def _open(self) -> None:
        super()._open()
        self.jobs: list[Job] = []
        registry = self.path.with_suffix(".json")
        claim = fragments.claim(4242, "here", self.core.epoch, iso(self.clock.wall()))
        self.export = Export(registry, self.clock, claim, str(self.core.store.meta("created_at")))
        self.bridge = Bridge(self.core, self.export, self.jobs.append)
        self.core.service.old_programs = self.bridge
        self.bridge.open()

    def turn(self) -> None:
        super().turn()
        self.bridge.pump()
        while self.jobs:
            self.bridge.done(self.export.run(self.jobs.pop(0)), was_asked=True)
            super().turn()
            self.bridge.pump()

    def look(self) -> None:
        """Notice what old programs wrote."""
        if self.export.has_changed():
            self.bridge.done(self.export.run(Job()), was_asked=False)
        self.settle()

    def old(self, pid: int = 100) -> OldProgram:
        return OldProgram(self.path.with_suffix(".json"), self.clock.wall, pid)

    def close(self) -> None:
        self.export.close()
        super().close()


def wait_all(hosts: list[LabPair], seconds: float) -> None:
    """Let the same time pass for all hosts."""
    clock = hosts[0].clock
    while seconds > 0:
        clock.advance(min(seconds, 0.5))
        hosts[0].lab.registry.store.expire()  # as its own thread does each second
        for host in hosts:
            host.settle()
        seconds -= 0.5


class Hosts:
    """Hosts of one lab, by letter, each with one client."""

    def __init__(self, folder: Path, lab: LabInProcess) -> None:
        self.folder = folder
        self.lab = lab
        self.all: dict[str, LabPair] = {}

    def __getitem__(self, letter: str) -> LabPair:
        return self.all[letter]

    def start(self, letter: str, kind: type[LabPair] = LabPair, *, require: bool = False) -> tuple[LabPair, Client]:
        host = kind(self.folder / letter / "registry.db", self.lab, require=require)
        self.all[letter] = host
        return host, host.session(f"client-{letter}")

    def wait(self, seconds: float) -> None:
        wait_all([*self.all.values()], seconds)


@contextmanager
def joined(folder: Path) -> Iterator[Hosts]:
    """Hosts of a lab in `folder`: none at first."""
    with LabInProcess(folder) as lab:
        hosts = Hosts(folder, lab)
        yield hosts
        for host in hosts.all.values():
            host.close()


def lines(host: LabPair, op: str) -> list[dict[str, Any]]:
    """Return what clients of a host were told, of one kind."""
    return [line for _, line in host.told if line["op"] == op]


def ask(host: LabPair, client: Client, name: str, **fields: Any) -> Any:
    """Resolve a name and let everything happen that follows at once."""
    asked = client.resolve(name, turn=False, **fields)
    host.settle()
    return asked
