"""One process of a mixed fleet: takes shared names for moments and records what it was told, until it is killed.

`python fleet_member.py JOB`: JOB is {"kind", "registry", "record", "seed", "names"}; kind is `new` (RegistryClient),
`madsci` (the real MADSci, in whose environment it runs then: nothing of the checkout but this folder is imported) or
`emulated` (tests/old_program.py). It ends when its stdin does.

It records one line a fact, the instant (CLOCK_MONOTONIC) last; each line is one write, so SIGKILL loses none:

    T name at          asks an old program's lock (its time to live counts from here at the earliest)
    G name id at       was granted the name
    B name at          began a heartbeat that succeeded
    R name at          is about to release it
    I name id at       was told the ULID, no lock taken
    E what at          another error than that it is held
"""

from __future__ import annotations

import json
import os
import random
import select
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

OLD_TTL_S = 2.0
OLD_HEARTBEAT_S = 0.5
FRESH_S = 0.5
"""How long one name is new: all processes ask for it at about once."""
GENERATION_S = 4.0
"""How long the names of a generation are used: in its first part by old programs alone."""
CYCLE_S = 20.0
"""New programs use a name that stays for a third of this only: a claim ends when its name was free for 10 s."""
LONG_S = 3.0
"""A hold that outlives an old program's time to live, but for its heartbeats."""


class HeldByOther(Exception):
    """Somebody else has the name."""


class New:
    """A RegistryClient."""

    def __init__(self, job: dict[str, Any], record: Record) -> None:
        from madsci_registry import RegistryClient

        self._client = RegistryClient(job["registry"], timeout=10.0, autostart=False)

    def take(self, name: str, wait_s: float) -> str:
        from madsci_registry.errors import HeldError

        try:
            return self._client.resolve(name, "node", wait=wait_s).id
        except HeldError as error:
            raise HeldByOther from error

    def give(self, name: str) -> None:
        self._client.release(name)

    def ask(self, name: str) -> str:
        return self._client.resolve(name, "node", acquire_lock=False).id


class Madsci:
    """MADSci's own LocalRegistryManager and LockManager, unmodified; heartbeats are noted."""

    def __init__(self, job: dict[str, Any], record: Record) -> None:
        from madsci.common.registry.local_registry import LocalRegistryManager  # type: ignore[import-not-found]
        from madsci.common.registry.lock_manager import LockManager, RegistryLockError  # type: ignore[import-not-found]

        self._refused = RegistryLockError
        locks = LockManager(lock_ttl=timedelta(seconds=OLD_TTL_S), heartbeat_interval=OLD_HEARTBEAT_S)
        self._manager = LocalRegistryManager(registry_path=Path(job["registry"]), lock_manager=locks)
        refresh = self._manager.refresh_lock

        def noted(name: str) -> None:
            began = time.monotonic()
            refresh(name)
            record.note("B", name, at=began)

        self._manager.refresh_lock = noted

    def take(self, name: str, wait_s: float) -> str:
        try:
            return str(self._manager.resolve(name, "node"))
        except self._refused as error:
            raise HeldByOther from error

    def give(self, name: str) -> None:
        self._manager.release(name)

    def ask(self, name: str) -> str:
        return str(self._manager.resolve(name, "node", acquire_lock=False))


class Emulated:
    """tests/old_program.py."""

    def __init__(self, job: dict[str, Any], record: Record) -> None:
        from old_program import OldHeldError, OldProgram

        self._refused = OldHeldError
        self._program = OldProgram(Path(job["registry"]))

    def take(self, name: str, wait_s: float) -> str:
        try:
            return self._program.resolve(name)
        except self._refused as error:
            raise HeldByOther from error

    def give(self, name: str) -> None:
        self._program.release(name)

    def ask(self, name: str) -> str:
        return self._program.resolve(name, lock=False)


class Record:
    """What this process was told."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, *facts: str, at: float | None = None) -> None:
        instant = time.monotonic() if at is None else at
        os.write(self._file, " ".join((*facts, f"{instant:.6f}\n")).encode())


def choose(chance: random.Random, names: int) -> tuple[str, bool]:
    """Return a shared name, and whether new programs take it just now."""
    number, now = chance.randrange(names), time.monotonic()
    if chance.random() < 0.5:
        generation = now / GENERATION_S
        return f"shared-{int(generation)}-{number}", generation % 1 > 0.4
    return f"shared-{number}", (now / CYCLE_S + number / names) % 1 < 0.35


def turn(member: New | Madsci | Emulated, record: Record, chance: random.Random, job: dict[str, Any]) -> None:
    """Do one thing: ask for a name that is just being made, or hold a shared one."""
    if chance.random() < 0.2:
        name = f"fresh-{int(time.monotonic() / FRESH_S)}"
        record.note("I", name, member.ask(name))
        return
    name, is_for_new = choose(chance, job["names"])
    if job["kind"] == "new" and not is_for_new:
        time.sleep(0.01)
        return
    record.note("T", name)
    try:
        id = member.take(name, chance.choice((0, 0.2, 1.0)))
    except HeldByOther:
        time.sleep(chance.random() * 0.02)
        return
    record.note("G", name, id)
    is_long = job["kind"] != "emulated" and chance.random() < 0.03
    time.sleep(LONG_S if is_long else chance.random() * 0.005)
    record.note("R", name)
    member.give(name)
    if job["kind"] == "new":
        time.sleep(chance.random() * job["rest_s"])


def main() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, 9)  # dies with the test
    job = json.loads(sys.argv[1])
    record, chance = Record(job["record"]), random.Random(job["seed"])
    kinds: dict[str, type[New | Madsci | Emulated]] = {"new": New, "madsci": Madsci, "emulated": Emulated}
    member = kinds[job["kind"]](job, record)
    while not select.select([0], [], [], 0)[0]:
        try:
            turn(member, record, chance, job)
        except Exception as error:  # noqa: BLE001 - what it is told is judged from outside
            record.note("E", type(error).__name__)
            time.sleep(0.02)
    os._exit(0)  # as most programs of MADSci end


if __name__ == "__main__":
    main()
