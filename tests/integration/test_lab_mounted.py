"""The lab's routes inside other programs: a FastAPI application, and the real Lab Manager as docs/lab.md shows."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from ulid import ULID

from helpers import _DIES_WITH_PARENT, PATIENCE_S, PROJECT, until
from labs import MARK, LabHost, client
from madsci_registry._lab import Known, Lab
from madsci_registry_lab.registry import LabRegistry


def test_router_under_a_prefix_of_another_application(tmp_path: Path) -> None:
    """Mounted in an application that is itself mounted elsewhere, the routes and their names are the same."""
    with closing(LabRegistry(f"sqlite:{tmp_path}/lab.db")) as registry:
        inner, outer, id = FastAPI(), FastAPI(), str(ULID())
        inner.include_router(registry.router)
        outer.mount("/some where", inner)

        async def ask() -> None:
            transport = httpx.ASGITransport(outer)
            async with httpx.AsyncClient(transport=transport, base_url="http://lab/some%20where/registry/") as http:
                entry = {"id": id, "component_type": "node"}
                assert (await http.post("entries/a%2Fb%2Flock", json=entry)).status_code == 200
                assert (await http.get("resolve/a%2Fb%2Flock")).json()["id"] == id
                assert (await http.post("lookup", json={"name": "a/b/lock"})).json()["id"] == id
                assert (await http.get("health")).headers[MARK] == "1"

        asyncio.run(ask())


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.build
@pytest.mark.timeout(400)
def test_lab_manager_serves_the_routes_of_the_lab(installed: Path, tmp_path: Path) -> None:
    """The real Lab Manager with the lines of docs/lab.md serves the registry's routes, marked, beside its own; odd
    names, locks and the feed work there."""
    (program,) = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "lab.md").read_text(), re.DOTALL)
    (tmp_path / "lab.py").write_text(program.replace("/var/lib/lab", str(tmp_path)))
    port = free_port()
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MADSCI_"))}
    url = f"http://127.0.0.1:{port}"
    env = {"MADSCI_REGISTRY_PATH": str(tmp_path / "registry.json"), "LAB_SERVER_URL": f"{url}/", "HOME": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [installed / "python", "-c", _DIES_WITH_PARENT, "lab.py"],
            cwd=tmp_path,
            env={**plain, **env, "LAB_MANAGER_NAME": "lab"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        with client(url) as http:

            def health() -> httpx.Response | None:
                assert process.poll() is None, (tmp_path / "log").read_text()
                with suppress(httpx.TransportError):
                    return http.get("/registry/health")
                return None

            answer = until(health, "for the Lab Manager", 3 * PATIENCE_S)
            assert (answer.json()["service"], answer.headers[MARK]) == ("madsci-registry-lab", "1")
            assert http.get("/lab_health").status_code == 200
            assert MARK not in http.get("/health").headers
        lab, id = Lab(url), str(ULID())
        assert lab.find("a/lock") is None
        lab.tell("a/lock", {"id": id, "component_type": "node", "metadata": {}})
        assert lab.find("a/lock") == Known(id, "node")
        with LabHost(url, "host-a") as host:
            cursor = host.http.get("/registry/changes").json()["cursor"]
            term = host.register().resolve("a/lock", str(ULID()), lock={}).json()["lock"]["term"]
            assert host.keep(**{"a/lock": term})["lost"] == []
            events = host.http.get("/registry/changes", params={"cursor": cursor}).json()["events"]
            assert [e["kind"] for e in events] == ["registered", "granted"]
            assert host.post("lookup", name="a").json()["code"] == "invalid"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)
