"""The one session that all clients of a process on one registry share: ask, resolve, release.

`ask` repeats a request whose connection ended under it until its deadline: with the same number where the session was
resumed, so that the daemon knows it again. Sessions are per process: a forked child forgets its parent's and makes its
own at first use. Nothing here that a release needs waits for a lock.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from typing import Any

from madsci_registry import _grants, _lifeline, _transport, protocol
from madsci_registry._ask import Ask, Moved, Start, encode_stamped
from madsci_registry._endpoint import Endpoint
from madsci_registry._grants import Grant, Key
from madsci_registry._ledger import Call
from madsci_registry._lifeline import Connection
from madsci_registry._link import FIRST_PAUSE_S, LONGEST_PAUSE_S, Link
from madsci_registry._process import this_process
from madsci_registry._transport import NoAnswer
from madsci_registry.errors import (
    BusyError,
    RegistryError,
    RegistryTimeoutError,
    SessionRequiredError,
    StaleEpochError,
    UnavailableError,
    WaitingError,
    from_wire,
)

FINAL_S = 0.5
"""What a release may take at most: it may come from atexit or a finalizer (design.md section 5)."""


class Session(Link):
    """What the clients of this process share. Threads share it; only valid in the process that made it."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self._seq = itertools.count(1)

    def ask(self, ask: Ask) -> Any:
        """Send a request until it is answered and return what its reply's `ok` holds.

        Raises:
            Moved: `ask.only` has ended. RegistryError: the daemon's refusal, or that there was no answer.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            connection = self._connection_for(ask)
            try:
                reply = self._exchange(ask, connection)
            except NoAnswer as failure:
                ask.is_in_doubt = ask.is_in_doubt or failure.sent
                if failure.broken and time.monotonic() < ask.deadline:
                    continue
                raise ask.unanswered() from None
            if "ok" in reply:
                return reply["ok"]
            error = from_wire(reply["error"])
            if isinstance(error, WaitingError):
                ask.is_in_doubt = False  # it stands in the queue; giving up withdraws it
                continue
            if not isinstance(error, (StaleEpochError, SessionRequiredError, UnavailableError)):
                raise error
            connection.fail()
            if time.monotonic() + pause_s >= ask.deadline:
                raise error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def read(self, body: dict[str, Any], timeout_s: float, start: Start) -> Any:
        """Ask for what changes nothing, with one quick try on the connection that stands; else as `ask`."""
        connection = self._connection
        left_s = timeout_s
        if connection is not None and not connection.broken:
            began = time.monotonic()
            try:
                frame = encode_stamped(body, connection.stamp_json, next(self._seq))
                reply = protocol.decode(connection.channel.exchange(frame, began + timeout_s))
                if "ok" in reply:
                    return reply["ok"]
            except NoAnswer:
                left_s -= time.monotonic() - began
        ask = Ask(body, left_s, start=start)
        ask.timeout_s = timeout_s  # what an error names
        return self.ask(ask)

    def _exchange(self, ask: Ask, connection: Connection) -> dict[str, Any]:
        if ask.call.seq == 0 or ask.session not in (None, connection.session):
            ask.call.seq = next(self._seq)
        ask.session = connection.session
        frame = ask.frame(connection)
        ask.call.is_open = True
        reply = protocol.decode(connection.channel.exchange(frame, ask.answer_by()))
        # Unless it is a lock, an answer settles it; a lock still has to be put into the ledger.
        ask.call.is_open = "error" not in reply or reply["error"].get("code") == "waiting"
        return reply

    def _connection_for(self, ask: Ask) -> Connection:
        if ask.only is not None:
            if ask.only.broken:
                raise Moved
            return ask.only
        connection = self._connection
        if connection is not None and not connection.broken:
            return connection
        try:
            return self.connection(ask.deadline, ask.start)
        except (UnavailableError, RegistryTimeoutError) as error:
            if ask.is_write and ask.is_in_doubt:
                raise ask.unanswered() from error
            raise

    def resolve(self, ask: Ask, name: str) -> tuple[dict[str, Any], Grant]:
        """Ask for a lock until the answer is one that still counts; withdraw where that fails or is interrupted.

        Raises:
            RegistryError as `ask`.
        """
        call = ask.call
        before = self.ledger.find(Key(call.instance, name))
        grant: Grant | None = None
        self.ledger.begin(call)
        try:
            while True:
                result = self.ask(ask)
                token = result["fencing_token"]
                grant = self._granted(call, name, result)
                if grant is None:
                    # Another thread of this client gives it back at this moment: let that be done, then ask anew.
                    self._release(Key(call.instance, name), token, ask.answer_by())
                    call.seq = 0
                    if time.monotonic() >= ask.deadline:
                        raise BusyError(f"{name!r} is just being released by this client; try again")
                elif not self._is_current(ask.session):
                    continue  # whether a resume meanwhile knew of it, only the daemon can say
                else:
                    call.is_open = False
                    return result, grant
        except BaseException:
            if grant is not None and grant is not before:
                self.ledger.give_back(grant)
            raise
        finally:
            self.ledger.finish(call)
            if call.is_open:
                self._withdraw(call)

    def resolve_many(self, ask: Ask, names: list[str]) -> list[tuple[dict[str, Any], Grant | None]]:
        """Ask for many locks at once; per name its result ({"ok"} or {"error"}) and its grant, None: ask again.

        Raises:
            RegistryError as `ask`.
        """
        call = ask.call
        self.ledger.begin(call)
        taken: list[Grant | None] = []
        try:
            while True:
                results = self.ask(ask)["results"]
                taken = [
                    self._granted(call, name, result["ok"]) if "ok" in result else None
                    for name, result in zip(names, results, strict=True)
                ]
                if self._is_current(ask.session):
                    call.is_open = False
                    return list(zip(results, taken, strict=True))
        except BaseException:
            for grant in filter(None, taken):
                self.ledger.give_back(grant)
            raise
        finally:
            self.ledger.finish(call)
            if call.is_open:
                self._withdraw(call)

    def _granted(self, call: Call, name: str, result: dict[str, Any]) -> Grant | None:
        """Record what a reply grants; None: it was given back meanwhile, ask again."""
        return self.ledger.granted(call, name, result["fencing_token"], result.get("lab"), self.look)

    def _is_current(self, session: str | None) -> bool:
        connection = self._connection
        return connection is not None and not connection.broken and connection.session == session

    def _withdraw(self, call: Call) -> None:
        # Without a connection nothing needs to be said: the next resume gives back what nobody here knows.
        connection = self._connection
        if connection is not None:
            connection.say(protocol.Cancel(seq=call.seq))

    # releasing

    def release(self, grant: Grant, within_s: float = FINAL_S) -> bool:
        """Give a lock back; False where it is not held here any more (or never was, in a forked child).

        Takes at most `within_s` (at most 0.5) seconds and never connects: where the connection is down, or no answer
        comes, the daemon hears of it over the lifeline, at the latest when that is back.
        """
        if self.process != this_process() or not self.ledger.give_back(grant):
            return False
        key, token = grant.place
        if self._release(key, token, time.monotonic() + min(within_s, FINAL_S)):
            self.ledger.drop(grant)
        return True

    def _release(self, key: Key, token: int, deadline: float) -> bool:
        """Tell the daemon; True where it knows for sure."""
        connection = self._connection
        if connection is None or connection.broken:
            return False
        line = protocol.LifelineRelease(instance=key.instance, name=key.name, fencing_token=token)
        if sys.is_finalizing() or time.monotonic() >= deadline:
            connection.say(line)
            return False
        body = {"op": "release", "name": key.name, "instance": key.instance, "fencing_token": token}
        try:
            self.ask(Ask(body, deadline - time.monotonic(), only=connection))
            return True
        except (RegistryError, Moved):
            connection.say(line)
            return False


_sessions: dict[str, Session] = {}
# Reentrant: a client may be closed by a finalizer in the middle of `attach`.
_sessions_lock = threading.RLock()


def attach(endpoint: Endpoint, instance: str, autostart: bool) -> Session:
    """Return this process's session on a registry, made if it is the first client; nothing connects yet."""
    with _sessions_lock:
        key = os.fspath(endpoint.socket)
        session = _sessions.get(key)
        if session is None or session.closed:
            session = _sessions[key] = Session(endpoint)
        session.users[instance] = autostart
        return session


def detach(session: Session, instance: str) -> None:
    """Let a client go; the session ends with its last one."""
    # At interpreter shutdown whoever has the lock may never run again.
    has_lock = _sessions_lock.acquire(timeout=FINAL_S)
    try:
        session.users.pop(instance, None)
        if not session.users and not session.closed:
            if _sessions.get(os.fspath(session.endpoint.socket)) is session:
                _sessions.pop(os.fspath(session.endpoint.socket), None)
            session.close()
    finally:
        if has_lock:
            _sessions_lock.release()


def _forget_parent() -> None:
    global _sessions, _sessions_lock
    _transport.bury(_sessions)
    _transport.forget_parent()
    _lifeline.forget_parent()
    _grants.forget_parent()
    _sessions = {}
    _sessions_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)
