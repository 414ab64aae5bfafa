"""The file side of registry.json: what it holds as far as we know, and passes over it under its file lock.

Theory of operation
A pass takes the file lock; reads what others wrote since ours, if they did, and judges it (merging.py); adds what the
registry has to say (new texts of entries, claims to take and to drop); writes the file whole; lets go. What came of it
is the Result. Everything here belongs to one thread at a time: the one that starts the daemon, then the bridge's.

A claim is the lock that an old program sees on a name that new programs may hold. It is the daemon's, not a client's:
it stays through hand-overs and through the death of the daemon.
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from madsci_registry import registry_json
from madsci_registry.types import OldLock
from madsci_registryd import fragments, messages
from madsci_registryd.clock import Clock, iso
from madsci_registryd.file_watch import FileWatch
from madsci_registryd.fragments import Identity
from madsci_registryd.merging import Difference, Merge, Refusal, Update, completed, difference, merge
from madsci_registryd.registry_file import FileFault, LockTimeout, RegistryFile, Stamp

LOCK_WAIT_S = 2.0
"""Old programs hold the file lock for milliseconds, and wait 5 s for it themselves."""
RACY_S = 0.1
"""The kernel's clock of files stands still for up to 10 ms; two writes of one length within that have one stamp."""
LARGE_BYTES = 256 * 1024
"""Parsing this much takes some 2 ms in which no other thread runs; more is parsed in a child process."""
PARSE_S = 30.0
LONGEST_TTL_S = 86400.0

log = logging.getLogger(__name__)


class Want(NamedTuple):
    """A name that must be in the file before somebody is answered."""

    name: str
    identity: Identity
    """What to write where the file has not the name yet."""
    lock: bool
    """Claim it, too."""


class Gone(NamedTuple):
    """A name that is no component's any more; where another one has it by now, it stays."""

    ids: tuple[str, ...]
    """Of the component that had it."""


class Outcome(NamedTuple):
    """What the file says of a wanted name now."""

    id: str
    """Which ULID it has there: not the wanted one where an old program made the name."""
    claimed: bool
    held: OldLock | None
    """It was to be claimed, and a living old program has it."""


@dataclass
class Job:
    """What a pass shall bring into the file."""

    put: dict[str, Identity | Gone] = field(default_factory=dict)
    """New texts of names, and names that went (by a rename)."""
    wants: list[Want] = field(default_factory=list)
    drop: set[str] = field(default_factory=set)
    """Claims to take back."""
    revision: int | None = None
    """With `put` the file is as the registry was at this revision."""


@dataclass
class Result:
    """What a pass found and did."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    merge: Merge | None = None
    until: dict[str, float] = field(default_factory=dict)
    """Old locks that changed, and the monotonic instant until which each counts if it is not renewed."""
    aside: str | None = None
    """A file that was not whole is under this name now."""
    busy: bool = False
    """The file lock was not to be had; nothing was done."""
    fault: FileFault | None = None
    written: bool = False
    revision: int | None = None

    @property
    def failed(self) -> bool:
        """The job is not done."""
        return self.busy or self.fault is not None


class Export:
    """registry.json as we know it. Not thread-safe."""

    def __init__(self, path: Path, clock: Clock, claim: bytes, created_at: str) -> None:
        self.path = path
        self._clock = clock
        self._claim = claim
        self._created_at = created_at
        self._file: RegistryFile | None = None
        self.watch = FileWatch(path)
        self._stamp: Stamp | None = None
        self._has_read = False
        self._is_sure = False
        """The stamp tells whether others wrote. Not where they wrote just before we read: stamps are some ms coarse."""
        self._unwritten = False
        """We know more than the file has."""
        self._fault: str | None = None
        self._broken: bytes | None = None
        """A file that was not whole, to be put aside before it is replaced."""
        self._made: set[str] = set()
        """Names that the pass under way brought into the file."""
        self.has_lock = False
        """A pass holds the file lock just now; a hint, for other threads."""
        self._to_put: dict[str, Identity | Gone] = {}
        self._to_drop: set[str] = set()
        self.identities: dict[str, Identity] = {}
        self.claims: set[str] = set()
        self.old: dict[str, OldLock] = {}
        self.until: dict[str, float] = {}
        """Old locks and the monotonic instant until which each counts."""
        self.fresh: set[str] = set()
        """Names and ids of which the registry knows more than an earlier daemon had exported; until the first read."""

    def begin(self, identities: Mapping[str, Identity], old: Mapping[str, OldLock], fresh: set[str]) -> None:
        """Know what the database has, before the first pass."""
        self.identities = dict(identities)
        for name, lock in old.items():
            # Its time ran with an earlier daemon, and the clock may have been stepped meanwhile: it gets it once more.
            self.old[name], self.until[name] = lock, self._clock.monotonic() + _asked_s(lock)
        self.fresh = fresh

    def has_changed(self) -> bool:
        """Tell whether there is something for a pass to find: others wrote, or a fault came or went. Takes no lock."""
        try:
            stamp = self._open().stamp()
        except FileFault as fault:
            return str(fault) != self._fault
        return self._fault is not None or not self._is_sure or stamp != self._stamp

    def run(self, job: Job) -> Result:
        """Make a pass. Never raises for what the file or the disk does."""
        result = Result()
        self._to_put |= job.put
        self._to_drop |= job.drop
        self._made.clear()
        before = self.claims - self._to_drop
        try:
            with self._open().locked(LOCK_WAIT_S):
                self.has_lock = True
                self._pass(job, result)
            self._fault = None
        except LockTimeout:
            result.busy = True
        except FileFault as fault:
            self._take_back(before, result.merge)
            result.outcomes.clear()
            result.fault = fault
            self._fault = str(fault)
            if fault.lasting:
                self._read_unlocked(result)
                self._close()
        except Exception:  # the outer loop of a pass: a fault of ours must not end the keeping of the file
            log.exception("a pass over registry.json broke", extra=messages.FAULT())
            self._take_back(before, None)
            result = Result(fault=FileFault("the daemon has a fault; it was logged", lasting=False))
            self._fault = str(result.fault)
        finally:
            self.has_lock = False
        self._unwritten |= result.failed
        return result

    def _take_back(self, claims: set[str], merged: Merge | None) -> None:
        """Forget what this pass could not write; what others wrote is known all the same."""
        self.claims = (self.claims & claims) | (merged.claims if merged else set())
        for name in self._made:
            self.identities.pop(name, None)
            self.claims.discard(name)

    def _pass(self, job: Job, result: Result) -> None:
        file = self._open()
        stamp = file.stamp()
        if not self._is_sure or stamp != self._stamp:
            stamp = self._read(file, result)
        self._put_all(result.merge)
        self._unwritten |= not self._to_drop.isdisjoint(self.claims)
        self.claims -= self._to_drop
        if result.merge is not None:
            result.merge.claims -= self._to_drop
        self._to_drop.clear()
        for want in job.wants:
            result.outcomes[want.name] = self._want(want, result)
        if self._broken is not None:
            result.aside = file.put_aside(self._broken)
            self._broken = None
        if self._unwritten and (stamp is not None or self.identities):
            stamp = file.write(self._text(iso(self._clock.wall())))
            result.written = True
            self._unwritten = False
            self._is_sure = True
        self._stamp = stamp
        self.watch.forget()
        result.revision = job.revision

    def _put_all(self, merged: Merge | None) -> None:
        """Take over what the registry says. Not before the file was read: it is compared with what was there before."""
        for name, put in self._to_put.items():
            present = self.identities.get(name)
            if isinstance(put, Gone):
                if present is not None and present.id in put.ids:
                    del self.identities[name]
                    self.claims.discard(name)
                    self._set_old(name, None)
                    self._unwritten = True
            elif present != put and (merged is None or name not in merged.updated):
                self.identities[name] = put
                self._unwritten = True  # what was updated is changed in the registry now, and comes again
        self._to_put.clear()

    def _want(self, want: Want, result: Result) -> Outcome:
        name = want.name
        if name not in self.identities:
            self.identities[name] = want.identity
            self._made.add(name)
            self._unwritten = True
        id = self.identities[name].id
        if want.lock and name not in self.claims:
            if name in self.old:
                if self.until[name] > self._clock.monotonic():
                    return Outcome(id, False, self.old[name])
                self._set_old(name, None)
                result.merge = result.merge or Merge()
                result.merge.locks[name] = None
            self.claims.add(name)
            self._unwritten = True
        return Outcome(id, name in self.claims, None)

    # what others wrote

    def _read(self, file: RegistryFile, result: Result) -> Stamp | None:
        read = file.read()
        had_file = self._has_read and self._stamp is not None
        if read is None:
            if had_file:
                result.merge = Merge(refused=[Refusal("file", "", "the file was deleted; it is written again")])
            self._has_read = self._is_sure = self._unwritten = True
            return None
        content, stamp, _ = read
        known = b"".join(self._text(""))
        diff = self._difference(known, content)
        if not diff.whole and (copy := self.watch.copy()) is not None:
            diff = completed(diff, self._difference(known, copy))
        merged = merge(diff, claimed=self.claims, fresh=self.fresh)
        merged.refused += [Refusal("entry" if diff.whole else "file", "", fault) for fault in diff.faults]
        result.merge = merged
        if not diff.whole:
            self._broken = content
        # From here on others' words are ours, whatever becomes of the rest of this pass.
        is_first, self._has_read, self._stamp = not self._has_read, True, stamp
        self._is_sure = abs(self._clock.wall() - stamp.mtime_ns / 1e9) > RACY_S
        self._unwritten |= is_first and bool(diff.removed or diff.changed)
        self.fresh = set()
        self._apply(diff, merged, result, is_first=is_first)
        self.watch.forget()
        return stamp

    def _read_unlocked(self, result: Result) -> None:
        """Where nobody can write the file (a read-only folder), its names count all the same."""
        if self._has_read or self._file is None:
            return
        with suppress(FileFault):
            read = self._file.read()
            if read is not None:
                diff = self._difference(b"".join(self._text("")), read[0])
                adopted = merge(diff, claimed=(), fresh=self.fresh).adopted
                self.identities |= {name: fragments.of_entry(entry) for name, entry in adopted.items()}
                result.merge = Merge(adopted=adopted)

    def _difference(self, known: bytes, found: bytes) -> Difference:
        if max(len(known), len(found)) <= LARGE_BYTES:
            return difference(known, found)
        return difference_in_child(known, found)

    def _apply(self, diff: Difference, merged: Merge, result: Result, *, is_first: bool) -> None:
        for name, entry in merged.adopted.items():
            self.identities[name] = fragments.of_entry(entry)
        for old, new in merged.renamed.items():
            self.identities[new] = self.identities.pop(old)
            self.claims.discard(old)
            self._set_old(old, None)
        for name, update in merged.updated.items():
            self.identities[name] = _updated(diff.changed[name][0], update)
        self.claims |= merged.claims
        for name, lock in merged.locks.items():
            self._set_old(name, lock, is_first=is_first)
            if lock is not None:
                result.until[name] = self.until[name]
        has_lost_claims = not self.claims.isdisjoint(merged.locks)
        if merged.refused or merged.stale or not diff.whole or has_lost_claims:
            self._unwritten = True

    def _set_old(self, name: str, lock: OldLock | None, *, is_first: bool = False) -> None:
        """Note the lock that an old program has written, or that there is none."""
        if lock is None:
            self.old.pop(name, None)
            self.until.pop(name, None)
            return
        # We look four times a second, so it was written just now, whatever the clock says by which old programs judge:
        # it counts for as long as it asked for. Only of what was there before us no more is known than that clock.
        left_s = _seconds(lock.expires_at) - self._clock.wall() if is_first else math.inf
        self.old[name] = lock
        self.until[name] = self._clock.monotonic() + max(min(left_s, _asked_s(lock)), 0.0)

    # text

    def _text(self, now: str) -> Iterator[bytes]:
        return fragments.document(self._created_at, now, self._entries())

    def _entries(self) -> Iterator[tuple[str, bytes, bytes]]:
        for name, identity in self.identities.items():
            lock = self._claim if name in self.claims else fragments.of_lock(self.old.get(name))
            yield name, identity.text, lock

    def _open(self) -> RegistryFile:
        if self._file is None:
            self._file = RegistryFile(self.path)
            self._file.sweep()
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Let go of the folder. Idempotent."""
        self._close()


def _updated(known: dict[str, object], update: Update) -> Identity:
    entry = dict(known)
    metadata = {k: v for k, v in (dict(entry["metadata"]) | update.set).items() if k not in update.unset}  # type: ignore[call-overload]
    entry["metadata"] = metadata
    entry["last_seen"] = update.last_seen or entry["last_seen"]
    entry["workcell_id"] = update.workcell_id or entry["workcell_id"]
    return fragments.of_entry(entry)


def _asked_s(lock: OldLock) -> float:
    """Return for how long after a heartbeat an old program wants to be thought alive (MADSci: 30 s)."""
    return min(max(_seconds(lock.expires_at) - _seconds(lock.heartbeat_at), 0.0), LONGEST_TTL_S)


def _seconds(instant: str) -> float:
    return datetime.fromisoformat(instant.replace("Z", "+00:00")).timestamp()


def difference_in_child(known: bytes, found: bytes) -> Difference:
    """Compare in another process, so that this one's threads go on meanwhile.

    Raises: FileFault where the process cannot be run; the file is looked at again later.
    """
    roots = [str(Path(module).resolve().parent.parent) for module in (registry_json.__file__, __file__)]
    program = f"import sys; sys.path[:0] = {roots!r}; from madsci_registryd.merging import main; main()"
    feed = b"%12d%b%12d%b" % (len(known), known, len(found), found)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", program], input=feed, capture_output=True, timeout=PARSE_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise FileFault(f"registry.json could not be read: {error}", lasting=False) from error
    with suppress(ValueError, TypeError):
        return Difference(**json.loads(done.stdout))
    raise FileFault(f"registry.json could not be read: the reader ended with {done.returncode}", lasting=False)
