"""From a frame to a verb: one table of operations, one place where a refusal becomes an error reply."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

from pydantic import ValidationError

from madsci_registry import protocol as p
from madsci_registry.errors import (
    InternalError,
    InvalidError,
    ProtocolVersionError,
    RegistryError,
    SessionRequiredError,
    StaleEpochError,
    TooLargeError,
)
from madsci_registryd import messages
from madsci_registryd.backups import Backups
from madsci_registryd.database import DatabaseError
from madsci_registryd.export import Want
from madsci_registryd.faults import StorageFault
from madsci_registryd.imports import Imports
from madsci_registryd.lab_tier import Ask, LabTier, NoLabVerbs
from madsci_registryd.locks import Presence, Session
from madsci_registryd.meters import UNREAD, Meters
from madsci_registryd.old_programs import OldPrograms
from madsci_registryd.registrar import Answer, Registrar, outcome

log = logging.getLogger(__name__)

DIAGNOSED_BYTES = 16 * 1024
"""In a larger frame that is no JSON the field is not looked for, which takes 1 us for every 10 bytes."""
_TOKEN = re.compile(rb'"token"\s*:\s*"([0-9a-f]{64})"')
PREPARING_OF_A_USER = 16
"""Where users take turns: what comes of so many names is some milliseconds' work, in one turn."""


class Read(NamedTuple):
    """A verb that is answered at once."""

    verb: Callable[..., Any]


class Change(NamedTuple):
    """A verb that is a step of the turn's batch. `light(request)`: it probably changes locks only."""

    verb: Callable[..., Any]
    light: Callable[[Any], bool] = lambda request: False
    wants: Callable[[OldPrograms, Session, Any], list[Want]] = lambda old, who, request: []
    """What old programs must see first, if anything."""
    asks: Callable[[LabTier, Session, Any], list[Ask]] = lambda lab, who, request: []
    """What the lab is to be asked before that, if anything."""


class Parks(NamedTuple):
    """A verb that answers by itself, now or later."""

    verb: Callable[..., Any]


class Handlers:
    """The operations of the protocol."""

    def __init__(self, registrar: Registrar, imports: Imports, backups: Backups, epoch: int, meters: Meters) -> None:
        self._registrar = registrar
        self._meters = meters
        self._epoch = epoch
        self._backups = backups
        self._preparing: Counter[int] = Counter()
        """How many names of each user wait to be shown to old programs."""
        self._asking: Counter[int] = Counter()
        """How many names of each user wait for the lab's answer."""
        self._decode = p.request_validator().validate_json
        self._decode_line = p.line_validator().validate_json
        service, reads = registrar.service, registrar.reads
        self._table: dict[type, Read | Change | Parks] = {
            p.Lookup: Read(reads.lookup),
            p.Get: Read(reads.get),
            p.Whois: Read(reads.whois),
            p.List: Read(reads.list),
            p.History: Read(reads.history),
            p.Sessions: Read(reads.sessions),
            p.Status: Read(reads.status),
            p.Metrics: Read(reads.metrics),
            p.Export: Read(reads.export),
            p.Backup: Read(self._backup),
            p.Watch: Parks(registrar.watchers.add),
            p.Resolve: Change(
                service.resolve,
                self._resolves_known,
                lambda old, who, r: old.for_resolve(who, r),
                lambda lab, who, r: lab.for_resolve(who, r),
            ),
            p.ResolveMany: Change(
                service.resolve_many,
                wants=lambda old, who, r: old.for_many(who, r),
                asks=lambda lab, who, r: lab.for_many(who, r),
            ),
            p.Release: Change(service.release, lambda r: True),
            p.ReleaseAll: Change(service.release_all, lambda r: True),
            p.Rename: Change(service.rename, wants=lambda old, who, r: old.for_rename(who, r)),
            p.Retire: Change(service.retire),
            p.Revive: Change(service.revive),
            p.SetMetadata: Change(service.set_metadata),
            p.BreakLock: Change(service.break_lock),
            p.Import: Parks(imports.receive),
        }
        self.use_lab(NoLabVerbs())

    def use_lab(self, lab: NoLabVerbs) -> None:
        """Let these verbs answer what concerns the lab: where there is one, lookups of names not known here, too."""
        self.lab = lab
        self._table |= {
            p.LabConflicts: Parks(lab.conflicts),
            p.LabMerge: Parks(lab.merge),
            p.LabSync: Parks(lab.sync),
        }
        if lab.is_on:  # else a lookup is a plain read, which is the quickest
            self._table[p.Lookup] = Parks(self._lookup)

    def request(self, frame: bytes, answer: Answer) -> None:
        """Do what a frame asks; `answer` is called now, after the turn's commit, or when a wait is over."""
        verb = UNREAD
        meters = self._meters
        try:
            request = self._decode_request(frame)
            verb = request.op  # type: ignore[attr-defined]  # each of the union has one
            who = self._session_of(request)
            handler = self._table[type(request)]
            if isinstance(handler, Read):
                answer({"ok": handler.verb(who, request)})
                meters.requests[verb, "ok"] += 1
            elif isinstance(handler, Change):
                self._change(who, request, handler, partial(meters.counted, verb, answer))
            else:
                handler.verb(who, request, partial(meters.counted, verb, answer))
        except RegistryError as error:
            meters.counted(verb, answer, outcome(error))
        except (DatabaseError, StorageFault):
            raise  # the disk: the app decides
        except Exception:  # the outer loop of a request
            log.exception("a request broke", extra=messages.FAULT())
            fault = InternalError("the daemon has a fault; it was logged, and nothing changed")
            meters.counted(verb, answer, outcome(fault))

    def _change(self, who: Session, request: Any, change: Change, answer: Answer) -> None:
        """Put a change into the turn's batch, or into that of a later turn: when lab and old programs are ready."""
        service = self._registrar.service
        asks = change.asks(service.lab, who, request)
        if not asks:
            self._show(who, request, change, answer)
            return

        self._begin(self._asking, who, len(asks))

        def then() -> None:
            self._asking[who.uid] -= len(asks)
            try:
                if who.presence is Presence.ATTACHED:  # else its connection ended, and with it all requests in flight
                    self._show(who, request, change, answer)
            except RegistryError as error:
                answer(outcome(error))

        service.lab.prepare(asks, then)

    def _show(self, who: Session, request: Any, change: Change, answer: Answer) -> None:
        """Run a change when old programs see what it needs."""
        write = partial(self._registrar.write, who, request, change.verb, answer, partial(change.light, request))
        old_programs = self._registrar.service.old_programs
        wants = change.wants(old_programs, who, request)
        if not wants:
            write()
            return

        self._begin(self._preparing, who, len(wants))

        def then(refusal: RegistryError | None) -> None:
            self._preparing[who.uid] -= len(wants)
            if refusal is not None:
                answer(outcome(refusal))
            elif who.presence is Presence.ATTACHED:
                write()

        old_programs.prepare(wants, then)

    def _begin(self, counts: Counter[int], who: Session, names: int) -> None:
        self._registrar.service.quotas.check(who.uid, "requests", counts[who.uid])
        counts[who.uid] += names

    def _lookup(self, who: Session, r: p.Lookup, answer: Answer) -> None:
        """Answer the ULID of a name: what is known here, else what the lab says."""
        found = self._registrar.reads.lookup(who, r)
        if found["id"] is not None:
            answer({"ok": found})
            return
        self._begin(self._asking, who, 1)

        def said(reply: dict[str, Any]) -> None:
            self._asking[who.uid] -= 1
            answer(reply)

        self.lab.lookup(r.name, said)

    def session_of(self, frame: bytes) -> Session | None:
        """Return which session sent a frame, by the token in it and without decoding it; None: none."""
        found = _TOKEN.search(frame)
        return self._registrar.by_token(hash_token(found[1].decode())) if found else None

    def is_busy(self, uid: int) -> bool:
        """Tell whether a user has so many names waiting for old programs that its next requests should wait, too."""
        return self._preparing[uid] >= PREPARING_OF_A_USER

    def _backup(self, who: Session, r: p.Backup) -> dict[str, Any]:
        self._registrar.service.need_admin(who, "make a backup, which has what all users hold")
        return self._backups.backup(who, r)

    def line(self, line: bytes) -> Any:
        """Decode what a client says on its lifeline.

        Raises: InvalidError, ProtocolVersionError.
        """
        try:
            message = self._decode_line(line)
        except ValidationError as error:
            raise refusal(error, line) from None
        if isinstance(message, (p.Hello, p.Resume)):
            check_version(message.v)
        return message

    def _decode_request(self, frame: bytes) -> p.Request:
        if len(frame) > p.FRAME_MAX_BYTES:
            raise TooLargeError(f"frame: {len(frame)} bytes, at most {p.FRAME_MAX_BYTES} are allowed", field="frame")
        try:
            request: p.Request = self._decode(frame)
        except ValidationError as error:
            raise refusal(error, frame) from None
        if request.v != p.PROTOCOL_VERSION:
            check_version(request.v)
        return request

    def _session_of(self, request: p.Request) -> Session:
        who = self._registrar.by_token(hash_token(request.token))
        if who is None or who.presence is not Presence.ATTACHED:
            raise SessionRequiredError("no session has this token, or its lifeline is down: say hello or resume first")
        if request.epoch != self._epoch:
            message = f"meant for epoch {request.epoch} of the daemon, this is {self._epoch}"
            raise StaleEpochError(message, epoch=self._epoch)
        return who

    def _resolves_known(self, r: p.Resolve) -> bool:
        return r.metadata is None and self._registrar.service.store.id_of(r.name) is not None


@lru_cache(maxsize=8192)
def hash_token(token: str) -> bytes:
    """Return what is kept of a session's secret."""
    return hashlib.sha256(token.encode()).digest()


def check_version(version: int) -> None:
    """Refuse a client that speaks another protocol. Raises ProtocolVersionError."""
    if not p.OLDEST_VERSION <= version <= p.PROTOCOL_VERSION:
        message = f"the client speaks protocol {version}, this daemon {p.OLDEST_VERSION} to {p.PROTOCOL_VERSION}"
        raise ProtocolVersionError(message, client=version, daemon=p.PROTOCOL_VERSION)


def refusal(error: ValidationError, frame: bytes) -> RegistryError:
    """Say which field of a frame was wrong, and how; another protocol version goes before everything."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return _not_json(first["msg"], frame)
    try:
        version = json.loads(frame).get("v", p.PROTOCOL_VERSION)
        check_version(version if isinstance(version, int) else p.PROTOCOL_VERSION)
    except ProtocolVersionError as older:
        return older
    except (ValueError, RecursionError, AttributeError):
        pass
    place = [str(part) for part in first["loc"]]
    field = ".".join(place[1:]) or "op"
    return InvalidError(f"{field}: {first['msg']}", field=field, reason=first["msg"])


def _not_json(reason: str, frame: bytes) -> RegistryError:
    """Name the field if Python's lenient parser can read the frame: lone surrogates, deep nesting."""
    field = "frame"
    if len(frame) > DIAGNOSED_BYTES:
        return InvalidError(f"{field}: {reason}", field=field, reason=reason)
    try:
        for key, value in json.loads(frame).items():
            try:
                json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
                if _depth(value) > 100:
                    field = key
            except ValueError:
                field = key
    except (ValueError, RecursionError, AttributeError):
        pass
    return InvalidError(f"{field}: {reason}", field=field, reason=reason)


def _depth(value: Any) -> int:
    depth = 0
    level = [value]
    while level:
        depth += 1
        level = [
            item for v in level if isinstance(v, (dict, list)) for item in (v.values() if isinstance(v, dict) else v)
        ]
    return depth
