"""How a client finds, starts, loses and finds again its daemon. Real daemons, real processes."""

from __future__ import annotations

import math
import os
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import PATIENCE_S, DaemonProcess, Worker, daemons_under, until
from madsci_registry import HeldError, RegistryClient, RegistryError, UnavailableError


def test_read_without_a_registry_is_unavailable_and_makes_nothing(registry_path: Path) -> None:
    """Where no registry is, reads say so at once: nothing is made and nothing started."""
    missing = registry_path.parent / "none" / "registry.json"
    with RegistryClient(missing) as client:
        with pytest.raises(UnavailableError, match="no registry"):
            client.lookup("a")
        with pytest.raises(UnavailableError):
            client.status()
    assert not missing.parent.exists()
    assert not daemons_under(registry_path.parent)


def test_resolve_without_a_daemon_starts_one_and_reads_do_then_too(registry_path: Path) -> None:
    """The first resolve makes folder, registry and daemon; when that daemon is gone, a read starts the next."""
    path = registry_path.parent / "made" / "registry.json"
    with RegistryClient(path) as client:
        identity = client.resolve("a", "node", acquire_lock=False).id
        first = client.status()["pid"]
    os.kill(first, 9)
    with RegistryClient(path) as client:
        assert client.lookup("a") == identity
        assert client.status()["pid"] != first
    assert (path.parent / "run").stat().st_mode & 0o777 == 0o700


def test_status_without_a_daemon_starts_none(registry_path: Path) -> None:
    """The verbs status and sessions tell at once that no daemon is there, with a hint, also where a registry exists."""
    registry_path.write_text('{"version": 1, "entries": {}}')
    with RegistryClient(registry_path, timeout=PATIENCE_S) as client:
        before = time.monotonic()
        for ask in (client.status, client.sessions):
            with pytest.raises(UnavailableError) as caught:
                ask()
            assert "madsci-registryd" in str(caught.value.hint)
    assert time.monotonic() - before < PATIENCE_S / 2
    assert not daemons_under(registry_path.parent)


def test_resolve_where_autostart_is_off_waits_and_then_says_how_to_start_one(registry_path: Path) -> None:
    """A missing daemon that may not be started is waited for; then unavailable says what to do."""
    with RegistryClient(registry_path, autostart=False, timeout=0.2) as client:
        before = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            client.resolve("a", "node", wait=0.2)
        assert time.monotonic() - before >= 0.4
        assert "--registry" in str(caught.value.hint)


def test_resolve_waiting_for_a_daemon_is_served_when_it_comes(registry_path: Path) -> None:
    """A client that waits for a missing daemon is served by the one that is started meanwhile."""
    with RegistryClient(registry_path, autostart=False) as client, ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(client.resolve, "a", "node", wait=math.inf)
        with DaemonProcess(registry_path):
            assert waiting.result(PATIENCE_S).held


def test_resolve_by_twenty_clients_at_once_starts_one_daemon(registry_path: Path) -> None:
    """Twenty processes that find no daemon start one, and all are served by it."""
    crowd = [Worker(registry_path, MADSCI_REGISTRY_AUTOSTART="1") for _ in range(20)]
    try:
        for worker in crowd:
            worker.ask("hello")
        for number, worker in enumerate(crowd):
            worker.tell("resolve", f"n{number % 5}", acquire_lock=False)
        ids = [worker.answer()["id"] for worker in crowd]
        assert len(set(ids)) == 5
        assert len({worker.ask("status")["pid"] for worker in crowd}) == 1
        until(lambda: len(daemons_under(registry_path.parent)) == 1, "for the losers of the race to go")
    finally:
        for worker in crowd:
            worker.__exit__()


def test_lock_survives_the_daemons_death_and_is_resumed_when_idle(daemon: DaemonProcess) -> None:
    """A holder that does nothing resumes by itself after the daemon was killed, with the same token."""
    with RegistryClient(daemon.registry, autostart=False) as client, RegistryClient(daemon.registry) as other:
        mine = client.resolve("a", "node")
        token = mine.fencing_token
        daemon.restart()
        with Worker(daemon.registry) as watch:  # another process: asking here would make this one resume
            until(lambda: any(s["attached"] and s["held"] for s in watch.ask("sessions")), "for the holder to resume")
        with pytest.raises(HeldError) as caught:
            other.resolve("a", "node")
        assert caught.value.is_me
        assert (mine.held, mine.fencing_token) == (True, token)
        assert client.resolve("a", "node").fencing_token == token


def test_holder_starts_its_daemon_again_when_that_is_gone(registry_path: Path) -> None:
    """A client that holds starts the daemon again by itself, and a waiter waits on there."""
    with RegistryClient(registry_path) as client, RegistryClient(registry_path) as other:
        mine = client.resolve("a", "node")
        first = client.status()["pid"]
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(other.resolve, "a", "node", wait=math.inf)
            until(lambda: client.get("a").waiting == 1, "for the waiter")
            os.kill(first, 9)
            until(lambda: [p for p in daemons_under(registry_path.parent) if p != first], "for the next daemon")
            until(lambda: client.get("a").waiting == 1, "for the waiter to queue again")
            assert mine.held
            mine.release()
            assert waiting.result(PATIENCE_S).held


@pytest.mark.parametrize("end", ["release", "close"])
def test_release_while_the_daemon_is_away_reaches_the_next_one(daemon: DaemonProcess, end: str) -> None:
    """What is released, or closed, while no daemon is there is free as soon as one is back."""
    client = RegistryClient(daemon.registry, autostart=False)
    mine = client.resolve("a", "node")
    daemon.kill()
    before = time.monotonic()
    if end == "release":
        assert mine.release()
    else:
        client.close()
    assert time.monotonic() - before < 1
    daemon.start()
    with RegistryClient(daemon.registry) as other:
        assert other.resolve("a", "node", wait=PATIENCE_S).held
    client.close()


def test_requests_in_flight_are_repeated_after_a_kill_of_the_daemon(daemon: DaemonProcess) -> None:
    """Requests that the daemon's death interrupts are asked again of the next one; none is lost, none done twice."""
    stop = threading.Event()

    def resolve_on(client: RegistryClient, prefix: str) -> dict[str, str]:
        made: dict[str, str] = {}
        while not stop.is_set():
            name = f"{prefix}{len(made)}"
            made[name] = client.resolve(name, "node", acquire_lock=False).id
        return made

    with RegistryClient(daemon.registry, timeout=PATIENCE_S) as client, ThreadPoolExecutor(4) as threads:
        runs = [threads.submit(resolve_on, client, prefix) for prefix in "abcd"]
        for _ in range(3):
            seen = client.lookup
            until(lambda: len(client.list()) > 20, "for some names")
            daemon.restart()
            seen("a0")
        stop.set()
        made = {name: id for run in runs for name, id in run.result(PATIENCE_S).items()}
        assert {c.name: c.id for c in client.list()} == made


def test_sockets_removed_under_a_living_daemon_are_found_again(daemon: DaemonProcess) -> None:
    """After rm -rf run, who is connected stays so, and a new client is served by the same daemon."""
    with RegistryClient(daemon.registry) as client:
        mine = client.resolve("a", "node")
        shutil.rmtree(daemon.socket.parent)
        assert client.get("a").state == "held"
        until(daemon.lifeline.exists, "for the daemon to bind again")
        with Worker(daemon.registry) as worker:
            assert worker.ask("status")["pid"] == daemon.pid
        assert mine.held


def test_registry_with_a_long_path_is_reached(registry_path: Path) -> None:
    """A folder whose sockets' paths are longer than a socket address (107 bytes) works like any other."""
    path = registry_path.parent / ("d" * 90) / ("e" * 90) / "registry.json"
    with RegistryClient(path) as client:
        mine = client.resolve("a", "node")
        os.kill(client.status()["pid"], 9)
        assert client.lookup("a") == mine.id
        assert mine.held


@pytest.mark.parametrize(
    "line",
    [
        b'{"op":"welcome"}',
        b'{"op":"welcome","session":"s","epoch":1}',
        b'{"op":"welcome","session":"s","epoch":1,"token":"t","held":[1]}',
        b'{"op":"refused"}',
        b'{"op":"refused","error":{}}',
        b"[]",
        b"HTTP/1.1 400 Bad Request",
    ],
)
def test_stranger_at_the_lifeline_is_an_error_with_a_name(registry_path: Path, line: bytes) -> None:
    """Whatever else listens in the daemon's place and says is a RegistryError, not a fault of this library."""
    run = registry_path.parent / "run"
    run.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(run / "registry.life"))
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as peer:
                peer.recv(4096)
                peer.sendall(line + b"\n")
                peer.recv(4096)

        stranger = threading.Thread(target=answer)
        stranger.start()
        with RegistryClient(registry_path, timeout=5, autostart=False) as client, pytest.raises(RegistryError):
            client.status()
        stranger.join(PATIENCE_S)
