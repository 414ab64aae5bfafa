"""RegistryClient: one method per verb of the registry."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from madsci_registry import _bulk, _session, protocol
from madsci_registry._arguments import Item, item, seconds, text
from madsci_registry._ask import Ask, Start
from madsci_registry._endpoint import Endpoint, choose_here
from madsci_registry._grants import Grant, Key
from madsci_registry._ledger import Call
from madsci_registry._process import this_process
from madsci_registry._session import Session
from madsci_registry.errors import RegistryError, SessionRequiredError, UnsupportedError, from_wire
from madsci_registry.names import check_metadata
from madsci_registry.registration import Held, Registration
from madsci_registry.types import Component, ComponentType, Event, ImportReport, SessionInfo, State

log = logging.getLogger("madsci_registry")


class RegistryClient:
    """A client of one registry.

    Nothing connects before the first request. All clients of a process on one registry share a session; each is an
    instance of its own: what one holds, another one is refused. Threads may share a client. In a forked child it opens
    a session of its own at first use and holds nothing there. Collecting a client frees nothing; `close` does, and so
    does the end of the process.

    Where no daemon serves the registry, one is started if that is allowed (docs: autostart), else it is waited for.

    Every method may raise, besides what it names: UnavailableError (no daemon), RegistryTimeoutError (no answer in
    time), PermissionDeniedError, ProtocolVersionError, SessionRequiredError (this client is closed); and a method that
    changes something UnknownOutcomeError: it was sent and not answered, so it may have been done. All of them may be
    repeated: a repeat changes nothing that was done already.
    """

    def __init__(
        self,
        registry: str | os.PathLike[str] | None = None,
        *,
        socket: str | os.PathLike[str] | None = None,
        timeout: float = 5.0,
        autostart: bool = True,
    ) -> None:
        """Choose the registry; connect to nothing.

        Args:
            registry: path of its JSON file; None: by environment and folders (`registryctl where` says which and why).
            socket: path of its request socket, where that is not beside the registry.
            timeout: seconds that one request may take, above 0; a `wait` comes on top.
            autostart: False: never start a daemon.

        Raises:
            InvalidError: a path that cannot be one, a timeout that is none. UnsupportedError: not on Linux.
        """
        if sys.platform != "linux":
            reason = f"the registry daemon is for Linux, this is {sys.platform}"
            raise UnsupportedError(reason, reason=reason)
        self.timeout = seconds(timeout, "timeout", least=1e-3)
        self.endpoint: Endpoint = choose_here(registry, socket)
        """Which registry, and why."""
        self.instance = os.urandom(16).hex()
        self._autostart = bool(autostart)
        self._session: Session | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<RegistryClient {self.endpoint}{' closed' if self._closed else ''}>"

    def __enter__(self) -> RegistryClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back what this client holds; the last one of the process ends the session. Idempotent, never raises.

        Takes at most 0.5 s and never connects; works from atexit, finalizers and signal handlers.
        """
        if self._closed:
            return
        self._closed = True
        session = self._session
        if session is not None and session.process == this_process():
            self._release_all(session)
            _session.detach(session, self.instance)

    # locks

    def resolve(
        self,
        name: str,
        component_type: ComponentType,
        metadata: dict[str, Any] | None = None,
        *,
        wait: float = 0,
        acquire_lock: bool = True,
    ) -> Registration:
        """Get the ULID of a name, made if it is new, and its lock.

        Args:
            name: 1 to 255 bytes of text; a retired name is revived with its ULID.
            component_type: what it is; for a known name it must be the same.
            metadata: merged into what is known, at most 16 KiB as JSON.
            wait: seconds to wait in the queue while somebody else holds the name; 0: not at all; math.inf: for ever.
            acquire_lock: False: only the identity.

        Raises:
            HeldError: somebody else holds it, with who, and your place where you waited. WrongTypeError, InvalidError,
            TooLargeError. Nothing is held after an error; Ctrl-C withdraws the request.
        """
        wait_s = seconds(wait, "wait", least=0)
        body = self._resolve_body(name, component_type, metadata)
        if not acquire_lock:
            session = self._shared()
            result = session.ask(
                Ask(body | {"acquire_lock": False}, self.timeout, start=self._start(Start.MAKE), is_write=True)
            )
            return self._registration(session, result, None)
        registration, grant = self._lock(body, wait_s)
        registration._own(grant)
        return registration

    def _lock(self, body: dict[str, Any], wait_s: float) -> tuple[Registration, Grant]:
        session = self._shared()
        call = Call(self.instance, [body["name"]])
        ask = Ask(body, self.timeout, start=self._start(Start.MAKE), is_write=True, wait_s=wait_s, call=call)
        result, grant = session.resolve(ask, body["name"])
        if self._closed:
            session.release(grant)
            raise _closed()
        return self._registration(session, result, grant), grant

    def _resolve_body(self, name: str, component_type: str, metadata: dict[str, Any] | None) -> dict[str, Any]:
        return {"op": "resolve", "instance": self.instance, **item(name, component_type, metadata)}

    def _registration(self, session: Session, result: dict[str, Any], grant: Grant | None) -> Registration:
        registration = Registration(self, session, result, grant)
        for warning in registration.warnings:
            log.warning("%s", warning)
        return registration

    def resolve_many(self, items: Iterable[Item], *, acquire_lock: bool = True) -> list[Registration | RegistryError]:
        """Resolve many names in few requests, without waiting.

        Args:
            items: (name, component_type) or (name, component_type, metadata) each.
            acquire_lock: False: only the identities.

        Returns:
            For each item in order its Registration, or the error that refused it; one refusal spoils no other.
        """
        results: list[Registration | RegistryError | None] = []
        wanted = []
        for of in items:
            try:
                wanted.append(item(*of))
                results.append(None)
            except RegistryError as error:
                results.append(error)
        answers = (a for piece in _bulk.pieces(wanted) for a in self._resolve_piece(piece, acquire_lock))
        return [next(answers) if result is None else result for result in results]

    def _resolve_piece(self, items: list[dict[str, Any]], acquire_lock: bool) -> list[Registration | RegistryError]:
        session = self._shared()
        body = {"op": "resolve_many", "instance": self.instance, "items": items}
        start = self._start(Start.MAKE)
        names = [item["name"] for item in items]
        if not acquire_lock:
            ask = Ask(body | {"acquire_lock": False}, self.timeout, start=start, is_write=True)
            answers: list[tuple[dict[str, Any], Grant | None]] = [(r, None) for r in session.ask(ask)["results"]]
        else:
            ask = Ask(body, self.timeout, start=start, is_write=True, call=Call(self.instance, names))
            answers = session.resolve_many(ask, names)
        if self._closed:
            self._release_all(session)
            raise _closed()
        return [
            self._one_of_many(session, item, *answer, acquire_lock) for item, answer in zip(items, answers, strict=True)
        ]

    def _one_of_many(
        self, session: Session, item: dict[str, Any], answer: dict[str, Any], grant: Grant | None, acquire_lock: bool
    ) -> Registration | RegistryError:
        if "error" in answer:
            return from_wire(answer["error"])
        if grant is None and acquire_lock:
            try:
                return self.resolve(item["name"], item["component_type"])
            except RegistryError as error:
                return error
        registration = self._registration(session, answer["ok"], grant)
        if grant is not None:
            registration._own(grant)
        return registration

    def hold(
        self, name: str, component_type: ComponentType, metadata: dict[str, Any] | None = None, *, wait: float = 0
    ) -> Held:
        """Hold a name while a `with` block runs: `with client.hold("a", "node") as registration: ...`

        Nests, also over threads of this client: the lock is given back when the last block ends. A lock that `resolve`
        took before stays. Arguments and errors as `resolve`.
        """
        wait_s = seconds(wait, "wait", least=0)
        body = self._resolve_body(name, component_type, metadata)
        return Held(lambda: self._take(body, wait_s))

    def _take(self, body: dict[str, Any], wait_s: float) -> tuple[Registration, Grant]:
        until = time.monotonic() + wait_s
        known = self._shared().ledger.find(Key(self.instance, body["name"]))
        while True:
            registration, grant = self._lock(body, max(0.0, until - time.monotonic()))
            grant.by_hold = grant.by_hold or grant is not known
            if grant.enter():
                return registration, grant

    def release(self, name: str) -> bool:
        """Give back the lock on a name; False where this client does not hold it, and then nothing connects.

        Takes at most 0.5 s and raises nothing, as `Registration.release`.
        """
        session = self._session
        grant = session.ledger.find(Key(self.instance, name)) if session is not None else None
        return session is not None and grant is not None and session.release(grant, self.timeout)

    def release_all(self) -> list[str]:
        """Give back all that this client holds and return the names; as `release`, 0.5 s in all."""
        session = self._session
        return self._release_all(session) if session is not None and session.process == this_process() else []

    def _release_all(self, session: Session) -> list[str]:
        until = time.monotonic() + min(self.timeout, _session.FINAL_S)
        held = session.ledger.held(self.instance)
        return [g.key.name for g in held if session.release(g, max(0.0, until - time.monotonic()))]

    def break_lock(self, name: str, *, fencing_token: int | None = None, reason: str = "") -> bool:
        """End a lock, whoever holds it; the holder is told.

        Args:
            name: whose lock.
            fencing_token: only the lock with this token; None: the present one.
            reason: what the holder and the history are told.

        Returns:
            False where nobody held it, or under another token.

        Raises:
            NotFoundError: no such name.
        """
        token = self.get(name).fencing_token if fencing_token is None else fencing_token
        if token is None:
            return False
        answer = self._change({"op": "break_lock", "name": name, "fencing_token": token, "reason": reason})
        return bool(answer["broken"])

    # reading

    def lookup(self, name: str) -> str | None:
        """Return the ULID of a name; None means that no component has this name, and nothing else."""
        id: str | None = self._read({"op": "lookup", "name": text(name, "name")})["id"]
        return id

    def get(self, name: str) -> Component:
        """Return all about a name.

        Raises:
            NotFoundError: no component has it; says where a renamed one went.
        """
        return Component.from_wire(self._read({"op": "get", "name": text(name, "name")})["component"])

    def whois(self, id: str) -> Component:
        """Return the component with this ULID.

        Raises:
            NotFoundError: there is none.
        """
        return Component.from_wire(self._read({"op": "whois", "id": text(id, "id")})["component"])

    def list(
        self,
        pattern: str | None = None,
        *,
        component_type: ComponentType | None = None,
        state: State | None = None,
        include_retired: bool = False,
    ) -> list[Component]:
        """Return components in the order of their names.

        Args:
            pattern: a GLOB of the name (* ? []); None: all.
            component_type: only those; None: any.
            state: held, free or retired; None: any.
            include_retired: True: retired ones too.
        """
        body: dict[str, Any] = {"op": "list", "pattern": pattern, "component_type": component_type, "state": state}
        body["include_retired"] = include_retired
        return [Component.from_wire(c) for page in self._pages(body) for c in page["components"]]

    def history(self, name: str | None = None, after: int = 0) -> _List[Event]:
        """Return the events after revision `after`, oldest first: all, or those of one name's component."""
        body: dict[str, Any] = {"op": "history", "name": name}
        return [Event.from_wire(e) for page in self._pages(body, "after", after) for e in page["events"]]

    def watch(self, after: int, wait: float = 0) -> _List[Event]:
        """Return the events after revision `after`, as soon as there are any; an empty list when `wait` is over.

        Go on with the revision of the last event.

        Args:
            after: a revision, 0: from the beginning.
            wait: seconds; math.inf: for ever.

        Raises:
            CompactedError: some of those events are no longer kept.
        """
        until = time.monotonic() + seconds(wait, "wait", least=0)
        while True:
            left_s = max(0.0, until - time.monotonic())
            ask = Ask({"op": "watch", "after": after}, self.timeout, start=self._start(), wait_s=min(left_s, 10.0))
            events = self._shared().ask(ask)["events"]
            if events or left_s <= 10.0:
                return [Event.from_wire(e) for e in events]

    def sessions(self) -> _List[SessionInfo]:
        """Return the client processes that the daemon serves. Starts no daemon."""
        pages = self._pages({"op": "sessions"}, start=Start.NEVER)
        return [SessionInfo.from_wire(s) for page in pages for s in page["sessions"]]

    def status(self) -> dict[str, Any]:
        """Return what the daemon is and does (docs/protocol.md: status). Starts no daemon and waits for none."""
        status: dict[str, Any] = self._shared().ask(Ask({"op": "status"}, self.timeout, start=Start.NEVER))
        return status

    def metrics(self) -> str:
        """Return the daemon's metrics in the text format of Prometheus. Starts no daemon and waits for none."""
        return str(self._shared().ask(Ask({"op": "metrics"}, self.timeout, start=Start.NEVER))["text"])

    # identities

    def rename(self, old: str, new: str, force: bool = False, *, id: str | None = None) -> Component:
        """Give a component another name; its ULID goes with it, and `old` is free.

        Args:
            old: its present name.
            new: its name from now on.
            force: True: although it is held; the holder keeps the lock under the new name and is told.
            id: the component that is meant; None: whoever is called `old` now.

        Raises:
            NotFoundError, NameTakenError, HeldError, InvalidError; ConflictError: `old` is not that component.
        """
        expected = self._id(old, id)
        return self._changed({"op": "rename", "old": old, "new": text(new, "new"), "id": expected, "force": force})

    def retire(self, name: str, *, id: str | None = None, unseen_since: str | None = None) -> Component:
        """Take a free name out of use; its ULID is kept, and resolving it revives it.

        Args:
            name: which.
            id: the component that is meant; None: whoever is called so now.
            unseen_since: only if it was not seen at or after that instant (UTC, ISO 8601).

        Raises:
            NotFoundError, HeldError; ConflictError: seen since, or another component.
        """
        return self._changed({"op": "retire", "name": name, "id": self._id(name, id), "unseen_since": unseen_since})

    def revive(self, name: str, *, id: str | None = None) -> Component:
        """Take a retired name back into use, with its ULID, without a lock.

        Raises:
            NotFoundError; ConflictError: `name` is not component `id`.
        """
        return self._changed({"op": "revive", "name": name, "id": self._id(name, id)})

    def set_metadata(
        self,
        name: str,
        set: Mapping[str, Any] | None = None,
        unset: Iterable[str] = (),
        *,
        id: str | None = None,
    ) -> Component:
        """Replace the keys of `set` in a component's metadata and drop those of `unset`.

        Raises:
            NotFoundError, InvalidError, TooLargeError; ConflictError: `name` is not component `id`.
        """
        values = dict(set or {})
        check_metadata(values, "set")
        body = {"op": "set_metadata", "name": name, "set": values, "unset": [*unset]}
        return self._changed(body | {"id": self._id(name, id)})

    # the whole registry

    def export(self) -> dict[str, Any]:
        """Return the whole registry in the format of registry.json, as it is at one instant.

        Raises:
            BusyError: it changed ten times while it was being read.
        """
        return _bulk.export(self._shared(), self._ask_read)

    def import_entries(
        self,
        entries: Mapping[str, Any] | Iterable[tuple[str, Any]],
        mode: Literal["merge", "replace"] = "merge",
        dry_run: bool = False,
    ) -> ImportReport:
        """Take in entries in the format of registry.json, all of them in one step or none; never rebinds a ULID.

        Args:
            entries: by name, or (name, entry) pairs.
            mode: "merge" adds what is new; "replace" also retires what `entries` lacks.
            dry_run: True: only tell what would happen.

        Returns:
            What became of each entry. A repeat reports what is in already as "same".

        Raises:
            InvalidError, TooLargeError; BusyError: the connection was lost again and again.
        """
        pairs = list(entries.items() if isinstance(entries, Mapping) else entries)
        start = self._start(Start.MAKE)
        return _bulk.import_entries(self._shared(), pairs, mode, dry_run, timeout_s=self.timeout, start=start)

    def backup(self, path: str | os.PathLike[str]) -> int:
        """Write a consistent copy of the registry's database to `path`, replacing what is there, and return its bytes.

        The file is written by this process with its rights, readable by its user only, and complete or not there.

        Raises:
            OSError: it cannot be written. BusyError: too many backups, or the connection was lost again and again.
        """
        return _bulk.backup(self._shared(), Path(path), self._ask_read)

    # the lab

    def lab_conflicts(self, name: str | None = None, *, decided: bool = False) -> _List[dict[str, Any]]:
        """Return the conflicts of the lab that the daemon belongs to, with what both sides say (docs/protocol.md).

        Args:
            name: only those of this name; None: all.
            decided: True: those too that were decided.

        Raises:
            UnsupportedError: the daemon has no lab. LabUnavailableError.
        """
        return _bulk.conflicts(self._shared(), self._ask_read, name, decided)

    def lab_merge(self, name: str, prefer: str) -> dict[str, Any]:
        """Decide a conflict in the lab: `prefer` is the ULID of the name; the others stay known as the same component.

        Returns:
            What the lab has under the name now (docs/protocol.md: lab entry).

        Raises:
            NotFoundError: no such conflict, or that ULID has no part in it. HeldError; PermissionDeniedError: it is for
            administrators. UnsupportedError: the daemon has no lab. LabUnavailableError.
        """
        body = {"op": "lab_merge", "name": text(name, "name"), "prefer": text(prefer, "prefer")}
        entry: dict[str, Any] = self._change(body)["entry"]
        return entry

    def lab_sync(self, wait: float = 0) -> dict[str, Any]:
        """Have the daemon tell the lab of all changes now; return how it stands with it (docs/protocol.md: status.lab).

        Args:
            wait: seconds until the lab knows all; `behind` of the answer says what it does not know when they are over.

        Raises:
            UnsupportedError: the daemon has no lab.
        """
        until = time.monotonic() + seconds(wait, "wait", least=0)
        while True:
            left_s = max(0.0, until - time.monotonic())
            body = {"op": "lab_sync"}
            answer = self._shared().ask(
                Ask(body, self.timeout, start=Start.NEVER, wait_s=min(left_s, protocol.WAIT_MAX_S))
            )
            if answer["behind"] == 0 or left_s <= protocol.WAIT_MAX_S:
                lab: dict[str, Any] = {**answer["lab"], "behind": answer["behind"]}
                return lab

    # asking

    def _shared(self) -> Session:
        if self._closed:
            raise _closed()
        session = self._session
        if session is None or session.process != this_process() or session.closed:
            session = self._session = _session.attach(self.endpoint, self.instance, self._autostart)
        return session

    def _start(self, start: Start = Start.EXISTING) -> Start:
        return start if self._autostart else Start.WAIT

    def _ask_read(self, body: dict[str, Any]) -> Ask:
        return Ask(body, self.timeout, start=self._start())

    def _read(self, body: dict[str, Any]) -> Any:
        return self._shared().read(body, self.timeout, self._start())

    def _change(self, body: dict[str, Any]) -> Any:
        return self._shared().ask(Ask(body, self.timeout, start=self._start(), is_write=True))

    def _changed(self, body: dict[str, Any]) -> Component:
        return Component.from_wire(self._change(body)["component"])

    def _id(self, name: str, id: str | None) -> str:
        return self.get(name).id if id is None else id

    def _pages(
        self, body: dict[str, Any], key: str = "cursor", cursor: Any = None, start: Start | None = None
    ) -> Iterable[dict[str, Any]]:
        while True:
            ask = Ask(body | {key: cursor}, self.timeout, start=start or self._start())
            page = self._shared().ask(ask)
            yield page
            cursor = page["cursor"]
            if cursor is None:
                return


_List = list
# Inside the class, `list` is the verb.


def _closed() -> SessionRequiredError:
    return SessionRequiredError("this client is closed")
