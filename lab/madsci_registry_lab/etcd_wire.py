"""What is said to etcd's JSON gateway and what it answers, as values. Pure.

The gateway ignores a field that it does not know: a transaction with a misspelt `compare` overwrites what it should
have compared. So requests are made of these classes alone. Its rules: bytes are base64, 64-bit integers are strings,
and what is zero, false or empty is not there.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

OPS_MAX = 128
"""Of one transaction, by etcd's default (--max-txn-ops): compares, and operations of each branch."""
_PART = 100
"""Operations of a transaction inside a transaction: etcd counts each on its own, on top of the outer ones."""

Wire = dict[str, Any]


@dataclass(frozen=True)
class Range:
    """Read a key, or the keys from `key` up to, without, `end`."""

    key: str
    end: str | None = None
    limit: int = 0
    revision: int = 0
    """As it was then; 0: now."""
    keys_only: bool = False
    count_only: bool = False
    created_from: int = 0
    """Only what was created in this revision or later, in that order."""

    def wire(self) -> Wire:
        sent: Wire = {"key": _bytes(self.key)}
        if self.end is not None:
            sent["range_end"] = _bytes(self.end)
        for name, number in (
            ("limit", self.limit), ("revision", self.revision), ("min_create_revision", self.created_from)
        ):  # fmt: skip
            if number:
                sent[name] = str(number)
        if self.created_from:
            sent |= {"sort_order": "ASCEND", "sort_target": "CREATE"}
        return sent | {name: True for name in ("keys_only", "count_only") if getattr(self, name)}

    def op(self) -> Wire:
        return {"request_range": self.wire()}


@dataclass(frozen=True)
class Put:
    """Write a key; without a value, touch one that exists: its value stays, its revision is new."""

    key: str
    value: str | None

    def op(self) -> Wire:
        sent: Wire = {"key": _bytes(self.key)}
        return {"request_put": sent | ({"ignore_value": True} if self.value is None else {"value": _bytes(self.value)})}


@dataclass(frozen=True)
class Delete:
    """Delete a key, or the keys from `key` up to, without, `end`."""

    key: str
    end: str | None = None

    def op(self) -> Wire:
        sent: Wire = {"key": _bytes(self.key)}
        return {"request_delete_range": sent | ({"range_end": _bytes(self.end)} if self.end is not None else {})}


@dataclass(frozen=True)
class Compare:
    """What a key must be: created, or changed last, in that revision; 0: it is not there."""

    key: str
    target: Literal["CREATE", "MOD"]
    revision: int
    result: Literal["EQUAL", "GREATER", "LESS"] = "EQUAL"
    """GREATER: after that revision. LESS: before it."""
    end: str | None = None
    """Each key that is there, from `key` up to, without, `end`."""

    def wire(self) -> Wire:
        name = "create_revision" if self.target == "CREATE" else "mod_revision"
        sent = {"key": _bytes(self.key), "target": self.target, "result": self.result, name: str(self.revision)}
        return sent | ({"range_end": _bytes(self.end)} if self.end is not None else {})


@dataclass(frozen=True)
class Txn:
    """All of `then` if every compare holds, else all of `otherwise`; in one revision."""

    compares: tuple[Compare, ...] = ()
    then: tuple[Range | Put | Delete, ...] = ()
    otherwise: tuple[Range, ...] = ()

    def wire(self) -> Wire:
        ops = [op.op() for op in self.then]
        if len(ops) > OPS_MAX:
            parts = [ops[n : n + _PART] for n in range(0, len(ops), _PART)]
            ops = [{"request_txn": {"success": part}} for part in parts]
        sent: Wire = {"success": ops}
        if self.compares:
            sent["compare"] = [compare.wire() for compare in self.compares]
        if self.otherwise:
            sent["failure"] = [op.op() for op in self.otherwise]
        return sent


@dataclass(frozen=True)
class Watch:
    """Hear of each key put from `key` up to, without, `end`, from revision `start` on."""

    key: str
    end: str
    start: int

    def wire(self) -> Wire:
        asked = {"key": _bytes(self.key), "range_end": _bytes(self.end), "start_revision": str(self.start)}
        return {"create_request": {**asked, "progress_notify": True, "filters": ["NODELETE"]}}


@dataclass(frozen=True)
class Kv:
    """A key with its value."""

    key: str
    value: str
    created: int
    changed: int
    """The revisions in which it was created, and changed last."""


@dataclass(frozen=True)
class Found:
    """What a Range found. `count` is of all, beyond `limit` too; `revision` the store's."""

    kvs: tuple[Kv, ...]
    count: int
    revision: int


@dataclass(frozen=True)
class Done:
    """What became of a Txn; `found` has the answers of its Ranges, in order."""

    succeeded: bool
    found: tuple[Found, ...]
    revision: int


@dataclass(frozen=True)
class News:
    """A line of a watch: whole revisions."""

    kvs: tuple[Kv, ...] = ()
    revision: int = 0
    """The store's; ahead of `kvs` while a watch catches up."""
    created: bool = False
    canceled: str = ""
    """Why the watch has ended; empty: it has not."""
    compacted: int = 0
    """The oldest revision that can be watched, where that is why."""


def found_of(answer: Mapping[str, Any]) -> Found:
    """Read the answer to a Range."""
    kvs = tuple(_kv(kv) for kv in answer.get("kvs", ()))
    return Found(kvs, int(answer.get("count", 0)), revision_of(answer))


def done_of(answer: Mapping[str, Any]) -> Done:
    """Read the answer to a Txn."""
    parts = [part["response_range"] for part in answer.get("responses", ()) if "response_range" in part]
    return Done(bool(answer.get("succeeded")), tuple(found_of(part) for part in parts), revision_of(answer))


def news_of(answer: Mapping[str, Any]) -> News:
    """Read a line of a watch."""
    canceled = str(answer.get("cancel_reason", "")) or ("canceled" if answer.get("canceled") else "")
    kvs = tuple(_kv(event["kv"]) for event in answer.get("events", ()) if event.get("type") != "DELETE")
    compacted = int(answer.get("compact_revision", 0))
    return News(kvs, revision_of(answer), bool(answer.get("created")), canceled, compacted)


def revision_of(answer: Mapping[str, Any]) -> int:
    """Return the store's revision by the header of an answer; 0: it says none."""
    return int(answer.get("header", {}).get("revision", 0))


def after(prefix: str) -> str:
    """Return the end of a range of all keys that begin with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def _kv(kv: Mapping[str, Any]) -> Kv:
    value = b64decode(kv.get("value", "")).decode()
    return Kv(b64decode(kv["key"]).decode(), value, int(kv["create_revision"]), int(kv["mod_revision"]))


def _bytes(text: str) -> str:
    return b64encode(text.encode()).decode()
