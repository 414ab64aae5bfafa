"""The routes that MADSci's IdentityResolver was written against, with its bodies; names stand in the path.

A name is one percent-encoded segment, so it may hold slashes. Servers hand the path on decoded, in which `a%2Flock` and
`a/lock` are the same: the name is read from the path as it was sent.

Such a client sends no keepalives. Its lock is that of a host of its own, with the time to live that MADSci's locks
have: it ends 30 s after the client's last word about it, if nobody unlocks it before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any
from urllib.parse import quote, unquote_to_bytes

from fastapi import APIRouter, Body, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from madsci_registry.errors import ConflictError, InvalidError, NotFoundError, RegistryError, SessionRequiredError
from madsci_registry.names import check_metadata, check_name
from madsci_registry.types import ComponentType
from madsci_registry_lab.bodies import check_id, check_text
from madsci_registry_lab.store import Change, Entry, LabStore, Session, State, Want

LEASE_S = 30.0
"""LockManager.LOCK_TTL of madsci.common.registry."""
_WORD = Annotated[str, Field(min_length=1), AfterValidator(check_text)]


class _Sent(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class LegacyEntry(_Sent):
    """Take in a name with its ULID; with `acquire_lock`, lock it too."""

    id: Annotated[str, AfterValidator(check_id)]
    component_type: ComponentType
    metadata: dict[str, Any] | None = None
    acquire_lock: bool = False
    lock_holder_host: _WORD | None = None
    lock_holder_pid: int | None = None
    lock_holder_instance: _WORD | None = None


class LegacyLock(_Sent):
    """Lock a name."""

    holder_host: _WORD | None = None
    holder_pid: int | None = None
    holder_instance: _WORD


class LegacyUnlock(_Sent):
    """Give a lock back."""

    holder_instance: _WORD


class Legacy:
    """The routes. Thread-safe."""

    def __init__(self, store: LabStore, now: Callable[[], str]) -> None:
        self._store, self._now = store, now
        self._guard = threading.Lock()
        """An instance has one session, which ends with its last lock: requests about locks come one after the other."""

    def add_to(self, router: APIRouter) -> None:
        """Add the routes to a router."""
        router.add_api_route("/resolve/{name:path}", self.resolve, methods=["GET"])
        for verb, body in (("/lock", LegacyLock), ("/unlock", LegacyUnlock), ("", LegacyEntry)):
            schema = {"content": {"application/json": {"schema": body.model_json_schema()}}}
            router.add_api_route(
                f"/entries/{{name:path}}{verb}",
                self.entry,
                methods=["POST"],
                description=body.__doc__,
                openapi_extra={"requestBody": schema},
            )

    def resolve(self, request: Request, name: str) -> dict[str, Any]:
        """Tell the ULID of a name."""
        (sent,) = _segments(request, "resolve", 1)
        entry = self._store.find(name=sent)
        return {"id": entry.id, "name": entry.name, "component_type": entry.component_type}

    def entry(self, request: Request, name: str, body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
        """Take in a name, lock it or unlock it: which of these, the path as it was sent says."""
        host: str | None = request.state.host
        sent, *verb = _segments(request, "entries", 2)
        if not verb:
            return self._take_in(host, check_name(sent), _checked(LegacyEntry, body))
        if verb == ["lock"]:
            return self._lock(host, sent, _checked(LegacyLock, body))
        if verb == ["unlock"]:
            return {"released": self._unlock(host, sent, _checked(LegacyUnlock, body).holder_instance)}
        raise _no_segment()

    def _take_in(self, host: str | None, name: str, sent: LegacyEntry) -> dict[str, Any]:
        if sent.acquire_lock and sent.lock_holder_instance is None:
            reason = "is needed for a lock"
            raise InvalidError(f"lock_holder_instance: {reason}", field="lock_holder_instance", reason=reason)
        known, at = self._known(sent.id), self._now()
        if known is not None and known.name != name:
            raise ConflictError(f"{sent.id} is {known.name!r} here", name=known.name, id=known.id)
        state = State(
            id=sent.id,
            name=name,
            component_type=sent.component_type,
            metadata=check_metadata(sent.metadata) if sent.metadata else known.metadata if known else "{}",
            created_at=at,
            changed_at=at,
        )
        told = self._store.apply(host or sent.lock_holder_host or "unknown", 0, None, None, [Change(0, state)])
        for other in told.unapplied:
            if other.reason != "newer":
                raise ConflictError(
                    f"{name!r} is {other.preferred} here ({other.reason})", name=name, id=other.preferred
                )
        if sent.lock_holder_instance is None or not sent.acquire_lock:
            return {"id": sent.id}
        holder = sent.lock_holder_host, sent.lock_holder_pid, sent.lock_holder_instance
        return self._lock(host, name, LegacyLock(**dict(zip(LegacyLock.model_fields, holder, strict=True))))

    def _known(self, id: str) -> Entry | None:
        try:
            return self._store.find(id=id)
        except NotFoundError:
            return None

    def _lock(self, host: str | None, name: str, wanted: LegacyLock) -> dict[str, Any]:
        instance, holder = wanted.holder_instance, wanted.model_dump()
        with self._guard:
            id = self._store.find(name=name).id
            session = self._session(host, instance)
            if session is None:
                label = f"{wanted.holder_host or 'a host'} pid {wanted.holder_pid or 'unknown'}"
                session = self._store.register(_owner(host, instance), instance, LEASE_S, label)
            (lock,) = self._store.acquire(session.host, session.id, [(name, Want(holder=holder))])
            if isinstance(lock, RegistryError):
                self._end_without_locks(session)
                raise lock
        return {"id": id, "acquired_at": lock.since, **holder}

    def _unlock(self, host: str | None, name: str, instance: str) -> bool:
        with self._guard:
            session = self._session(host, instance)
            if session is None:
                return False
            released = self._store.release(session.host, session.id, {name: None})
            self._end_without_locks(session)
        return bool(released)

    def _end_without_locks(self, session: Session) -> None:
        if not self._store.locks(session.id):
            self._store.end(session.host, session.id)

    def _session(self, host: str | None, instance: str) -> Session | None:
        """Return the living session of an instance, and begin its lease anew."""
        for session in self._store.sessions():
            if session.host == _owner(host, instance):
                with suppress(SessionRequiredError):  # it has just ended
                    return self._store.keep(session.host, session.id, session.boot)
        return None


def _owner(host: str | None, instance: str) -> str:
    """Return the host that an instance is to the lab: it lives and dies alone. No token's host has a blank in it."""
    return f"{host or 'unknown'} {instance}"


def _segments(request: Request, route: str, most: int) -> list[str]:
    """Return what follows the route in the path as it was sent, decoded segment by segment.

    Raises:
        InvalidError: too many, or no text.
    """
    raw: bytes | None = request.scope.get("raw_path")
    sent = raw.decode("latin-1") if raw else quote(request.scope["path"])
    _, here, rest = sent.partition("?")[0].partition(f"/registry/{route}/")
    found = rest.split("/")
    if not here or len(found) > most:  # the route itself was encoded: nobody needs that
        raise _no_segment()
    try:
        return [unquote_to_bytes(segment).decode() for segment in found]
    except UnicodeDecodeError:
        raise InvalidError("name: is not UTF-8", field="name", reason="is not UTF-8") from None


def _no_segment() -> InvalidError:
    reason = "must be one segment of the path: a slash in it is written %2F"
    return InvalidError(f"name: {reason}", field="name", reason=reason)


def _checked(model: Any, body: dict[str, Any]) -> Any:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidError(f"{field}: {first['msg']}", field=field, reason=first["msg"]) from None
