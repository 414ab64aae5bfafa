"""Requests to a lab over real sockets: they end in time whatever the other side does, and take nothing but data."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress

import pytest

from madsci_registry.errors import LabUnavailableError, NotFoundError
from madsci_registryd.lab_gateway import ANSWER_MAX_BYTES, Gateway

SOON_S = 5.0
"""Far above the deadlines of these tests, far below what a wait for ever would take."""


class Server:
    """Answers each connection on a port of its own by a function. A context manager."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.heard: list[bytes] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._open: list[socket.socket] = []
        self._threads[0].start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    @property
    def requests(self) -> int:
        return b"".join(self.heard).count(b"POST ")

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(sock)
            self._threads.append(threading.Thread(target=self._talk, args=(sock,)))
            self._threads[-1].start()

    def _talk(self, sock: socket.socket) -> None:
        with closing(sock), suppress(OSError):
            while data := sock.recv(65536):
                self.heard.append(data)
                if data.endswith(b"}"):
                    self._serve(sock)


def answer(body: str, *, status: str = "200 OK", more: str = "", marked: bool = True) -> bytes:
    """Return an answer as a lab gives it."""
    mark = "X-MADSci-Lab-Registry: 1\r\n" if marked else ""
    return f"HTTP/1.1 {status}\r\n{mark}{more}Content-Length: {len(body.encode())}\r\n\r\n{body}".encode()


def says(*answers: bytes) -> Callable[[socket.socket], None]:
    """Give one answer after the other, the last one again and again."""
    left = list(answers)

    def serve(sock: socket.socket) -> None:
        sock.sendall(left.pop(0) if len(left) > 1 else left[0])

    return serve


def drips(data: bytes, pause_s: float = 0.1) -> Callable[[socket.socket], None]:
    """Give an answer byte by byte."""

    def serve(sock: socket.socket) -> None:
        for n in range(len(data)):
            sock.sendall(data[n : n + 1])
            time.sleep(pause_s)

    return serve


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def gateway(stack: ExitStack, *urls: str, token: str | None = None) -> Gateway:
    found = Gateway(urls, token)
    stack.callback(found.close)
    return found


def test_answer_that_drips_is_none(stack: ExitStack) -> None:
    """An answer whose header, or body, comes byte by byte is given up at the request's deadline, each time."""
    slow = answer(json.dumps({"a": "b" * 500}))
    server = stack.enter_context(Server(drips(slow)))
    lab = gateway(stack, server.url)
    for _ in range(2):
        before = time.monotonic()
        with pytest.raises(LabUnavailableError):
            lab.post("/registry/lock", {}, within_s=0.6)
        assert time.monotonic() - before < SOON_S


def test_silent_service_leaves_time_for_the_next_one(stack: ExitStack) -> None:
    """Of several services one that accepts and says nothing costs its share of the deadline, once; then the next one is
    asked, and asked first from then on."""
    silent = stack.enter_context(Server(lambda sock: None))
    good = stack.enter_context(Server(says(answer('{"a": 1}'))))
    lab = gateway(stack, silent.url, good.url)
    assert lab.post("/registry/lock", {}, within_s=1.0) == {"a": 1}
    assert lab.url == good.url
    assert lab.post("/registry/lock", {}, within_s=1.0) == {"a": 1}
    assert silent.requests == 1


def test_service_that_says_no_is_the_one_that_is_asked(stack: ExitStack) -> None:
    """A refusal of the second service is an answer: the first one, which is no lab, is not asked again for the next."""
    other = stack.enter_context(Server(says(answer('{"detail": "Not Found"}', status="404 Not Found", marked=False))))
    lab_says = answer('{"code": "not_found", "detail": "no"}', status="404 Not Found")
    good = stack.enter_context(Server(says(lab_says)))
    lab = gateway(stack, other.url, good.url)
    for _ in range(2):
        with pytest.raises(NotFoundError):
            lab.post("/registry/lookup", {"name": "arm"}, within_s=5.0)
    assert other.requests == 1


@pytest.mark.parametrize(
    "said",
    [
        answer('{"a": 1}', marked=False),
        answer("[1]"),
        answer('{"a": NaN}'),
        answer('{"a": 1'),
        answer("[" * 100_000),
        answer('{"a": 1' + "0" * 5000 + "}"),
        answer('{"a": 1}', status="302 Found", more="Location: http://127.0.0.1:1/\r\n"),
        answer('{"code": "held", "detail": "no"}', status="409 Conflict"),
        answer('{"code": "no such", "detail": "no"}', status="400 Bad Request"),
        answer('{"code": "not_found", "detail": "no"}', status="503 Service Unavailable"),
        answer("x" * (ANSWER_MAX_BYTES + 1)),
        answer('{"a": 1}').replace(b"Content-Length: 8", b"Content-Length: 800000000000"),
        answer('{"a": 1}').replace(b"Content-Length: 8", b"Content-Encoding: gzip\r\nContent-Length: 7"),
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1_000_000,
        b"\x00" * 1000,
        b"",
    ],
    ids=lambda said: said[:12].decode("ascii", "replace") + str(len(said)),
)
def test_what_is_no_answer_of_a_lab_is_lab_unavailable(stack: ExitStack, said: bytes) -> None:
    """Whatever comes that is no answer of a lab registry is LabUnavailableError, and nothing else."""

    def serve(sock: socket.socket) -> None:
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)

    server = stack.enter_context(Server(serve))
    with pytest.raises(LabUnavailableError):
        gateway(stack, server.url).post("/registry/lock", {}, within_s=SOON_S)


def test_cookies_are_not_kept(stack: ExitStack) -> None:
    """What a service wants remembered is not, and not sent back to it."""
    server = stack.enter_context(Server(says(answer('{"a": 1}', more="Set-Cookie: a=b\r\n"))))
    lab = gateway(stack, server.url, token="0123456789abcdef")
    for _ in range(2):
        lab.post("/registry/lock", {}, within_s=SOON_S)
    sent = b"".join(server.heard).lower()
    assert b"cookie" not in sent
    assert sent.count(b"authorization: bearer 0123456789abcdef") == 2


def test_name_of_a_host_that_cannot_be_is_lab_unavailable(stack: ExitStack) -> None:
    """A URL whose host has no address, or whose port nobody listens at, is a lab that is away."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", "http://nowhere.invalid:1", "http://[::1%25nowhere]:1", "http://a..b:1"):
        with pytest.raises(LabUnavailableError):
            gateway(stack, url).post("/registry/lock", {}, within_s=SOON_S)
