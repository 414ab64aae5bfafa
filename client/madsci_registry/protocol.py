"""The wire protocol: what a client may say and how it is encoded. docs/protocol.md is the text for other languages.

Two connections. Requests go over ZeroMQ (REQ to ROUTER), one frame of JSON each, one frame back:

    request   {"op": "resolve", "v": 1, "token": "...", "epoch": 7, "seq": 3, ...}
    reply     {"ok": {...}}  or  {"error": {"code": "held", "message": "...", ...facts}}

The lifeline is a plain stream of JSON lines and is the session: it says hello or resume first and is answered with a
Welcome; then cancel, release and bye go up, unanswered, and Lost, Renamed, Lab, Conflict and Closing come down,
unasked.

The messages are plain dataclasses, so that a client imports no validator; the daemon compiles them into one pydantic
validator (`request_validator`, measured 2.2 us for a lookup, the same as pydantic models and typed dicts). Unknown
fields are refused. `seq` is one sequence per session; a repeat of a request has the same seq, a write names what it
expects (id or fencing_token), and so a repeat changes nothing.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Le, MaxLen

from madsci_registry.types import ComponentType

PROTOCOL_VERSION = 1
OLDEST_VERSION = 1
"""A daemon accepts its own version and the one before."""

FRAME_MAX_BYTES = 1 << 20
"""Both ways. Long answers are paged, long requests cut into pieces."""
PAGE_BYTES = 32 * 1024
"""Where a page or piece is cut: it holds the daemon for some milliseconds. One entry alone may be larger."""
LINE_MAX_BYTES = 1 << 20
"""A lifeline's line: `resume` and its answer list all that a session holds (about 150 bytes a name)."""
WAIT_MAX_S = 10.0
"""One request of a waiting chain waits this long at most, so that a vanished client is noticed."""
RENEW_S = 2.0
"""How long a waiter keeps its place until its next request comes."""
RESUME_S = 2.0
"""How long a living process whose lifeline ended while the daemon is up has to resume before its locks end."""
GRACE_S = 10.0
"""How long a holder that cannot be proven alive keeps its locks after a restart of the daemon without resuming."""

_STRICT = {"extra": "forbid", "strict": True}
_Text = Annotated[str, MaxLen(4096)]
_Count = Annotated[int, Ge(0), Le(2**53 - 1)]


@dataclass(slots=True, kw_only=True)
class Request:
    """What every request carries: the session's token and epoch, and its number in the session."""

    __pydantic_config__ = _STRICT
    token: Annotated[str, MaxLen(64)]
    epoch: _Count
    seq: _Count
    v: int = PROTOCOL_VERSION


@dataclass(slots=True, kw_only=True)
class Resolve(Request):
    """Get the ULID of a name, made if new, and (acquire_lock) its lock. Waits up to wait_s for a held name; `renew`
    says that the client will ask again with the same seq, so that its place is kept."""

    op: Literal["resolve"] = "resolve"
    name: _Text
    component_type: ComponentType
    instance: Annotated[str, MaxLen(128)]
    metadata: dict[str, Any] | None = None
    acquire_lock: bool = True
    wait_s: Annotated[float, Ge(0), Le(WAIT_MAX_S)] = 0.0
    renew: bool = False


@dataclass(slots=True, kw_only=True)
class ResolveItem:
    """One name of a resolve_many."""

    __pydantic_config__ = _STRICT
    name: _Text
    component_type: ComponentType
    metadata: dict[str, Any] | None = None


@dataclass(slots=True, kw_only=True)
class ResolveMany(Request):
    """Resolve many names, without waiting; each is answered by itself: {"results": [{"ok"} or {"error"}, ...]}."""

    op: Literal["resolve_many"] = "resolve_many"
    items: Annotated[list[ResolveItem], MaxLen(100)]
    instance: Annotated[str, MaxLen(128)]
    acquire_lock: bool = True


@dataclass(slots=True, kw_only=True)
class Release(Request):
    """Give a lock back: only the one with this token, of this instance. {"released": bool}."""

    op: Literal["release"] = "release"
    name: _Text
    instance: Annotated[str, MaxLen(128)]
    fencing_token: _Count


@dataclass(slots=True, kw_only=True)
class ReleaseAll(Request):
    """Give back all that an instance holds. {"released": [name, ...]}."""

    op: Literal["release_all"] = "release_all"
    instance: Annotated[str, MaxLen(128)]


@dataclass(slots=True, kw_only=True)
class Lookup(Request):
    """{"id": ULID or null}: null means that no component has this name, and nothing else."""

    op: Literal["lookup"] = "lookup"
    name: _Text


@dataclass(slots=True, kw_only=True)
class Get(Request):
    """{"component": Component}, or not_found, which says where a renamed name went."""

    op: Literal["get"] = "get"
    name: _Text


@dataclass(slots=True, kw_only=True)
class Whois(Request):
    """{"component": Component} of a ULID, or not_found."""

    op: Literal["whois"] = "whois"
    id: _Text


@dataclass(slots=True, kw_only=True)
class List(Request):
    """A page of components by name: {"components": [...], "cursor": text or null}. `pattern` is a GLOB (* ? [])."""

    op: Literal["list"] = "list"
    pattern: _Text | None = None
    component_type: ComponentType | None = None
    state: Literal["held", "free", "retired"] | None = None
    include_retired: bool = False
    cursor: _Text | None = None


@dataclass(slots=True, kw_only=True)
class Rename(Request):
    """Give component `id`, known as `old`, the name `new`. {"component": ..., "changed": bool}."""

    op: Literal["rename"] = "rename"
    old: _Text
    new: _Text
    id: _Text
    force: bool = False


@dataclass(slots=True, kw_only=True)
class Retire(Request):
    """Take a free name out of use, its ULID kept; refused (conflict) if it was seen at or after `unseen_since`
    (UTC, ISO 8601). {"component": ..., "changed": bool}."""

    op: Literal["retire"] = "retire"
    name: _Text
    id: _Text
    unseen_since: Annotated[str, MaxLen(40)] | None = None


@dataclass(slots=True, kw_only=True)
class Revive(Request):
    """Take a retired name back into use, with its ULID. {"component": ..., "changed": bool}."""

    op: Literal["revive"] = "revive"
    name: _Text
    id: _Text


@dataclass(slots=True, kw_only=True)
class SetMetadata(Request):
    """Replace the keys of `set`, drop those of `unset`. {"component": ..., "changed": bool}."""

    op: Literal["set_metadata"] = "set_metadata"
    name: _Text
    id: _Text
    set: dict[str, Any] = field(default_factory=dict)
    unset: Annotated[list[_Text], MaxLen(1000)] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class History(Request):
    """A page of events after revision `after`, oldest first: {"events": [...], "cursor": revision or null}."""

    op: Literal["history"] = "history"
    name: _Text | None = None
    after: _Count = 0


@dataclass(slots=True, kw_only=True)
class Watch(Request):
    """The events after revision `after`, as soon as there are any: {"events": [...], "revision": n}; an empty list
    when wait_s has passed; `compacted` where they are no longer kept."""

    op: Literal["watch"] = "watch"
    after: _Count
    wait_s: Annotated[float, Ge(0), Le(WAIT_MAX_S)] = 0.0


@dataclass(slots=True, kw_only=True)
class Sessions(Request):
    """A page of sessions: {"sessions": [SessionInfo, ...], "cursor": text or null}."""

    op: Literal["sessions"] = "sessions"
    cursor: _Text | None = None


@dataclass(slots=True, kw_only=True)
class Status(Request):
    """What the daemon is and does, one object."""

    op: Literal["status"] = "status"


@dataclass(slots=True, kw_only=True)
class Metrics(Request):
    """What Prometheus wants to know, in its text format: {"text": text}."""

    op: Literal["metrics"] = "metrics"


@dataclass(slots=True, kw_only=True)
class Export(Request):
    """A page of the registry in the format of registry.json: {"registry": {version, created_at, updated_at},
    "entries": {name: entry}, "revision": n, "cursor": text or null}; another revision on a later page: begin anew."""

    op: Literal["export"] = "export"
    cursor: _Text | None = None


@dataclass(slots=True, kw_only=True)
class Import(Request):
    """A piece of an import: [name, entry] pairs in the format of registry.json, gathered under `upload` and applied
    whole with the piece that says `last`; then {"report": [[name, outcome, reason], ...], "cursor": n or null}, the
    rest of the report by `report_from`."""

    op: Literal["import"] = "import"
    upload: Annotated[str, MaxLen(64)]
    entries: list[tuple[str, Any]] = field(default_factory=list)
    last: bool = False
    mode: Literal["merge", "replace"] = "merge"
    dry_run: bool = False
    report_from: _Count | None = None


@dataclass(slots=True, kw_only=True)
class BreakLock(Request):
    """End the lock with this token, whoever holds it; the holder is told. {"broken": bool}."""

    op: Literal["break_lock"] = "break_lock"
    name: _Text
    fencing_token: _Count
    reason: Annotated[str, MaxLen(1000)] = ""


@dataclass(slots=True, kw_only=True)
class Backup(Request):
    """A step of a backup: null cursor begins one; {"cursor": n or null, "data": base64 or "", "total_bytes": n}.
    Data is empty while the copy is being made; a null cursor ends it."""

    op: Literal["backup"] = "backup"
    cursor: _Count | None = None


@dataclass(slots=True, kw_only=True)
class LabConflicts(Request):
    """A page of the lab's conflicts, as the lab tells them: {"conflicts": [...], "after": [name, id] or null}."""

    op: Literal["lab_conflicts"] = "lab_conflicts"
    decided: bool = False
    after: tuple[_Text, _Text] | None = None


@dataclass(slots=True, kw_only=True)
class LabMerge(Request):
    """Decide a conflict in the lab: `prefer` is the ULID of `name` from now on. {"entry": the lab's entry}."""

    op: Literal["lab_merge"] = "lab_merge"
    name: _Text
    prefer: _Text


@dataclass(slots=True, kw_only=True)
class LabSync(Request):
    """Have the lab told of all changes now; answered when it knows them, or when wait_s has passed:
    {"behind": n, "lab": as in status}."""

    op: Literal["lab_sync"] = "lab_sync"
    wait_s: Annotated[float, Ge(0), Le(WAIT_MAX_S)] = 0.0


AnyRequest = Union[
    Resolve, ResolveMany, Release, ReleaseAll, Lookup, Get, Whois, List, Rename, Retire, Revive, SetMetadata, History,
    Watch, Sessions, Status, Metrics, Export, Import, BreakLock, Backup, LabConflicts, LabMerge, LabSync,
]  # fmt: skip
REQUESTS: dict[str, type[Request]] = {cls.__dataclass_fields__["op"].default: cls for cls in AnyRequest.__args__}  # type: ignore[attr-defined]


@dataclass(slots=True, kw_only=True)
class Hello:
    """Begin a session."""

    __pydantic_config__ = _STRICT
    op: Literal["hello"] = "hello"
    v: int = PROTOCOL_VERSION
    client: Annotated[str, MaxLen(200)] = ""
    """What the client says of itself (program and version); shown, never trusted."""


@dataclass(slots=True, kw_only=True)
class Hold:
    """A lock that a resuming client believes to hold."""

    __pydantic_config__ = _STRICT
    name: _Text
    instance: Annotated[str, MaxLen(128)]
    fencing_token: _Count


@dataclass(slots=True, kw_only=True)
class Resume:
    """Go on with a session after the connection or the daemon was gone."""

    __pydantic_config__ = _STRICT
    op: Literal["resume"] = "resume"
    v: int = PROTOCOL_VERSION
    token: Annotated[str, MaxLen(64)]
    client: Annotated[str, MaxLen(200)] = ""
    holds: list[Hold] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Cancel:
    """Withdraw request `seq`: its waiter goes, or exactly the lock that it was granted ends."""

    __pydantic_config__ = _STRICT
    op: Literal["cancel"] = "cancel"
    seq: _Count


@dataclass(slots=True, kw_only=True)
class LifelineRelease:
    """Release where no request may be sent (atexit, finalizers): one lock, or all of an instance (name null)."""

    __pydantic_config__ = _STRICT
    op: Literal["release"] = "release"
    instance: Annotated[str, MaxLen(128)]
    name: _Text | None = None
    fencing_token: _Count | None = None


@dataclass(slots=True, kw_only=True)
class Bye:
    """End the session and all that it holds."""

    __pydantic_config__ = _STRICT
    op: Literal["bye"] = "bye"


AnyLine = Union[Hello, Resume, Cancel, LifelineRelease, Bye]
LINES: dict[str, type] = {cls.__dataclass_fields__["op"].default: cls for cls in AnyLine.__args__}  # type: ignore[attr-defined]

# What comes down the lifeline, unasked or as the answer to hello and resume:
#   {"op": "welcome", "v": 1, "session": id, "token": secret, "epoch": n, "daemon": version,
#    "proof": tier, "grace_s": seconds or null,                 null: locks outlast the daemon as long as the process
#    "held": [{"name", "instance", "fencing_token", "lab"}, ...],   what a resumed session still has; lab: null,
#                                                               "confirmed" or "unconfirmed"
#    "renamed": [{"name", "to", "instance", "old_token", "fencing_token"}, ...]}   and what under another name, or (to
#                                                               is name) with a higher token, which the lab gave
#   {"op": "refused", "error": {...}}                           then the connection is closed
#   {"op": "lost", "name", "instance", "fencing_token", "reason", "by": {"uid", "pid"} or {"host"}}
#                                                               by an operator, or because the lab gave it to that host
#   {"op": "renamed", "name": old, "to": new, "instance", "old_token", "fencing_token"}
#   {"op": "lab", "name", "instance", "old_token", "fencing_token", "lab": "confirmed" or "unconfirmed"}
#                                                               how the lock stands in the lab now; its token may grow
#   {"op": "conflict", "name", "instance", "fencing_token", "id", "preferred"}   the lab has another ULID for the name
#   {"op": "closing"}                                           the daemon stops; locks stay for the next one

_decode = json.JSONDecoder().decode
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def encode(message: Any) -> bytes:
    """Return a message (a dataclass of this module, or a plain JSON value) as compact JSON in UTF-8, without fields
    that have their default.

    Raises:
        ValueError: NaN or Infinity. UnicodeEncodeError: a lone surrogate. TypeError: no JSON value.
    """
    return encode_text(message).encode()


def encode_text(message: Any) -> str:
    """Return a message as compact JSON text. Raises: as `encode`, but for lone surrogates, which are let through."""
    return _encode(message if isinstance(message, dict) else as_dict(message))


def as_dict(message: Any) -> dict[str, Any]:
    """Return a message as a plain object, fields with a default value left out (but for `op` and `v`)."""
    out: dict[str, Any] = {}
    for f in fields(message):
        value = getattr(message, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if f.name in ("op", "v") or value != default:
            out[f.name] = (
                [as_dict(v) if hasattr(v, "__dataclass_fields__") else v for v in value]
                if (isinstance(value, list))
                else value
            )
    return out


def decode(frame: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Return a reply or a line as a plain object. Raises ValueError for anything else."""
    value = _decode(str(frame, "utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object: {type(value).__name__}")
    return value


def request_validator() -> Any:
    """Compile the validator of requests (imports pydantic; call it once)."""
    return _validator(AnyRequest)


def line_validator() -> Any:
    """Compile the validator of what a client says on its lifeline (imports pydantic; call it once)."""
    return _validator(AnyLine)


def _validator(union: Any) -> Any:
    from pydantic import Field, TypeAdapter

    return TypeAdapter(Annotated[union, Field(discriminator="op")])
