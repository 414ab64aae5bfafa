"""A lab registry for tests: the routes that an IdentityResolver asks, on 127.0.0.1, and the ways in which they fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

MARK = "X-MADSci-Lab-Registry"


class LabStub:
    """A lab on a port of its own. A context manager; `url` says where.

    `known` is what it answers to GET, by name; `entries` and `unlocks` what it was told; `requests` all that came, as
    (method, raw path). `behaviour` is one of the handler's ways to fail, "" is none.
    """

    def __init__(self, *, marked: bool = True) -> None:
        self.marked = marked
        self.behaviour = ""
        self.known: dict[str, dict[str, Any]] = {}
        self.entries: list[tuple[str, dict[str, Any]]] = []
        self.unlocks: list[tuple[str, dict[str, Any]]] = []
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.before_answer: Callable[[], object] = lambda: None
        """Called before a GET is answered: what happens meanwhile."""
        self.over = threading.Event()
        handler: Any = type("Handler", (_Handler,), {"stub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LabStub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    stub: LabStub

    def do_GET(self) -> None:
        self._note()
        if self._fails():
            return
        name = self._name("/registry/resolve/")
        self.stub.before_answer()
        if name is None or name not in self.stub.known:
            self._answer(404, {"detail": "Not Found"})
        else:
            self._answer(200, {"name": name, **self.stub.known[name]})

    def do_POST(self) -> None:
        self._note()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._fails():
            return
        name = self._name("/registry/entries/")
        if name is None:
            self._answer(404, {"detail": "Not Found"})
        elif self.path.endswith("/unlock"):
            self.stub.unlocks.append((name.removesuffix("/unlock"), body))
            self._answer(200, {})
        elif self.stub.known.get(name, {}).get("id", body["id"]) != body["id"]:
            self._answer(409, {"detail": f"{name} is {self.stub.known[name]['id']} here"})
        else:
            self.stub.entries.append((name, body))
            self._answer(200, {"id": body["id"]})

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _note(self) -> None:
        self.stub.requests.append((self.command, self.path))
        self.stub.headers.append(dict(self.headers))

    def _name(self, route: str) -> str | None:
        path = self.path
        return unquote(path.removeprefix(route)) if self.stub.marked and path.startswith(route) else None

    def _answer(self, status: int, body: Any, **headers: str) -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if self.stub.marked:
            self.send_header(MARK, "1")
        for key, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(text)

    def _fails(self) -> bool:
        way = getattr(self, f"_{self.stub.behaviour}", None)
        if way is None:
            return False
        try:
            way()
        except ConnectionError:
            pass  # the client has gone
        self.close_connection = True
        return True

    # the ways to fail

    def _silent(self) -> None:
        self.stub.over.wait()

    def _drip_head(self) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 1000:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.stub.over.wait(0.2):
                break

    def _drip_body(self) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.stub.over.wait(0.2):
            self.wfile.write(b" ")
            self.wfile.flush()

    def _huge(self) -> None:
        self._answer(200, b'{"id": "' + b"x" * (2 << 20) + b'"}')

    def _html(self) -> None:
        self._answer(200, b"<html>log in</html>")

    def _no_ulid(self) -> None:
        self._answer(200, {"id": "arm-1"})

    def _error(self) -> None:
        self._answer(500, {"detail": "oh"})

    def _fault(self) -> None:
        self._answer(500, {"detail": "oh", "code": "internal"})

    def _nothing(self) -> None:
        self._answer(200, {key: [] for key in ("entries", "events", "conflicts", "hosts")})

    def _redirect(self) -> None:
        self._answer(307, {}, Location=f"{self.stub.url}/elsewhere{self.path}")

    def _cut(self) -> None:
        self._answer(200, b'{"id"', **{"Content-Length": "1000"})

    def _garbage(self) -> None:
        self.wfile.write(b"\x00\xff not http\r\n\r\n")
