"""A proxy on 127.0.0.1 before a lab, and the ways in which networks, proxies and servers fail, switched as it runs.

A request meets the mode that there is when it has come; `refuse` ends those that are under way as well. Requests are
passed on as they were sent, with the path undecoded; their length stands in Content-Length, as our clients' does.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections import Counter
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, get_args

Mode = Literal[
    "pass", "refuse", "silent", "drop", "mute", "drip", "cut", "500", "429", "404", "no_http", "no_json", "huge"
]  # fmt: skip
"""pass: as if the proxy were not there. refuse: nobody listens. silent: accepts, passes nothing on, never answers.
These pass the request on, so that it takes effect: drop (the connection ends without an answer), mute (no answer
comes), drip (the answer comes at one byte a second), cut (half of the answer comes).
These answer by themselves: 500, 429, 404 (not marked as a lab's), no_http (garbage), no_json (marked as a lab's, with
garbage as its body), huge (marked, 64 MiB of JSON)."""
MARK = "X-MADSci-Lab-Registry"
HUGE_BYTES = 64 << 20
DRIP_S = 1.0


class LabProxy:
    """A proxy before the lab on `target_port`. A context manager; it serves from the beginning.

    `requests` counts what came, by method and path (no query): `proxy.requests["POST /registry/changes"]`. With `only`,
    all requests pass but those to these paths (`refuse` refuses all in any case).
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.requests: Counter[str] = Counter()
        self.only: frozenset[str] = frozenset()
        self._mode: Mode = "pass"
        self._guard = threading.Lock()
        self._open: set[socket.socket] = set()
        self._is_over = False
        # Not listening, it keeps the port for us while connections are refused.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self.port: int = self._place.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._start()

    def __enter__(self) -> LabProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def mode(self) -> Mode:
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        assert mode in get_args(Mode), mode
        before, self._mode = self._mode, mode
        if mode == "refuse" != before:
            self._stop()
        elif before == "refuse" != mode:
            self._start()

    def close(self) -> None:
        """End all connections, and wait for all threads."""
        self.mode = "refuse"
        self._place.close()

    def count(self, route: str) -> None:
        """Count a request."""
        with self._guard:
            self.requests[route] += 1

    def track(self, opened: socket.socket) -> None:
        """Have a socket ended when the proxy ends."""
        with self._guard:
            self._open.add(opened)
            if self._is_over:
                _end(opened)

    def forget(self, opened: socket.socket) -> None:
        """Do not end that socket any more: it is about to be closed."""
        with self._guard:
            self._open.discard(opened)

    def _start(self) -> None:
        self._is_over = False
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="lab-proxy")
        self._thread.start()

    def _stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        with self._guard:
            self._is_over = True
            for opened in self._open:
                _end(opened)
        self._server.server_close()  # joins the threads of all connections


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, proxy: LabProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", proxy.port), _Connection)

    def get_request(self) -> tuple[socket.socket, Any]:
        client, address = super().get_request()
        self.proxy.track(client)
        return client, address

    def shutdown_request(self, request: Any) -> None:
        self.proxy.forget(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has gone."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _request(self) -> None:
        proxy, path = self.server.proxy, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy.count(f"{self.command} {path}")
        mode = proxy.mode if not proxy.only or path in proxy.only else "pass"
        if mode in ("pass", "drop", "mute", "drip", "cut"):
            self._hand_on(mode, self._passed_on(body))
        else:
            self._answer_itself(mode)

    def do_GET(self) -> None:
        self._request()

    def do_POST(self) -> None:
        self._request()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _passed_on(self, body: bytes) -> bytes:
        """Return the lab's answer; none where it cuts the connection, or does not listen."""
        lab = HTTPConnection("127.0.0.1", self.server.proxy.target_port)
        with closing(lab), suppress(OSError, HTTPException):
            lab.connect()
            upstream = lab.sock
            self.server.proxy.track(upstream)
            try:
                lab.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for key, value in self.headers.items():
                    lab.putheader(key, value)
                lab.endheaders(body)
                answer = lab.getresponse()
                self.close_connection |= answer.getheader("Connection", "").lower() == "close"
                return _http(f"{answer.status} {answer.reason}", answer.read(), dict(answer.getheaders()))
            finally:
                self.server.proxy.forget(upstream)
        return b""

    def _hand_on(self, mode: str, answer: bytes) -> None:
        if mode == "mute":
            self._wait_for_the_end()
        elif mode == "drip":
            for n in range(len(answer)):
                self.wfile.write(answer[n : n + 1])
                if self._is_left(DRIP_S):
                    break
        elif mode != "drop":
            self.wfile.write(answer if mode == "pass" else answer[: len(answer) // 2])
        self.close_connection |= mode != "pass" or not answer

    def _answer_itself(self, mode: str) -> None:
        if mode == "no_json":
            self.wfile.write(_http("200 OK", b'{"entry": {"id": \xff', {MARK: "1"}))
            return
        if mode.isdecimal():
            self.wfile.write(_http(f"{mode} Some Proxy", b'{"detail": "Not Found"}', {}))
            return
        self.close_connection = True
        if mode == "silent":
            self._wait_for_the_end()
        elif mode == "no_http":
            self.wfile.write(b"\x00\xff no HTTP\r\n\r\n")
        elif mode == "huge":
            self.wfile.write(_http("200 OK", b'{"entry": "', {MARK: "1"}, HUGE_BYTES))
            for _ in range(HUGE_BYTES >> 16):
                self.wfile.write(b"x" * (1 << 16))

    def _wait_for_the_end(self) -> None:
        while not self._is_left(None):
            pass

    def _is_left(self, within_s: float | None) -> bool:
        """Tell whether the client leaves within some seconds (None: at all), or the proxy ends."""
        self.connection.settimeout(within_s)
        try:
            return not self.connection.recv(1 << 16)
        except TimeoutError:
            return False


def _http(status: str, body: bytes, headers: dict[str, str], length: int | None = None) -> bytes:
    """Return an answer as it goes over the wire; `length`: of a body that goes on."""
    kept = [f"{k}: {v}" for k, v in headers.items() if k.lower() not in ("content-length", "transfer-encoding")]
    lines = [f"HTTP/1.1 {status}", *kept, f"Content-Length: {len(body) if length is None else length}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def _end(opened: socket.socket) -> None:
    with suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)
