"""A session spoken by hand over plain sockets and zmq, as another language would, or as nobody should.

`RawClient` is one in the calling process, `Hammer` many of them, one after the other. `RawProcess` is one in a process
of its own that does what it is told, like helpers.Worker: `ask` with a method of `Obeyer`. Nothing of madsci_registry
is used here.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import zmq

from helpers import PATIENCE_S, TESTS, Worker, environment, until

_PR_SET_PDEATHSIG = 1
_SLEEP = "/bin/sleep"


class RawClient:
    """A lifeline and a request socket of the daemon at `requests` (NAME.sock); hello or resume begins a session."""

    def __init__(self, requests: Path, patience_s: float = PATIENCE_S) -> None:
        self._buffer = b""
        self.stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.stream.settimeout(patience_s)
        try:
            self.stream.connect(str(requests.with_suffix(".life")))
        except OSError:
            self.stream.close()
            raise
        self.context = zmq.Context()
        self.request = self.context.socket(zmq.REQ)
        for option, value in ((zmq.LINGER, 0), (zmq.RCVTIMEO, int(patience_s * 1000)), (zmq.SNDTIMEO, 5000)):
            self.request.setsockopt(option, value)
        self.request.connect(f"ipc://{requests}")
        self.token = ""
        self.epoch = 0
        self.seq = 0

    def say(self, line: dict[str, Any]) -> None:
        """Send a line on the lifeline."""
        self.stream.sendall(json.dumps(line).encode() + b"\n")

    def heard(self) -> dict[str, Any] | None:
        """Return the next line of the daemon, None at the end of the lifeline."""
        while b"\n" not in self._buffer:
            try:
                piece = self.stream.recv(65536)
            except ConnectionError:
                return None
            if not piece:
                return None
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\n", 1)
        heard = json.loads(line)
        assert isinstance(heard, dict)
        return heard

    def hello(self) -> dict[str, Any] | None:
        """Begin a session; return what the daemon answers."""
        return self._begin({"op": "hello", "client": "raw"})

    def resume(self, token: str) -> dict[str, Any] | None:
        """Go on with a session; return what the daemon answers."""
        return self._begin({"op": "resume", "token": token, "client": "raw"})

    def _begin(self, line: dict[str, Any]) -> dict[str, Any] | None:
        try:
            self.say(line)
        except ConnectionError:
            return None
        welcome = self.heard()
        if welcome is not None and welcome["op"] == "welcome":
            self.token, self.epoch = welcome.get("token") or line["token"], welcome["epoch"]
        return welcome

    def message(self, op: str, **fields: Any) -> dict[str, Any]:
        """Return a request with the next number."""
        self.seq += 1
        return {"op": op, "v": 1, "token": self.token, "epoch": self.epoch, "seq": self.seq, **fields}

    def request_of(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a request and return its reply, whatever it is."""
        self.request.send(json.dumps(self.message(op, **fields)).encode())
        reply = json.loads(self.request.recv())
        assert isinstance(reply, dict)
        return reply

    def resolve(self, name: str, *, instance: str = "raw", **fields: Any) -> dict[str, Any]:
        """Ask for a name and its lock; return the reply."""
        return self.request_of("resolve", name=name, component_type="node", instance=instance, **fields)

    def close(self) -> None:
        """Close all without a word."""
        self.stream.close()
        self.request.close()
        self.context.term()


class Hammer:
    """Asks for a name without waiting, again and again, each time as a new client. A context manager.

    `refused` says how often each run of the daemon (by its epoch) answered that the name is held; `granted` has what
    else it answered.
    """

    def __init__(self, requests: Path, name: str) -> None:
        self.refused: Counter[int] = Counter()
        self.granted: list[dict[str, Any]] = []
        self._requests = requests
        self._name = name
        self._is_over = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Hammer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join()

    def await_refusal(self) -> None:
        """Wait until the daemon that runs now has refused once more."""
        with closing(RawClient(self._requests)) as client:
            client.hello()
            enough = self.refused[client.epoch] + 1
            until(lambda: self.refused[client.epoch] >= enough or self.granted, "for the hammer to be refused")

    def _run(self) -> None:
        while not self._is_over:
            try:
                with closing(RawClient(self._requests, 0.3)) as client:
                    self._ask(client)
            except (OSError, zmq.Again):  # the daemon is just away
                time.sleep(0.001)

    def _ask(self, client: RawClient) -> None:
        welcome = client.hello()
        if welcome is None or welcome["op"] != "welcome":
            return  # the daemon just goes away
        reply = client.resolve(self._name)
        code = reply.get("error", {}).get("code")
        if code == "held":
            self.refused[client.epoch] += 1
        elif code not in ("session_required", "unavailable"):
            self.granted.append(reply)


class RawProcess(Worker):
    """A RawClient in a process of its own. A context manager."""

    def __init__(self, requests: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "raw_client.py"), str(requests)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
        )
        self._buffer = b""

    def __enter__(self) -> RawProcess:
        return self

    def holds(self, name: str) -> int:
        """Begin a session if there is none, take a name, and return its fencing token."""
        reply = self.ask("resolve", name)
        assert "ok" in reply, reply
        return int(reply["ok"]["fencing_token"])


class Obeyer:
    """What a RawProcess can be told to do. Methods of RawClient go to its client, that the first of them makes."""

    def __init__(self, requests: Path) -> None:
        self.requests = requests
        self.client: RawClient | None = None
        self.kept: list[RawClient] = []

    def obey(self, call: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        own = getattr(self, f"do_{call}", None)
        return own(*args, **kwargs) if own else getattr(self._client(), call)(*args, **kwargs)

    def _client(self) -> RawClient:
        if self.client is None:
            self.client = RawClient(self.requests)
        return self.client

    def do_resolve(self, name: str, **fields: Any) -> dict[str, Any]:
        if not self._client().token:
            self._client().hello()
        return {**self._client().resolve(name, **fields), "at": time.monotonic()}

    def do_token(self) -> str:
        return self._client().token

    def do_heard_before(self) -> dict[str, Any] | None:
        """Return the next line on the connection before this one."""
        return self.kept[-1].heard()

    def do_connect(self) -> None:
        """Connect anew, and keep the old connection open."""
        self.kept.append(self._client())
        self.client = RawClient(self.requests)

    def do_shut(self, *ways: str) -> float:
        """Shut down the lifeline that way, or those ways."""
        for way in ways:
            self._client().stream.shutdown(getattr(socket, way))
        return time.monotonic()

    def do_hang_up(self) -> float:
        """Close the lifeline without a word."""
        at = time.monotonic()
        self._client().stream.close()
        return at

    def do_give(self, path: str) -> None:
        """Pass the lifeline to whoever listens at `path` (SCM_RIGHTS)."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as to:
            to.connect(path)
            socket.send_fds(to, [b"lifeline"], [self._client().stream.fileno()])
            to.recv(1)

    def do_listen(self, path: str) -> None:
        """Listen where `take` will be given a lifeline."""
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(path)
        self.listener.listen()

    def do_take(self) -> None:
        """Use the lifeline that is given, from now on."""
        sock, _ = self.listener.accept()
        with sock:
            _, fds, _, _ = socket.recv_fds(sock, 64, 1)
            self._client().stream.close()
            self._client().stream = socket.socket(fileno=fds[0])
            self._client().stream.settimeout(PATIENCE_S)
            sock.sendall(b".")

    def do_fork(self) -> int:
        """Fork a child that keeps all that is open, until the pipe from the test closes; return its pid."""
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)  # it shall outlive this process, not the test
            os.read(0, 1)
            os._exit(0)
        return pid

    def do_exec(self, keep_lifeline: bool) -> None:
        """Become `sleep`; answer before that."""
        os.set_inheritable(self._client().stream.fileno(), keep_lifeline)
        _answer(None)
        os.execv(_SLEEP, [_SLEEP, "600"])


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps({"ok": value}) + "\n")
    sys.stdout.flush()


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    obeyer = Obeyer(Path(sys.argv[1]))
    for line in sys.stdin:
        order = json.loads(line)
        _answer(obeyer.obey(order["call"], order["args"], order["kwargs"]))


if __name__ == "__main__":
    main()
