"""The program `madsci-registry-lab` with its store on a real etcd, and its commands `copy` and `check`."""

from __future__ import annotations

import itertools
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import etcd
from etcd import Cluster
from helpers import PATIENCE_S, environment, until
from lab_stores import ULIDS, state
from labs import LabHost, LabProcess
from madsci_registry_lab.clock import SystemClock
from madsci_registry_lab.registry import open_store
from madsci_registry_lab.store import LabStore

pytestmark = pytest.mark.skipif(not etcd.is_here(), reason=etcd.WHY_NOT)

_numbers = itertools.count()


@pytest.fixture
def url() -> str:
    """The setting of a lab of its own."""
    return f"{etcd.shared().url}/service-{next(_numbers)}"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    line = [sys.executable, "-m", "madsci_registry_lab", *arguments]
    return subprocess.run(
        line, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Folders of two services."""
    made = [tmp_path / "first", tmp_path / "second"]
    for folder in made:
        folder.mkdir()
    return made


def test_two_services_are_one_lab(url: str, folders: list[Path]) -> None:
    """What one service answered, another one knows: names, locks, who is heard, and the feed by the same cursor."""
    first, second = (LabProcess(folder, "--store", url) for folder in folders)
    with first, second, LabHost(first.url, "a") as a, LabHost(second.url, "b") as b:
        a.register()
        b.register()
        cursor = a.http.get("/registry/changes").json()["cursor"]
        made = a.resolve("arm", ULIDS[1], lock={}).json()
        assert b.http.post("/registry/lookup", json={"name": "arm"}).json()["id"] == ULIDS[1]
        held = b.resolve("arm", ULIDS[2], lock={})
        assert (held.status_code, held.json()["code"], held.json()["host"]) == (409, "held", "a")
        told = b.http.get("/registry/changes", params={"cursor": cursor, "wait_s": 10}).json()
        assert [event["kind"] for event in told["events"]] == ["created", "granted"]
        first.kill()
        a.http.close()
        with LabHost(second.url, "a") as again:
            again.session = a.session
            assert again.keep(arm=made["lock"]["term"])["unstated"] == {}
            assert again.ok("release", session=a.session, locks={"arm": made["lock"]["term"]})["released"] == ["arm"]
        assert b.resolve("arm", ULIDS[2], lock={}).json()["lock"]["term"] > made["lock"]["term"]


def test_service_outlives_an_etcd_that_was_away(tmp_path: Path, folders: list[Path]) -> None:
    """While etcd is away the service says so and stays; afterwards it answers as before, and no host has lost its
    session."""
    with Cluster(tmp_path) as cluster, LabProcess(folders[0], "--store", cluster.url) as lab:
        with LabHost(lab.url, "a") as host:
            host.register()
            cluster.kill()
            away = host.http.post("/registry/lookup", json={"name": "arm"})
            assert (away.status_code, away.json()["code"]) == (503, "unavailable")
            assert host.http.get("/health").json()["healthy"] is False
            cluster.start()
            until(lambda: host.http.get("/health").json()["healthy"])
            host.keep()
            assert host.resolve("arm", ULIDS[1], lock={}).status_code == 200
        assert lab.terminate() == 0


def test_copy_and_check_are_commands(url: str, tmp_path: Path) -> None:
    """A lab is copied to etcd and looked at by commands, whose exit status says how it went."""
    source = tmp_path / "lab.db"
    with closing(open_store(f"sqlite:{source}", SystemClock())) as store:
        _fill(store)
    done = command("copy", "--from", f"sqlite:{source}", "--to", url)
    assert (done.returncode, done.stderr) == (0, "")
    assert "copied and compared: 1 names" in done.stdout
    again = command("copy", "--from", f"sqlite:{source}", "--to", url)
    assert again.returncode == 73
    assert "it was left as it is" in again.stderr
    looked = command("--store", url, "check")
    assert looked.returncode == 1  # one member is a warning
    assert "1 names" in looked.stdout
    assert command("--store", "sqlite:x.db", "check").returncode == 78


def _fill(store: LabStore) -> None:
    store.register("a", "boot", 15.0, "")
    store.resolve("a", "1", state("arm", 1), None, None)
