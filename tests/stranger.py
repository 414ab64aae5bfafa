"""The least client that is not ours: one session, one name. It knows docs/protocol.md and nothing of the library."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import zmq

from madsci_registry.protocol import WAIT_MAX_S


class Stranger:
    """Says hello and takes a name. It never resumes."""

    def __init__(self, registry: Path) -> None:
        run = registry.parent / "run"
        self.lifeline = socket.socket(socket.AF_UNIX)
        self.lifeline.connect(str(run / f"{registry.stem}.life"))
        self.lifeline.sendall(b'{"op":"hello","v":1,"client":"stranger"}\n')
        self.welcome = json.loads(self.lifeline.makefile().readline())
        self.requests = zmq.Context().socket(zmq.REQ)
        self.requests.connect(f"ipc://{run / registry.stem}.sock")

    def resolve(self, name: str) -> dict[str, Any]:
        """Take a name, waiting for it without end."""
        request = {"op": "resolve", "v": 1, "seq": 1, "name": name, "component_type": "node", "instance": "stranger"}
        request |= {"token": self.welcome["token"], "epoch": self.welcome["epoch"]}
        while True:
            self.requests.send_json({**request, "wait_s": WAIT_MAX_S, "renew": True})
            reply: Any = self.requests.recv_json()
            if "ok" in reply:
                granted: dict[str, Any] = reply["ok"]
                return granted
            assert reply["error"]["code"] == "waiting", reply
