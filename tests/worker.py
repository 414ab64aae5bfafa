"""A client process for tests: calls of a RegistryClient as JSON lines on stdin, answers on stdout (helpers.Worker).

Calls of its own: `losses(count, patience_s)` waits for so many on_lost callbacks and returns [[name, token], ...];
`held(name)`, `ensure(name)` ask the last Registration of that name; `hello` answers its pid; `fork` forks a child that
sleeps until the worker's stdin closes, and answers the child's pid; `time_lookups(name, seconds)` answers how long each
of its lookups took, in seconds; `change_metadata(name, seconds)` changes it all the time; `flood(name, seconds)` looks
it up in eight threads as fast as it can and answers how often; `knock(socket, patience_s)` sends rubbish to the
requests' socket and tells whether anything came back; `storm(lifeline, connections, seconds)` says lines on
lifelines of its own as fast as it can and answers how many bytes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import pkgutil
import signal
import socket
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq

import madsci_registry
from madsci_registry import RegistryClient, RegistryError
from madsci_registry.types import ComponentType

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4


class Obeyer:
    """One client and what was granted to it."""

    def __init__(self, registry: str) -> None:
        self.client = RegistryClient(registry, timeout=10.0)
        self.registrations: dict[str, Any] = {}
        self.lost: list[list[Any]] = []
        self.changed = threading.Condition()

    def obey(self, call: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        own = getattr(self, f"do_{call}", None)
        return own(*args, **kwargs) if own else shown(getattr(self.client, call)(*args, **kwargs))

    def do_hello(self) -> int:
        return os.getpid()

    def do_resolve(self, name: str, component_type: ComponentType = "node", **kwargs: Any) -> dict[str, Any]:
        registration = self.client.resolve(name, component_type, **kwargs)
        at = time.monotonic()
        self.registrations[name] = registration
        registration.on_lost(self._note)
        fields = ("id", "name", "component_type", "is_new", "source", "fencing_token", "held")
        return {**{field: getattr(registration, field) for field in fields}, "at": at}

    def do_losses(self, count: int, patience_s: float = 20.0) -> list[list[Any]]:
        with self.changed:
            self.changed.wait_for(lambda: len(self.lost) >= count, patience_s)
            return list(self.lost)

    def do_held(self, name: str) -> bool:
        return bool(self.registrations[name].held)

    def do_token(self, name: str) -> Any:
        return self.registrations[name].fencing_token

    def do_ensure(self, name: str) -> None:
        self.registrations[name].ensure()

    def do_fork(self) -> int:
        with warnings.catch_warnings():  # forking a process with threads is what shall be tested
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)  # the child shall outlive this worker, not the test
            os.read(0, 1)
            os._exit(0)
        return pid

    def do_time_lookups(self, name: str, seconds: float) -> list[float]:
        taken: list[float] = []
        now = ends = time.monotonic()
        ends += seconds
        while now < ends:
            self.client.lookup(name)
            now, before = time.monotonic(), now
            taken.append(now - before)
            time.sleep(0.0005)
            now = time.monotonic()
        return taken

    def do_flood(self, name: str, seconds: float) -> int:
        counts: list[int] = []

        def ask() -> None:
            ends, count = time.monotonic() + seconds, 0
            while time.monotonic() < ends:
                self.client.lookup(name)
                count += 1
            counts.append(count)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts)

    def do_storm(self, lifeline: str, connections: int, seconds: float) -> int:
        lines, count = [socket.socket(socket.AF_UNIX) for _ in range(connections)], 0
        said = b'{"op":"cancel","seq":1}\n' * 1000
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            for n, line in enumerate(lines):
                try:
                    count += line.send(said)
                except BlockingIOError:
                    pass
                except OSError:  # not connected yet, or not any more
                    line.close()
                    again = lines[n] = socket.socket(socket.AF_UNIX)
                    again.setblocking(False)
                    with suppress(OSError):
                        again.connect(lifeline)
                        again.send(b'{"op":"hello","v":1,"client":"storm"}\n')
        for line in lines:
            line.close()
        return count

    def do_knock(self, path: str, patience_s: float) -> bool:
        with zmq.Context() as context, context.socket(zmq.REQ) as request:
            request.setsockopt(zmq.LINGER, 0)
            request.connect(f"ipc://{path}")
            request.send(b"no request")
            return bool(request.poll(int(patience_s * 1000)))

    def do_change_metadata(self, name: str, seconds: float) -> int:
        ends, count = time.monotonic() + seconds, 0
        while time.monotonic() < ends:
            self.client.set_metadata(name, {"n": count})
            count += 1
            time.sleep(0.02)
        return count

    def _note(self, registration: Any) -> None:
        with self.changed:
            self.lost.append([registration.name, registration.fencing_token])
            self.changed.notify_all()


def shown(value: Any) -> Any:
    """Return a value of the client as JSON."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (list, tuple)):
        return [shown(item) for item in value]
    if isinstance(value, RegistryError):
        return {"error": value.to_wire()}
    return str(value) if isinstance(value, Path) else value


def become(user: str) -> None:
    """Be another user (UID:GID[:GROUP...]) from now on; this interpreter may be one that such a user cannot read."""
    for module in pkgutil.walk_packages(madsci_registry.__path__, "madsci_registry."):
        importlib.import_module(module.name)
    uid, gid, *groups = map(int, user.split(":"))
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1)


def main() -> None:
    if user := os.environ.get("WORKER_USER"):
        become(user)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    obeyer = Obeyer(sys.argv[1])
    for line in sys.stdin:
        order = json.loads(line)
        try:
            reply = {"ok": obeyer.obey(order["call"], order["args"], order["kwargs"])}
        except RegistryError as error:
            reply = {"error": error.to_wire()}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
    obeyer.client.close()


if __name__ == "__main__":
    main()
