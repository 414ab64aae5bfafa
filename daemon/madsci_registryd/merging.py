"""What old programs wrote into registry.json, and what of it is taken in. Pure: no file, no SQL, no clock.

Rules
1. What is known keeps its ULID. A name that is new comes in with the ULID that it has there. A ULID that is known as
   the same component, though not the preferred one, is as good; the preferred one is written again.
2. Nothing is deleted: a name that is missing is written again. One name gone and one new with its ULID is a rename.
3. Refused: a rename of a name that a new program holds, a second ULID for a name or name for a ULID, another type.
4. An entry whose metadata cannot be kept comes in without them: its identity and its lock count all the same.
5. Metadata: the keys that the old program changed are changed here too. Where the registry may know better than the
   file did (`fresh`), only keys that it does not have come in.
6. The lock of an old program is its own word, taken as it is; whether it still counts is a matter of the clock, and not
   decided here. Our claims are no locks of old programs.
7. A file that is not whole says nothing by what it lacks.
What is refused is written again as it was, and told.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from madsci_registry import registry_json
from madsci_registry.registry_json import detail_fault, identity_fault, is_claim, is_id
from madsci_registry.types import OldLock
from madsci_registryd.clock import instant

Entry = dict[str, Any]

LAST_INSTANT = "9999-12-31T23:59:59.999999Z"
_INT_MAX = (1 << 63) - 1
OTHER_IDS_MAX = 100
"""Of one component: one for each host that made it by itself. More are not taken in."""
METADATA_KEPT_BYTES = 256 * 1024
"""A quarter of a frame (protocol.FRAME_MAX_BYTES); new ones may have 16 KiB."""


@dataclass
class Difference:
    """How a file differs from what we know it to hold; plain values, since a child process may have found it."""

    whole: bool
    """False: it was torn; what could be read of it is here."""
    faults: list[str] = field(default_factory=list)
    """What could not be read, each with its place."""
    added: dict[str, Entry] = field(default_factory=dict)
    removed: dict[str, Entry] = field(default_factory=dict)
    changed: dict[str, tuple[Entry, Entry]] = field(default_factory=dict)
    """As we know it, as it is there."""
    owners: dict[str, str] = field(default_factory=dict)
    """Ids of what was added to the names by which we know them."""


def difference(known: bytes, found: bytes) -> Difference:
    """Compare the file as we know it (valid, ours) with the bytes that are there."""
    document = registry_json.parse(found)
    base: dict[str, Entry] = json.loads(known)["entries"]
    unread = {fault.name for fault in document.faults if fault.name is not None}
    diff = Difference(document.whole, [str(fault) for fault in document.faults])
    bare = _bare_entries(found, unread) if document.whole and unread else {}
    for name, entry in bare.items():
        known_details = {key: base[name][key] for key in ("metadata", "workcell_id")} if name in base else {}
        document.entries[name] = entry | known_details
    for name, entry in document.entries.items():
        if name not in base:
            diff.added[name] = entry
        elif entry != base[name]:
            diff.changed[name] = base[name], entry
    if document.whole:
        diff.removed = {name: base[name] for name in base.keys() - document.entries.keys() - unread}
    if diff.added:
        by_id = {other: name for name, entry in base.items() for other in other_ids(entry)}
        by_id |= {entry["id"]: name for name, entry in base.items()}
        ids = (entry.get("id") for entry in diff.added.values())
        diff.owners = {id: by_id[id] for id in ids if isinstance(id, str) and id in by_id}
    return diff


def completed(torn: Difference, before: Difference) -> Difference:
    """Add to what a torn file still has what was there before it was torn; what it has itself is newer."""
    return Difference(
        False,
        torn.faults,
        before.added | torn.added,
        changed=before.changed | torn.changed,
        owners=before.owners | torn.owners,
    )


def _bare_entries(found: bytes, names: Collection[str]) -> dict[str, Entry]:
    """Return identity and lock of entries of which something cannot be stored, as old programs read them."""
    try:
        entries = json.loads(found)["entries"]
    except (ValueError, RecursionError):
        return {}  # then no old program reads the file either
    keys = ("id", "component_type", "created_at", "last_seen", "lock")
    found_there = {name: entries.get(name) for name in names}
    return {
        name: {key: entry[key] for key in keys if key in entry}
        for name, entry in found_there.items()
        if isinstance(entry, dict)
    }


class Refusal(NamedTuple):
    """Something that an old program wrote and that is not taken in."""

    what: str
    """deletion, rename, id, component_type, metadata, entry, lock or file."""
    name: str
    detail: str
    writer: OldLock | None = None
    """Who wrote it, as far as its lock in the file tells."""


class Update(NamedTuple):
    """What an old program changed of a name that we know."""

    set: dict[str, Any]
    unset: list[str]
    last_seen: str | None
    workcell_id: str | None


@dataclass
class Merge:
    """What is taken in, and what is refused."""

    adopted: dict[str, Entry] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    """Old names to new ones."""
    updated: dict[str, Update] = field(default_factory=dict)
    locks: dict[str, OldLock | None] = field(default_factory=dict)
    """Names whose lock in the file changed, and to what."""
    claims: set[str] = field(default_factory=set)
    """Names that have our claim there."""
    refused: list[Refusal] = field(default_factory=list)
    stale: set[str] = field(default_factory=set)
    """Names that have a ULID there which is not the preferred one."""


def merge(diff: Difference, *, claimed: Collection[str], fresh: Collection[str] = ()) -> Merge:
    """Judge what others wrote. `claimed`: names that new programs may hold; `fresh`: names or ids of which the registry
    knows more than the file did."""
    out = Merge()
    gone = dict(diff.removed)
    for name, entry in diff.added.items():
        _merge_new(out, name, entry, diff.owners, gone, claimed, fresh)
    for name, entry in gone.items():
        if name not in fresh and entry["id"] not in fresh:
            out.refused.append(Refusal("deletion", name, f"{entry['id']} stays", old_lock(entry.get("lock"))))
    for name, (known, entry) in diff.changed.items():
        _merge_known(out, name, known, entry, claimed, fresh, torn=not diff.whole)
    return out


def _merge_new(
    out: Merge,
    name: str,
    entry: Any,
    owners: Mapping[str, str],
    gone: dict[str, Entry],
    claimed: Collection[str],
    fresh: Collection[str],
) -> None:
    fault = identity_fault(name, entry)
    if fault:
        out.refused.append(Refusal("entry", name, fault))
        return
    id, lock = entry["id"], entry.get("lock")
    owner = owners.get(id)
    if owner is None:
        if any(other["id"] == id for other in out.adopted.values()):
            out.refused.append(Refusal("id", name, f"{id} has two names there", old_lock(lock)))
            return
        out.adopted[name] = _without_faults(out, name, entry, {})
    elif owner in gone and owner not in claimed and not {owner, id} & set(fresh):
        if id != gone.pop(owner)["id"]:
            out.stale.add(name)
        out.renamed[owner] = name
    elif is_claim(lock) or id in fresh:
        return  # what an unfinished rename of ours left
    elif owner in gone:
        del gone[owner]
        out.refused.append(Refusal("rename", name, f"{owner!r} is held by a new program", old_lock(lock)))
        return
    else:
        out.refused.append(Refusal("id", name, f"{id} is {owner!r}", old_lock(lock)))
        return
    _take_lock(out, name, lock)


def _without_faults(out: Merge, name: str, entry: Entry, known: Entry) -> Entry:
    """Leave out details that cannot be kept, or that no answer could hold, and tell it; the known ones stay."""
    fault = detail_fault(entry)
    if not fault and (size := len(json.dumps(entry.get("metadata") or {}))) > METADATA_KEPT_BYTES:
        fault = f"metadata: {size} bytes, at most {METADATA_KEPT_BYTES} are taken in"
    if not fault:
        return entry
    out.refused.append(Refusal("metadata", name, fault))
    return entry | {"metadata": known.get("metadata") or {}, "workcell_id": known.get("workcell_id")}


def _merge_known(
    out: Merge, name: str, known: Entry, entry: Any, claimed: Collection[str], fresh: Collection[str], *, torn: bool
) -> None:
    fault = identity_fault(name, entry)
    if fault:
        out.refused.append(Refusal("entry", name, fault))
        return
    entry = _without_faults(out, name, entry, known)
    lock = entry.get("lock")
    writer = old_lock(lock)
    is_stale = entry["id"] != known["id"] and entry["id"] in other_ids(known)
    if is_stale:
        out.stale.add(name)
    if entry["id"] != known["id"] and not is_stale:
        out.refused.append(Refusal("id", name, f"is {known['id']}, not {entry['id']}", writer))
    elif entry["component_type"] != known["component_type"]:
        what = f"is a {known['component_type']}, not a {entry['component_type']}"
        out.refused.append(Refusal("component_type", name, what, writer))
    else:
        update = _update(known, entry, is_fresh=name in fresh or known["id"] in fresh)
        if any(update):
            out.updated[name] = update
    if lock == known.get("lock") or (torn and writer is None):
        return
    if writer is not None and writer == old_lock(known.get("lock")):
        return  # the same in other words
    if name in claimed and writer is not None:
        out.refused.append(Refusal("lock", name, "a new program has it", writer))
    else:
        _take_lock(out, name, lock)


def _take_lock(out: Merge, name: str, lock: Any) -> None:
    if is_claim(lock):
        out.claims.add(name)
    else:
        out.locks[name] = old_lock(lock)


def _update(known: Entry, entry: Entry, *, is_fresh: bool) -> Update:
    old, new = known["metadata"], entry.get("metadata") or {}
    changed = {k: v for k, v in new.items() if k not in old or (old[k] != v and not is_fresh)}
    dropped = [] if is_fresh else [k for k in old if k not in new]
    seen = instant(entry.get("last_seen"))
    workcell = entry.get("workcell_id")
    return Update(
        changed,
        dropped,
        seen if seen is not None and seen > known["last_seen"] else None,
        workcell if workcell is not None and workcell != known.get("workcell_id") else None,
    )


def other_ids(entry: Mapping[str, Any]) -> list[str]:
    """Return the ULIDs that an entry says to be the same component, sound ones, at most OTHER_IDS_MAX."""
    found = entry.get("other_ids")
    if not isinstance(found, list):
        return []
    ids = dict.fromkeys(id for id in found if is_id(id) and id != entry["id"])
    return list(ids)[:OTHER_IDS_MAX]


def old_lock(lock: Any) -> OldLock | None:
    """Read the lock of an old program; None: there is none, it is a claim of ours, or it is no lock."""
    if not isinstance(lock, dict) or is_claim(lock):
        return None
    pid, host, instance = lock.get("holder_pid"), lock.get("holder_host"), lock.get("holder_instance")
    expires_at = _instant(lock.get("expires_at"))
    if not isinstance(pid, int) or isinstance(pid, bool) or not isinstance(host, str) or not isinstance(instance, str):
        return None
    if expires_at is None:
        return None
    return OldLock(
        holder_pid=max(min(pid, _INT_MAX), -_INT_MAX),
        holder_host=_text(host),
        holder_instance=_text(instance),
        acquired_at=_instant(lock.get("acquired_at")) or expires_at,
        heartbeat_at=_instant(lock.get("heartbeat_at")) or expires_at,
        expires_at=expires_at,
    )


def _instant(text: Any) -> str | None:
    """Return an instant; one that only its time zone takes out of the calendar is the last there is."""
    found = instant(text)
    if found is None and isinstance(text, str) and text.startswith("9999-12-31T"):
        return LAST_INSTANT
    return found


def _text(text: str) -> str:
    return text[:255].encode("utf-8", "replace").decode()


def main() -> None:
    """Be the child process that compares large files: two texts in, each behind its length, the difference out."""
    known, found = (sys.stdin.buffer.read(int(sys.stdin.buffer.read(12))) for _ in range(2))
    diff = difference(known, found)
    sys.stdout.buffer.write(json.dumps(vars(diff)).encode())
