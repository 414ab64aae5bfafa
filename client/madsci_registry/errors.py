"""Every error that the registry names, the same classes on both sides of the socket.

    RegistryError
    |- HeldError                 held              somebody else holds the name (or another instance of you)
    |- NotFoundError             not_found         no such name or ULID; says where a renamed name went
    |- NameTakenError            name_taken        the new name of a rename is known already
    |- WrongTypeError            wrong_type        the name is known with another component_type
    |- InvalidError              invalid           bad input; says which field and why
    |- PermissionDeniedError     permission_denied you may not, or may not reach the socket
    |- TooLargeError             too_large         over a size limit
    |- QuotaError                quota             your uid has its share already
    |- SessionRequiredError      session_required  no session, or the daemon does not know it (any more)
    |- UnsupportedError          unsupported       not on this platform, host or daemon
    |- StaleEpochError           stale_epoch       the request was meant for an earlier run of the daemon
    |- LockLostError             lock_lost         you held it, and do not any more
    |- WaitingError              waiting           still in the queue; the client asks again by itself
    |- RegistryTimeoutError      timeout           no answer in time; nothing was changed by a read
    |- UnknownOutcomeError       unknown_outcome   a write was sent and not answered: it may have happened
    |- BusyError                 busy              not now; try again soon
    |- NoSpaceError              no_space          the disk is full; reads go on
    |- UnavailableError          unavailable       no daemon there
    |- ProtocolVersionError      protocol_version  client and daemon do not speak the same version
    |- ConflictError             conflict          what you expected is not so any more
    |- LabUnavailableError       lab_unavailable   the lab registry is needed and away
    |- CorruptError              corrupt           a file or database is not whole
    |- CompactedError            compacted         history before that revision is gone
    `- InternalError             internal          a fault of ours; logged by the daemon

`code` is stable and part of the protocol. `retry` says whether the same call may succeed later without anybody's doing.
An error that names no outcome changed nothing. Facts are attributes; None where unknown.
"""

from __future__ import annotations

from typing import Any, ClassVar, get_type_hints

from madsci_registry.types import Holder, OldLock


class RegistryError(Exception):
    """Base of all: `message` for people, `code` for programs, `retry`, and facts as attributes."""

    code: ClassVar[str] = "internal"
    retry: ClassVar[bool] = False

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        for name in fact_names(type(self)):
            setattr(self, name, facts.get(name, getattr(type(self), name, None)))

    def to_wire(self) -> dict[str, Any]:
        """Return code, message and facts as a JSON object."""
        wire: dict[str, Any] = {"code": self.code, "message": self.message}
        for name in fact_names(type(self)):
            value = getattr(self, name)
            if value is not None:
                wire[name] = value.to_json() if isinstance(value, (Holder, OldLock)) else value
        return wire

    def __reduce__(self) -> Any:
        return (from_wire, (self.to_wire(),))


class HeldError(RegistryError):
    """The name is held: by whom, how surely alive, whether it is you, and your place where you waited."""

    code = "held"
    retry = True
    name: str | None = None
    id: str | None = None
    holder: Holder | None = None
    old_lock: OldLock | None = None
    """The holder is an old program, by registry.json."""
    is_me: bool = False
    """True: another instance in this very process holds it."""
    place: int | None = None
    """Your place in the queue when you gave up, 1 is next; None where you did not wait."""
    waiting: int = 0
    """How many waited for it."""


class NotFoundError(RegistryError):
    """No such name or ULID."""

    code = "not_found"
    name: str | None = None
    id: str | None = None
    renamed_to: str | None = None
    """The present name of the component that once had this one."""


class NameTakenError(RegistryError):
    code = "name_taken"
    name: str | None = None
    id: str | None = None


class WrongTypeError(RegistryError):
    code = "wrong_type"
    name: str | None = None
    id: str | None = None
    component_type: str | None = None
    """The type that the registry knows."""
    given: str | None = None


class InvalidError(RegistryError):
    code = "invalid"
    field: str | None = None
    reason: str | None = None


class PermissionDeniedError(RegistryError):
    code = "permission_denied"
    uid: int | None = None
    path: str | None = None


class TooLargeError(RegistryError):
    code = "too_large"
    field: str | None = None
    reason: str | None = None


class QuotaError(RegistryError):
    code = "quota"
    retry = True
    limit: int | None = None
    what: str | None = None


class SessionRequiredError(RegistryError):
    code = "session_required"


class UnsupportedError(RegistryError):
    code = "unsupported"
    reason: str | None = None


class StaleEpochError(RegistryError):
    code = "stale_epoch"
    retry = True
    epoch: int | None = None


class LockLostError(RegistryError):
    """A lock that was held is gone: broken by an operator, or given away while this process was cut off."""

    code = "lock_lost"
    name: str | None = None
    fencing_token: int | None = None
    reason: str | None = None


class WaitingError(RegistryError):
    code = "waiting"
    retry = True
    name: str | None = None
    place: int | None = None


class RegistryTimeoutError(RegistryError, TimeoutError):
    code = "timeout"
    retry = True


class UnknownOutcomeError(RegistryError):
    code = "unknown_outcome"
    retry = True


class BusyError(RegistryError):
    code = "busy"
    retry = True


class NoSpaceError(RegistryError):
    code = "no_space"
    retry = True
    path: str | None = None


class UnavailableError(RegistryError):
    """No daemon serves the registry; `hint` is what a person can do."""

    code = "unavailable"
    retry = True
    path: str | None = None
    hint: str | None = None


class ProtocolVersionError(RegistryError):
    code = "protocol_version"
    client: int | None = None
    daemon: int | None = None


class ConflictError(RegistryError):
    code = "conflict"
    name: str | None = None
    id: str | None = None
    """What is there now."""


class LabUnavailableError(RegistryError):
    code = "lab_unavailable"
    retry = True


class CorruptError(RegistryError):
    code = "corrupt"
    path: str | None = None


class CompactedError(RegistryError):
    code = "compacted"
    oldest: int | None = None
    """The first revision that is still kept."""


class InternalError(RegistryError):
    code = "internal"


BY_CODE: dict[str, type[RegistryError]] = {cls.code: cls for cls in RegistryError.__subclasses__()}
"""The one table of codes."""

_FACTS: dict[type[RegistryError], tuple[str, ...]] = {}


def fact_names(cls: type[RegistryError]) -> tuple[str, ...]:
    """List the facts that errors of this class carry, in the order of their declaration."""
    if cls not in _FACTS:
        hints = get_type_hints(cls)
        _FACTS[cls] = tuple(name for name in hints if name not in ("code", "retry"))
    return _FACTS[cls]


def from_wire(wire: dict[str, Any]) -> RegistryError:
    """Make the error that a daemon sent; an unknown code becomes InternalError with that code in its message."""
    code, message = str(wire.get("code")), str(wire.get("message"))
    cls = BY_CODE.get(code)
    if cls is None:
        return InternalError(f"{code}: {message}")
    facts = {k: v for k, v in wire.items() if k not in ("code", "message")}
    if isinstance(facts.get("holder"), dict):
        facts["holder"] = Holder.from_wire(facts["holder"])
    if isinstance(facts.get("old_lock"), dict):
        facts["old_lock"] = OldLock.from_wire(facts["old_lock"])
    return cls(message, **facts)
