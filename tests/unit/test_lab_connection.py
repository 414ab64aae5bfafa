"""Connections of a lab's server: strangers who open many, or say nothing, cost those who are served nothing."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
import uvicorn

from helpers import PATIENCE_S, until
from labs import client
from madsci_registry_lab import connection, server
from madsci_registry_lab.connection import Connection
from madsci_registry_lab.registry import LabRegistry

MAX = 5


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A lab that lets in five connections, and gives a request a quarter of a second."""
    monkeypatch.setattr(connection, "REQUEST_S", 0.25)
    with (
        closing(LabRegistry(f"sqlite:{tmp_path}/lab.db")) as registry,
        closing(server._listen("127.0.0.1", 0)) as listener,
    ):
        config = uvicorn.Config(
            registry.app(), http=Connection, ws="none", lifespan="off", limit_concurrency=MAX, log_config=None,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        running = uvicorn.Server(config)
        thread = threading.Thread(target=asyncio.run, args=(running.serve(sockets=[listener]),))
        thread.start()
        until(lambda: running.started, "for it to serve")
        yield listener.getsockname()[1]
        running.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def connect(port: int, said: bytes = b"") -> socket.socket:
    """Return a connection on which something was said."""
    made = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    made.sendall(said)
    return made


def is_ended(made: socket.socket) -> bool:
    """Wait until the other side ends a connection; False: it says something instead."""
    try:
        return made.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET /registry/health HTTP/1.1\r\nHost:",
        b"POST /registry/lookup HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
    ],
    ids=["nothing", "half a head", "half a body"],
)
def test_request_that_does_not_come_is_not_waited_for(port: int, said: bytes) -> None:
    """A connection on which no whole request comes in time is ended."""
    with closing(connect(port, said)) as made:
        assert is_ended(made)


def test_drops_do_not_prolong_a_request(port: int) -> None:
    """Whoever sends a byte now and then has no more time than others."""
    over = threading.Event()
    with closing(connect(port, b"GET /registry/health HTTP/1.1\r\nX: ")) as made:

        def drip() -> None:
            while not over.wait(0.02):
                try:
                    made.sendall(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        assert is_ended(made)
        over.set()
        thread.join(PATIENCE_S)


def test_time_of_a_request_is_not_that_of_its_answer(port: int) -> None:
    """A request that waits for changes is answered, and its connection serves on, longer than a request may take."""
    with client(f"http://127.0.0.1:{port}") as http:
        cursor = http.get("/registry/changes").json()["cursor"]
        for _ in range(2):
            assert http.get("/registry/changes", params={"cursor": cursor, "wait_s": 0.6}).json()["events"] == []


def test_connection_above_the_limit_is_closed_and_the_others_are_served(port: int) -> None:
    """Where all connections are taken, one more is closed at once, and those from before are served; when one ends
    there is room again."""
    with ExitStack() as stack, client(f"http://127.0.0.1:{port}") as first:
        assert first.get("/registry/health").status_code == 200
        strangers = [stack.enter_context(client(f"http://127.0.0.1:{port}")) for _ in range(MAX - 1)]
        for stranger in strangers:
            assert stranger.get("/registry/health").status_code == 200
        with closing(connect(port)) as refused:
            assert is_ended(refused)
        for _ in range(3):
            assert first.get("/registry/health").status_code == 200
        strangers[0].close()

        def served() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/registry/health", trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        until(served, "for a place")


def test_reader_that_has_gone_is_not_waited_for(port: int) -> None:
    """A request for changes ends with its client, not only with its time."""
    with client(f"http://127.0.0.1:{port}") as http:
        cursor = http.get("/registry/changes").json()["cursor"]
        question = f"GET /registry/changes?cursor={cursor}&wait_s=60 HTTP/1.1\r\nHost: x\r\n\r\n".encode()

        def waiting() -> str:
            text = http.get("/metrics").text
            return text.partition("\nmadsci_registry_lab_feed_waiting ")[2].partition("\n")[0]

        with closing(connect(port, question)):
            until(lambda: waiting() == "1.0", "for it to wait")
        until(lambda: waiting() == "0.0", "for it to end")


def test_small_answers_are_sent_at_once() -> None:
    """The socket says its protocol, without which asyncio leaves Nagle's algorithm on: an answer, which is two writes,
    would wait 40 ms for the client's acknowledgement of the first."""
    with closing(server._listen("127.0.0.1", 0)) as listener:
        assert listener.proto == socket.IPPROTO_TCP
