"""A daemon by script: a test says each of its words itself, over real sockets, to a real client in this process."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import zmq

from helpers import PATIENCE_S

ULID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


class ScriptedDaemon:
    """Both sockets of the registry at `registry`. A context manager; for one thread, while others are the client."""

    def __init__(self, registry: Path) -> None:
        run = registry.parent / "run"
        run.mkdir()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(PATIENCE_S)
        self._listener.bind(str(run / f"{registry.stem}.life"))
        self._listener.listen()
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        self._router.bind(f"ipc://{run / registry.stem}.sock")
        self._peer: socket.socket | None = None
        self._buffer = b""

    def __enter__(self) -> ScriptedDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self._listener.close()
        self._router.close()
        self._context.term()

    def welcome(self, **more: Any) -> dict[str, Any]:
        """Take the next connection, hear its hello or resume, and welcome it; return what it said."""
        self._peer, _ = self._listener.accept()
        self._peer.settimeout(PATIENCE_S)
        self._buffer = b""
        opening = self.heard()
        welcome = {"op": "welcome", "v": 1, "session": "session", "epoch": 7, "daemon": "script", "proof": "pidfd"}
        if opening["op"] == "hello":
            welcome["token"] = "secret"
        self.say({**welcome, "grace_s": None, "held": [], "renamed": [], **more})
        return opening

    def hang_up(self) -> None:
        """End the lifeline."""
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    def say(self, line: dict[str, Any]) -> None:
        """Say a line down the lifeline."""
        assert self._peer is not None
        self._peer.sendall(json.dumps(line).encode() + b"\n")

    def heard(self) -> dict[str, Any]:
        """Return the next line that the client says."""
        assert self._peer is not None
        while b"\n" not in self._buffer:
            piece = self._peer.recv(65536)
            assert piece, "the client has hung up"
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\n", 1)
        return dict(json.loads(line))

    def request(self) -> Request:
        """Return the client's next request."""
        *envelope, body = self._router.recv_multipart()
        return Request(self._router, envelope, json.loads(body))


class Request:
    """A request of the client, to be answered once."""

    def __init__(self, router: zmq.Socket[bytes], envelope: list[bytes], body: dict[str, Any]) -> None:
        self._router = router
        self._envelope = envelope
        self.body = body

    def ok(self, **answer: Any) -> None:
        """Answer it well."""
        self._router.send_multipart([*self._envelope, json.dumps({"ok": answer}).encode()])

    def refuse(self, **error: Any) -> None:
        """Answer it with an error."""
        self._router.send_multipart([*self._envelope, json.dumps({"error": error}).encode()])

    def grant(self, token: int | None, **more: Any) -> None:
        """Answer a resolve."""
        name, component_type = self.body["name"], self.body["component_type"]
        answer = {"id": ULID, "name": name, "component_type": component_type, "is_new": False, "fencing_token": token}
        self.ok(**{**answer, "source": "local", "acquired_at": "2026-01-01T00:00:00Z", "warnings": [], **more})
