"""A client process of the crash test: does what it is told in JSON lines on stdin, answers on stdout.

Run with `python -m`, its arguments are REGISTRY and PARENT_PID. It dies with its parent (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import warnings
from typing import Any

from madsci_registry import RegistryClient, RegistryError
from madsci_registry.registration import Registration

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
REQUEST_S = 10.0
"""For one request, over a restart of the daemon too."""
POLL_S = 0.002
"""Between two questions to a daemon that is not there yet: what its start is measured to."""


class Obeyer:
    """One client, and what was granted to it. Each method is an order; what it returns is the answer."""

    def __init__(self, registry: str) -> None:
        self.client = RegistryClient(registry, timeout=REQUEST_S, autostart=False)
        self.registrations: dict[str, Registration] = {}

    def resolve(self, name: str, wait_s: float = 0.0) -> dict[str, Any]:
        """Take the lock; `at` is the monotonic instant at which it was there, the same clock for all processes."""
        registration = self.client.resolve(name, "node", wait=wait_s)
        at = time.monotonic()
        self.registrations[name] = registration
        return {"at": at, "token": registration.fencing_token}

    def look(self, name: str) -> dict[str, Any]:
        """Say who has the lock, by the daemon's word."""
        found = self.client.get(name)
        return {
            "token": found.fencing_token,
            "pid": found.holder.pid if found.holder else None,
            "waiting": found.waiting,
        }

    def held(self, name: str) -> dict[str, Any]:
        """Say whether this process has the lock, by its own knowledge after it has heard the daemon."""
        self.client.get(name)
        registration = self.registrations[name]
        return {"held": registration.held, "token": registration.fencing_token}

    def answered(self) -> dict[str, Any]:
        """Ask until a daemon answers, and say when that was."""
        while True:
            try:
                self.client.status()
                return {"at": time.monotonic()}
            except RegistryError:
                time.sleep(POLL_S)

    def fork(self) -> dict[str, Any]:
        """Fork a child that lives until our stdin is closed, whatever becomes of this process."""
        with warnings.catch_warnings():  # forking a process with threads is what shall be tried
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            os.read(0, 1)
            os._exit(0)
        return {"pid": pid}

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order; a refusal is an answer too."""
        call = order.pop("call")
        try:
            done: dict[str, Any] = getattr(self, call)(**order)
            return done
        except RegistryError as error:
            return {"error": error.to_wire()}


def die_with(parent_pid: int) -> None:
    """Have the kernel end this process when its parent ends, or end here where that was so already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(1)


def main() -> None:
    """Obey until stdin ends."""
    die_with(int(sys.argv[2]))
    obeyer = Obeyer(sys.argv[1])
    for line in sys.stdin:
        sys.stdout.write(json.dumps(obeyer.obey(json.loads(line))) + "\n")
        sys.stdout.flush()
    obeyer.client.close()


if __name__ == "__main__":
    main()
