"""A process that floods a daemon with requests as fast as it can, of one kind, without waiting for answers.

    flooder.py NAME.sock UID:GID KIND SOCKETS SECONDS

Over so many sockets of one session; prints how many requests it sent, and how many answers of each kind came.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import zmq

from helpers import PATIENCE_S, TESTS, environment

BODIES: dict[str, dict[str, Any]] = {
    "lookup": {"op": "lookup", "name": "arm"},
    "list": {"op": "list"},
    "make": {"op": "resolve", "component_type": "node", "instance": "i", "acquire_lock": False},
    "take": {"op": "resolve", "component_type": "node", "instance": "i"},
    "watch": {"op": "watch", "after": 1 << 52, "wait_s": 5.0},
    "rubbish": {"op": "no such verb", "padding": "x" * 100_000},
}


class Flooder:
    """Such a process; `sent` is what it says at its end."""

    def __init__(self, daemon: Path, user: str, kind: str, *, sockets: int, seconds: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "flooder.py"), str(daemon), user, kind, str(sockets), str(seconds)],
            stdout=subprocess.PIPE,
            env=environment(PYTHONWARNINGS="ignore"),  # it leaves its sockets to the end of the process
        )

    def __enter__(self) -> Flooder:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)
        assert self._process.stdout
        self._process.stdout.close()

    def result(self) -> dict[str, Any]:
        """Wait for its end and return {"sent": count, "answers": {code: count}}."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the flooder ended without a word"
        return dict(json.loads(line))


def flood(requests: Path, kind: str, sockets: int, seconds: float) -> dict[str, Any]:
    """Send for so many seconds."""
    lifeline = socket.socket(socket.AF_UNIX)
    lifeline.connect(str(requests.with_suffix(".life")))
    lifeline.sendall(b'{"op":"hello","v":1,"client":"flood"}\n')
    welcome = json.loads(lifeline.makefile().readline())
    context = zmq.Context()
    dealers = []
    for _ in range(sockets):
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(f"ipc://{requests}")
        dealers.append(dealer)
    ends, seq, sent = time.monotonic() + seconds, 0, 0
    answers: Counter[str] = Counter()
    while time.monotonic() < ends:
        for dealer in dealers:
            seq += 1
            body = {"v": 1, "token": welcome["token"], "epoch": welcome["epoch"], "seq": seq, **BODIES[kind]}
            if kind in ("make", "take"):
                body["name"] = f"{os.getpid()}-{seq}"
            try:
                dealer.send_multipart([b"", json.dumps(body).encode()], zmq.NOBLOCK)
                sent += 1
            except zmq.Again:
                pass
            try:
                while True:
                    answer = json.loads(dealer.recv_multipart(zmq.NOBLOCK)[-1])
                    answers["ok" if "ok" in answer else answer["error"]["code"]] += 1
            except zmq.Again:
                pass
    return {"sent": sent, "answers": dict(answers)}


def main() -> None:
    requests, user, kind, sockets, seconds = sys.argv[1:]
    uid, gid = map(int, user.split(":"))
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    print(json.dumps(flood(Path(requests), kind, int(sockets), float(seconds))), flush=True)
    os._exit(0)  # not waiting for what zmq still has


if __name__ == "__main__":
    main()
