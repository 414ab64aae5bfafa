"""A real lab registry in a process of its own, and what speaks HTTP with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx

from helpers import PATIENCE_S, ProgramProcess, until

MARK = "X-MADSci-Lab-Registry"


def client(url: str, token: str = "") -> httpx.Client:
    """Return a client of a lab; no proxy of the environment."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S, trust_env=False)


class LabProcess(ProgramProcess):
    """The program `madsci-registry-lab` on a port of its own. A context manager; `start` begins it."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.options = options
        self.port = 0
        super().__init__(folder / "lab.log")

    def __enter__(self) -> LabProcess:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        scheme = "https" if "--tls-cert" in self.options else "http"
        return f"{scheme}://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """Return its command line."""
        store, listen = f"sqlite:{self.folder / 'lab.db'}", f"127.0.0.1:{self.port}"
        return ["-m", "madsci_registry_lab", "--store", store, "--listen", listen, *self.options]

    def start(self) -> LabProcess:
        """Start it and wait until it serves; from the second time on, on the same port."""
        before = len(self.log)
        self.run(*self.command())
        found = until(lambda: self._port(before), "for the lab to serve")
        self.port = int(found)
        return self

    def _port(self, start: int) -> str | None:
        self.check_alive()
        found = re.search(r"serving on 127\.0\.0\.1 port (\d+)", self.log[start:])
        return found[1] if found else None


class LabHost:
    """A host that speaks with a lab as a daemon does."""

    def __init__(self, url: str, name: str, *, token: str = "", boot: str = "boot-1") -> None:
        self.http = client(url, token)
        self.name = name
        self.boot = boot
        self.session = ""
        self.ops = 0

    def __enter__(self) -> LabHost:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def post(self, route: str, **body: Any) -> httpx.Response:
        """Send a request under this host's name."""
        return self.http.post(f"/registry/{route}", json={"host": self.name, **body})

    def ok(self, route: str, **body: Any) -> Any:
        """Send a request that is answered well; return the answer."""
        answer = self.post(route, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def register(self) -> LabHost:
        """Begin a session."""
        self.session = self.ok("hosts/register", boot=self.boot, label="a test")["session"]
        return self

    def keep(self, **holds: int) -> Any:
        """Send a keepalive that states these terms by name."""
        return self.ok("hosts/keepalive", session=self.session, boot=self.boot, holds=holds)

    def resolve(self, name: str, id: str, **more: Any) -> httpx.Response:
        """Get or create a component; with `lock`, lock it."""
        self.ops += 1
        given = {"name": name, "id": id, "component_type": "node", "op": f"op/{self.ops}", **more}
        return self.post("resolve", **({"session": self.session} if "lock" in more else {}), **given)
