"""An old program: what MADSci's registry does to registry.json, by its documentation and by what was seen of it.

It takes the file lock, reads the file, decides by `expires_at` alone, and writes the file in place. As a program,
`python old_program.py REGISTRY` does what it reads on stdin, a JSON array a line, and heartbeats by itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import ulid

TTL_S = 30.0
HEARTBEAT_S = 10.0


class OldHeldError(Exception):
    """Somebody else's lock is on the name, and not over."""


class OldProgram:
    """One holder. `wall` is its clock."""

    def __init__(self, registry: Path, wall: Callable[[], float] = time.time, pid: int | None = None) -> None:
        self.registry = registry
        self.instance = str(ulid.ULID())
        self.pid = os.getpid() if pid is None else pid
        self._wall = wall
        self.holds: set[str] = set()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the file lock."""
        with open(f"{self.registry}.lock", "a") as lock:  # noqa: PTH123 - a path with a suffix of its own
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def read(self) -> dict[str, Any]:
        if not self.registry.exists():
            now = self._now()
            return {"version": 1, "created_at": now, "updated_at": now, "entries": {}}
        return dict(json.loads(self.registry.read_text()))

    def write(self, registry: dict[str, Any]) -> None:
        registry["updated_at"] = self._now()
        with self.registry.open("w") as file:
            json.dump(registry, file, indent=2)

    def _now(self, ahead_s: float = 0.0) -> str:
        when = datetime.fromtimestamp(self._wall(), timezone.utc) + timedelta(seconds=ahead_s)
        return when.isoformat().replace("+00:00", "Z")

    def _is_locked(self, entry: dict[str, Any]) -> bool:
        lock = entry.get("lock")
        return (
            lock is not None
            and self._wall() < datetime.fromisoformat(lock["expires_at"].replace("Z", "+00:00")).timestamp()
        )

    def _lock(self, entry: dict[str, Any]) -> None:
        if self._is_locked(entry) and entry["lock"]["holder_instance"] != self.instance:
            raise OldHeldError(str(entry["lock"]))
        now = self._now()
        entry["lock"] = {
            "holder_pid": self.pid,
            "holder_host": "old-host",
            "holder_instance": self.instance,
            "acquired_at": now,
            "heartbeat_at": now,
            "expires_at": self._now(TTL_S),
        }

    def resolve(
        self, name: str, component_type: str = "node", metadata: dict[str, Any] | None = None, lock: bool = True
    ) -> str:
        """Return the ULID of a name, made if new, and hold it."""
        with self.locked():
            registry = self.read()
            entry = registry["entries"].get(name)
            if entry is None:
                now = self._now()
                entry = {"id": str(ulid.ULID()), "component_type": component_type, "created_at": now, "last_seen": now}
                entry |= {"metadata": {}, "lock": None, "workcell_id": None}
                registry["entries"][name] = entry
            if lock:
                self._lock(entry)
            entry["last_seen"] = self._now()
            entry["metadata"].update(metadata or {})
            self.write(registry)
        if lock:
            self.holds.add(name)
        return str(entry["id"])

    def heartbeat(self, name: str) -> bool:
        """Renew a lock; False: it is not this program's any more."""
        with self.locked():
            registry = self.read()
            lock = registry["entries"].get(name, {}).get("lock")
            if lock is None or lock["holder_instance"] != self.instance:
                return False
            lock["heartbeat_at"], lock["expires_at"] = self._now(), self._now(TTL_S)
            registry["entries"][name]["last_seen"] = self._now()
            self.write(registry)
        return True

    def release(self, name: str) -> None:
        """Give a name back."""
        self.holds.discard(name)
        with self.locked():
            registry = self.read()
            entry = registry["entries"].get(name)
            if entry and entry["lock"] and entry["lock"]["holder_instance"] == self.instance:
                entry["lock"] = None
                self.write(registry)

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the entries in any way, under the file lock: `rename`, `clean` and `import` do."""
        with self.locked():
            registry = self.read()
            change(registry["entries"])
            self.write(registry)


def main() -> None:
    program = OldProgram(Path(sys.argv[1]))
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(HEARTBEAT_S):
            for name in list(program.holds):
                program.heartbeat(name)

    threading.Thread(target=beat, daemon=True).start()
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        try:
            answer: dict[str, Any] = {"ok": getattr(program, verb)(*arguments)}
        except OldHeldError as error:
            answer = {"held": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
