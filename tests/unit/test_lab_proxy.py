"""The proxy that tests put before a lab fails in each way that it names, and is the lab itself otherwise."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import pytest

import lab_proxy
from helpers import PATIENCE_S, until
from lab_proxy import MARK, LabProxy, Mode
from lab_stub import LabStub
from labs import client

ENTRY = {"id": "01M86NDR2BZN87TH2B3SP1N000", "component_type": "node"}


@pytest.fixture
def lab() -> Iterator[LabStub]:
    """A lab."""
    with LabStub() as stub:
        yield stub


@pytest.fixture
def proxy(lab: LabStub) -> Iterator[LabProxy]:
    """A proxy before it, of which no thread is left."""
    with LabProxy(int(lab.url.rpartition(":")[2])) as made:
        yield made
    assert not [t for t in threading.enumerate() if "lab-proxy" in t.name or "process_request" in t.name]


def test_pass_is_the_lab_itself(lab: LabStub, proxy: LabProxy) -> None:
    """Requests and answers pass as they are, the path undecoded, over one connection; they are counted by route."""
    lab.known["a/b"] = ENTRY
    with client(proxy.url, "secret") as http:
        for _ in range(2):
            found = http.get("/registry/resolve/a%2Fb")
            assert (found.json(), found.headers[MARK]) == ({"name": "a/b", **ENTRY}, "1")
        assert http.get("/registry/resolve/none", params={"x": "1"}).status_code == 404
        assert http.post("/registry/entries/c", json=ENTRY).json() == {"id": ENTRY["id"]}
    assert lab.entries == [("c", ENTRY)]
    assert lab.headers[0]["Authorization"] == "Bearer secret"
    assert lab.requests[2] == ("GET", "/registry/resolve/none?x=1")
    assert proxy.requests["GET /registry/resolve/a%2Fb"] == 2
    assert proxy.requests["GET /registry/resolve/none"] == 1
    assert proxy.requests["POST /registry/entries/c"] == 1


@pytest.mark.parametrize(
    ("mode", "reached"), [("silent", 0), ("mute", 1), ("drop", 1), ("cut", 1), ("drip", 1), ("no_http", 0)]
)
def test_answer_is_lost(lab: LabStub, proxy: LabProxy, mode: Mode, reached: int) -> None:
    """Where no answer comes, or not all of it, the client has an error of its transport; the lab has got the request or
    not, as the mode says; the next request passes as soon as the mode does."""
    proxy.mode = mode
    with client(proxy.url) as http:
        with pytest.raises(httpx.TransportError):
            http.post("/registry/entries/c", json=ENTRY, timeout=0.5)
        assert len(lab.entries) == reached
        proxy.mode = "pass"
        assert http.post("/registry/entries/c", json=ENTRY).status_code == 200
    assert proxy.requests["POST /registry/entries/c"] == 2


def test_drip_comes_byte_by_byte(lab: LabStub, proxy: LabProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dripping answer comes whole in the end, a byte at a time."""
    monkeypatch.setattr(lab_proxy, "DRIP_S", 0.002)
    proxy.mode = "drip"
    with client(proxy.url) as http:
        began = time.monotonic()
        answer = http.post("/registry/entries/c", json=ENTRY)
    assert answer.json() == {"id": ENTRY["id"]}
    assert time.monotonic() - began > 0.1


@pytest.mark.parametrize(("mode", "status"), [("500", 500), ("429", 429), ("404", 404)])
def test_status_of_a_proxy_is_not_a_labs(lab: LabStub, proxy: LabProxy, mode: Mode, status: int) -> None:
    """An answer that the proxy makes itself is not marked, and the lab does not get the request."""
    proxy.mode = mode
    with client(proxy.url) as http:
        answer = http.post("/registry/entries/c", json=ENTRY)
    assert (answer.status_code, MARK in answer.headers, lab.requests) == (status, False, [])


def test_body_is_garbage_or_huge(proxy: LabProxy) -> None:
    """A body that is no JSON, and one of 64 MiB, come as a lab's good answers."""
    with client(proxy.url) as http:
        proxy.mode = "no_json"
        answer = http.get("/registry/hosts")
        assert (answer.status_code, answer.headers[MARK]) == (200, "1")
        with pytest.raises(ValueError):
            answer.json()
        proxy.mode = "huge"
        with http.stream("GET", "/registry/hosts") as answer:
            assert answer.headers["Content-Length"] == str(64 << 20)
            assert len(next(answer.iter_raw(1 << 20))) == 1 << 20


def test_refuse_ends_what_is_under_way_and_keeps_the_port(lab: LabStub, proxy: LabProxy) -> None:
    """While it refuses nobody listens on its port, and requests that waited are ended; then it serves there again."""
    held = threading.Event()

    def hold() -> None:
        held.set()
        lab.over.wait(PATIENCE_S)

    lab.before_answer = hold
    with client(proxy.url) as http, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(http.get, "/registry/resolve/x")
        assert held.wait(PATIENCE_S)
        proxy.mode = "refuse"
        assert isinstance(waits.exception(PATIENCE_S), httpx.RemoteProtocolError)
        with pytest.raises(httpx.ConnectError):
            http.get("/registry/resolve/x")
        with closing(socket.socket()) as thief, pytest.raises(OSError):
            thief.bind(("127.0.0.1", proxy.port))
        lab.over.set()
        proxy.mode = "pass"
        assert http.get("/registry/resolve/x").status_code == 404


def test_only_some_routes_fail(lab: LabStub, proxy: LabProxy) -> None:
    """With `only`, requests to other paths pass."""
    proxy.mode, proxy.only = "500", frozenset({"/registry/resolve/x"})
    with client(proxy.url) as http:
        assert [http.get(f"/registry/resolve/{name}").status_code for name in ("x", "y")] == [500, 404]


def test_close_ends_whoever_waits(proxy: LabProxy) -> None:
    """A close ends silent connections and those that have sent nothing, at once."""
    proxy.mode = "silent"
    with (
        client(proxy.url) as http,
        closing(socket.create_connection(("127.0.0.1", proxy.port))) as idle,
        ThreadPoolExecutor(1) as pool,
    ):
        waits = pool.submit(http.get, "/registry/hosts")
        until(lambda: proxy.requests["GET /registry/hosts"], "for the request")
        proxy.close()
        assert isinstance(waits.exception(PATIENCE_S), httpx.TransportError)
        assert idle.recv(1) == b""
