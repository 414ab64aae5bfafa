"""Several daemons, as those of several hosts, and one lab, all real processes; each daemon has its own way to the lab.

What may fail in between is switched at each host's proxy (lab_proxy.py). As a program, `python lab_fleets.py LEASE_S
OPTION...` is a lab whose leases are shorter than the 15 s that they have: a lease must then pass in real time, as all
that depends on it does, in proportion.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from helpers import PATIENCE_S, TESTS, DaemonProcess, Worker, until
from lab_proxy import LabProxy
from labs import LabProcess, client
from madsci_registry import Registration, RegistryClient

Told = tuple[str, str, int | None]
"""What a callback of a Registration saw: its state, how it stood in the lab, and its fencing token."""


class ShortLab(LabProcess):
    """A lab whose leases last `lease_s`."""

    def __init__(self, folder: Path, *options: str, lease_s: float) -> None:
        super().__init__(folder, *options)
        self.lease_s = lease_s

    def command(self) -> list[str]:
        _, _, *options = super().command()
        return [str(TESTS / "lab_fleets.py"), str(self.lease_s), *options]


class FleetHost:
    """One host: its daemon, and the proxy by which that reaches the lab. A context manager; `start` begins it.

    Ends all clients that it made.
    """

    def __init__(self, folder: Path, lab_port: int, **env: str) -> None:
        """`env`: settings of the daemon, in its environment."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._clients = ExitStack()
        self.proxy = LabProxy(lab_port)
        self.daemon = DaemonProcess(folder / "registry.json")
        self.daemon.extra_env = {"MADSCI_REGISTRYD_LAB_URL": self.proxy.url, **env}

    def __enter__(self) -> FleetHost:
        return self

    def __exit__(self, *_: object) -> None:
        self.dismiss()
        self.daemon.kill()
        self.proxy.close()

    @property
    def registry(self) -> Path:
        return self.daemon.registry

    def client(self) -> RegistryClient:
        """Return one more client, of this process."""
        return self._clients.enter_context(self.asking())

    def worker(self) -> Worker:
        """Return one more client, in a process of its own."""
        return self._clients.enter_context(Worker(self.registry))

    def dismiss(self) -> None:
        """End all clients that were made."""
        self._clients.close()

    @contextmanager
    def asking(self) -> Iterator[RegistryClient]:
        """Give a client for some questions, with which nothing is held."""
        with RegistryClient(self.registry, timeout=PATIENCE_S, autostart=False) as made:
            yield made

    @property
    def lab(self) -> dict[str, Any]:
        """How the daemon stands with the lab, by its status."""
        with self.asking() as asking:
            found: dict[str, Any] = asking.status()["lab"]
            return found

    @property
    def name(self) -> str:
        """What it is called in the lab."""
        return str(self.lab["host"])

    def is_settled(self) -> bool:
        """Tell whether the lab has all that there is to tell, and has confirmed all locks."""
        lab = self.lab
        return (lab["state"], lab["behind"], lab["unconfirmed"]) == ("up", 0, 0)

    def await_settled(self) -> None:
        until(self.is_settled, f"for the lab to have all of {self.folder.name}: {self.lab}")

    def await_state(self, state: str) -> None:
        """Wait until the daemon finds the lab up, away, ..."""
        until(lambda: self.lab["state"] == state, f"for the lab to be {state}: {self.lab}")


class LabFleet:
    """A lab and its hosts, by letter. A context manager; all run from the beginning."""

    def __init__(self, folder: Path, letters: str = "abc", *, lab: LabProcess | None = None, **env: str) -> None:
        """`lab`: else one with leases of 15 s is made; `env`: settings of all daemons."""
        self.folder = folder
        self.env = env
        self.lab = lab or LabProcess(folder)
        self.hosts: dict[str, FleetHost] = {}
        self._letters = letters
        self._stack = ExitStack()

    def __enter__(self) -> LabFleet:
        with ExitStack() as stack:
            stack.enter_context(self.lab)
            self._stack = stack
            for letter in self._letters:
                self.add(letter)
            start_all(host.daemon for host in self.hosts.values())
            for host in self.hosts.values():
                host.await_settled()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __getitem__(self, letter: str) -> FleetHost:
        return self.hosts[letter]

    def add(self, letter: str, **env: str) -> FleetHost:
        """Add a host, whose daemon is not started yet."""
        host = FleetHost(self.folder / letter, self.lab.port, **self.env, **env)
        self.hosts[letter] = self._stack.enter_context(host)
        return host

    def mend_ways(self) -> None:
        """Let everything through."""
        for host in self.hosts.values():
            host.proxy.only, host.proxy.mode = frozenset(), "pass"

    def mend(self) -> None:
        """Start what does not run, let everything through, and wait until all is well."""
        if self.lab._process is None:
            self.lab.start()
        self.mend_ways()
        start_all(host.daemon for host in self.hosts.values() if host.daemon._process is None)
        for host in self.hosts.values():
            host.await_settled()

    # what the lab says

    def ask(self, route: str, **body: Any) -> Any:
        """Ask the lab itself; the answer, or None where it is 404."""
        with client(self.lab.url) as http:
            answer = http.post(f"/registry/{route}", json=body)
        if answer.status_code == 404:
            return None
        assert answer.status_code == 200, answer.text
        return answer.json()

    def entry(self, name: str) -> Any:
        """Return what the lab has under a name; None: nothing."""
        return self.ask("lookup", name=name)

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return all that the lab has, by name."""
        found: dict[str, dict[str, Any]] = {}
        after: str | None = ""
        while after is not None:
            page = self.ask("list", limit=1000, **({"after": after} if after else {}))
            found |= {entry["name"]: entry for entry in page["entries"]}
            after = page["after"]
        return found

    def history(self, name: str) -> list[dict[str, Any]]:
        """Return what happened in the lab to a name and its component."""
        found: list[dict[str, Any]] = []
        after: int | None = 0
        while after is not None:
            page = self.ask("history", name=name, after=after, limit=1000)
            found += page["events"]
            after = page["after"]
        return found

    def feed(self, cursor: str | None) -> dict[str, Any]:
        """Return a page of the feed after a cursor; without one an empty page, whose cursor means now."""
        with client(self.lab.url) as http:
            page: dict[str, Any] = http.get("/registry/changes", params={"cursor": cursor} if cursor else {}).json()
            return page

    def kinds(self, name: str) -> list[str]:
        """Return the identity changes of a name in the lab, in order."""
        return [event["kind"] for event in self.history(name) if event["kind"] not in LOCK_KINDS]


LOCK_KINDS = ("granted", "released", "moved")
"""Events of the lab that are about locks."""


def start_all(daemons: Iterable[DaemonProcess]) -> None:
    """Start several daemons at once, and wait until all serve."""
    started = list(daemons)
    for daemon in started:
        daemon.spawn()
    for daemon in started:
        until(daemon._serves, f"for the daemon to serve:\n{daemon.log}")


def following(registration: Registration) -> list[Told]:
    """Return a list that grows with each call of a registration's on_state."""
    told: list[Told] = []
    registration.on_state(lambda reg, state: told.append((state, reg.lab, reg.fencing_token)))
    return told


def await_lab(registration: Registration, lab: str) -> None:
    """Wait until a lock is confirmed, or unconfirmed."""
    until(lambda: registration.lab == lab, f"for {registration} to be {lab}")


def soon(resolve: Callable[[], Registration], *, but: type[Exception]) -> Registration:
    """Return what a resolve gives once it raises no `but` any more."""

    def attempt() -> Registration | None:
        try:
            return resolve()
        except but:
            return None

    found: Registration = until(attempt, f"for no {but.__name__}")
    return found


def main() -> None:
    from madsci_registry_lab import routes

    routes.LEASE_S = float(sys.argv.pop(1))  # before anything else takes it from there
    from madsci_registry_lab.__main__ import main as serve

    serve()


if __name__ == "__main__":
    main()
