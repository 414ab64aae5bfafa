"""What a lab may answer, checked: nothing of it is used before it went through these models.

An answer that breaks them is no answer (LabUnavailableError). Fields that this program does not know are left out.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from madsci_registry.errors import (
    ConflictError,
    HeldError,
    LabUnavailableError,
    LockLostError,
    RegistryError,
    from_wire,
)
from madsci_registry.names import check_metadata, is_ulid, name_fault
from madsci_registry.types import ComponentType, Holder, Proof

TERM_LIMIT = 1 << 33
"""Terms are below it, so that fencing tokens are below 2^53."""
TEXT_MAX_CHARS = 500
LEASE_MIN_S, LEASE_MAX_S = 1.0, 3600.0


def _is_name(text: str) -> str:
    fault = name_fault(text)
    if fault:
        raise ValueError(fault)
    return text


def _is_id(text: str) -> str:
    """A ULID, or what an old file had in its place."""
    if not is_ulid(text) and not (text.isprintable() and 0 < len(text.encode()) <= 255):
        raise ValueError("is no id")
    return text


def _is_small(metadata: dict[str, Any]) -> dict[str, Any]:
    try:
        check_metadata(metadata)
    except RegistryError as error:
        raise ValueError(error.message) from None
    return metadata


Name = Annotated[str, AfterValidator(_is_name)]
Id = Annotated[str, AfterValidator(_is_id)]
Term = Annotated[int, Field(ge=0, lt=TERM_LIMIT)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Word = Annotated[str, Field(min_length=1, max_length=TEXT_MAX_CHARS)]
Text = Annotated[str, Field(max_length=TEXT_MAX_CHARS)]


class Answer(BaseModel):
    """Part of an answer."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Mark(Answer):
    """How far the lab has this host's changes."""

    epoch: Count
    revision: Count


class Registered(Answer):
    """A session has begun."""

    session: Word
    lease_s: Annotated[float, Field(ge=LEASE_MIN_S, le=LEASE_MAX_S)]
    mark: Mark | None


class GivenAway(Answer):
    """A lock of ours that another host had, or has, with a higher term."""

    name: Word
    term: Term
    host: Text | None


class Kept(Answer):
    """The session lives; how the locks that we stated stand."""

    lease_s: Annotated[float, Field(ge=LEASE_MIN_S, le=LEASE_MAX_S)]
    lost: list[GivenAway]
    missing: list[str]
    unstated: dict[str, Term]
    mark: Mark | None


class Lock(Answer):
    """A lock that this host has in the lab."""

    name: Word
    term: Term


class Entry(Answer):
    """A component of the lab."""

    name: Word
    id: Id
    component_type: ComponentType
    metadata: Annotated[dict[str, Any], AfterValidator(_is_small)]
    created_at: Annotated[str, Field(max_length=40)]


class Resolved(Answer):
    """A component, made if it was new, and its lock."""

    entry: Entry
    is_new: bool
    lock: Lock | None


class Refused(Answer):
    """A name of several that was not locked."""

    name: Word
    error: dict[str, Any]


class Locked(Answer):
    """What became of several names."""

    locks: list[Lock | Refused]


_HolderText = Annotated[str, Field(max_length=TEXT_MAX_CHARS)]


class _Holder(BaseModel):
    """A process on another host, by that host's word."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    pid: int | None = None
    uid: int = 0
    gid: int = 0
    proof: Proof = "connection"
    user: _HolderText | None = None
    comm: _HolderText | None = None
    process_started_at: _HolderText | None = None
    container: _HolderText | None = None
    unit: _HolderText | None = None
    host: _HolderText | None = None
    since: _HolderText | None = None
    instance: _HolderText = ""
    client: _HolderText = ""


class UselessAnswerError(LabUnavailableError):
    """What the lab said to one request cannot be used; or it was said too late."""


class HeldInLabError(HeldError):
    """Another host holds the name."""

    host: str = ""
    term: int = 0


class GivenAwayError(LockLostError):
    """Another host had, or has, the name with a higher term than ours."""

    host: str | None = None
    term: int = 0


class OutOfOrderError(ConflictError):
    """Our changes do not follow on what the lab has of this host."""

    lab_mark: tuple[int, int] | None = None
    """(epoch, revision) of what it has; None: nothing."""


class _HeldFacts(Answer):
    host: Word
    term: Term = 0
    since: Text | None = None
    lab_holder: dict[str, Any] | None = None


class _LostFacts(Answer):
    host: Text | None = None
    term: Term = 0


_Model = TypeVar("_Model", bound=BaseModel)


def read(model: type[_Model], answer: dict[str, Any]) -> _Model:
    """Return an answer checked. Raises UselessAnswerError: it is none."""
    try:
        return model.model_validate(answer)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])[:TEXT_MAX_CHARS]
        raise UselessAnswerError(f"the lab answered what is no {model.__name__}: {field}: {first['msg']}") from None


def refusal_of(body: dict[str, Any]) -> RegistryError | None:
    """Return the error that a lab says no with; None: what it says is none that we know."""
    code, message = body.get("code"), body.get("message", body.get("detail"))
    if not isinstance(code, str) or not isinstance(message, str):
        return None
    wire = {"code": code, "message": message[:TEXT_MAX_CHARS]}
    try:
        if code == "held":
            return _held(wire["message"], _HeldFacts.model_validate(body))
        if code == "lock_lost":
            given = _LostFacts.model_validate(body)
            error = GivenAwayError(wire["message"], reason="given away")
            error.host, error.term = given.host, given.term
            return error
        if code == "conflict":
            conflict = OutOfOrderError(wire["message"])
            if body.get("epoch") is not None:
                mark = Mark.model_validate(body)
                conflict.lab_mark = mark.epoch, mark.revision
            return conflict
    except ValidationError:
        return None
    if code not in ("not_found", "wrong_type", "invalid", "permission_denied", "too_large", "session_required"):
        return None
    facts = {key: body[key] for key in ("name", "id", "component_type", "given", "field", "reason", "renamed_to")
             if isinstance(body.get(key), str)}  # fmt: skip
    return from_wire({**wire, **facts})


def _held(message: str, facts: _HeldFacts) -> HeldInLabError:
    try:
        said = _Holder.model_validate(facts.lab_holder or {})
    except ValidationError:
        said = _Holder()
    since = facts.since or said.since or ""
    values = said.model_dump() | {"host": said.host or facts.host, "since": since, "session": ""}
    holder = Holder(**values)
    where = "" if holder.host == facts.host else f" ({facts.host} in the lab)"
    error = HeldInLabError(f"it is held on {holder.host}{where} since {since}, first by {holder.label}", holder=holder)
    error.host, error.term = facts.host, facts.term
    return error


class Relayed(Answer):
    """An answer that is handed on to a client: of the fields that are known, all that was said."""

    def handed_on(self) -> dict[str, Any]:
        """Return it as JSON."""
        return self.model_dump()


class LabEntry(Relayed):
    """A component of the lab, with all that people want to know."""

    name: Word
    id: Id
    component_type: ComponentType
    retired: bool = False
    metadata: dict[str, Any] = Field(default_factory=dict)
    created_at: Text
    changed_at: Text
    host: Text
    term: Term = 0
    other_ids: list[Id] = Field(default_factory=list)
    lock: dict[str, Any] | None = None


class Conflict(Relayed):
    """One name, two words about it."""

    name: Word
    id: Id
    reason: Word
    host: Text
    at: Text
    decided_at: Text | None = None
    said: dict[str, Any]
    entry: LabEntry | None


class Conflicts(Relayed):
    """A page of conflicts."""

    conflicts: list[Conflict]
    after: list[str] | None


class Merged(LabEntry):
    """A conflict was decided."""

    def handed_on(self) -> dict[str, Any]:
        return {"entry": self.model_dump()}
