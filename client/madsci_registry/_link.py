"""The connection of a process to its daemon, kept: made where it is needed, resumed where something is held.

Theory of operation
There is one Connection at a time. Who needs one and finds it broken makes the next, one thread at a time; whoever
waited for that uses it too. One thread reads the lifeline; when the connection ends, that thread resumes by itself if
the daemon may hold something for this process, else it ends and the next request connects. A resume settles what both
sides know: what the daemon does not hold is lost, what nobody here knows is given back.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Any

from madsci_registry import protocol
from madsci_registry._ask import Start
from madsci_registry._endpoint import Endpoint
from madsci_registry._grants import Key
from madsci_registry._ledger import Ledger
from madsci_registry._lifeline import Absent, Connection, connect
from madsci_registry._process import this_process
from madsci_registry._threads import start_thread
from madsci_registry.errors import RegistryError, RegistryTimeoutError, SessionRequiredError, UnavailableError

log = logging.getLogger("madsci_registry")

FIRST_PAUSE_S = 0.01
LONGEST_PAUSE_S = 1.0
"""Between two tries to connect. In between a quarter of the time that it took so far, since a restarted daemon is
expected back within half a second."""
LOOK_S = 2.0
"""How long `ensure` may take where the connection is down and a daemon is there."""
ATTEMPT_S = 10.0
"""For one try to start a daemon and be welcomed."""
LONGEST_START_PAUSE_S = 30.0
"""Between two tries of the watching thread to start a daemon that does not come up."""
CLIENT = "madsci_registry (python)"


class Link:
    """What keeps a process connected. Threads share it; only valid in the process that made it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.process = this_process()
        self.ledger = Ledger()
        self.users: dict[str, bool] = {}
        """The clients that are open, by instance, and whether each allows to start a daemon."""
        self.closed = False
        self._connection: Connection | None = None
        self._connecting = threading.Lock()
        self._has_reader = False

    # looking

    def look(self, *, resume: bool = False) -> bool:
        """Take in what is known by now and tell whether the daemon is there.

        Args:
            resume: if the connection is down, also try at once whether a daemon is there to say what we hold.

        Raises:
            RegistryError: with `resume`, where one is there and does not say so, or refuses.
        """
        connection = self._connection
        if connection is None:
            return False
        if not connection.broken:
            connection.look(self._told)
        if connection.broken and resume and not (self.closed or self.ledger.is_idle):
            self._resume_at_once(time.monotonic() + LOOK_S)
        self._give_up_in_time(connection)
        connection = self._connection or connection
        return not connection.broken

    def _resume_at_once(self, deadline: float) -> None:
        if not self._connecting.acquire(timeout=LOOK_S):
            raise RegistryTimeoutError(f"the daemon of {self.endpoint} does not say what this process holds")
        try:
            if self._connection is not None and self._connection.broken:
                self._open(deadline)
        except Absent:
            pass  # the watching thread goes on trying
        finally:
            self._connecting.release()

    def _give_up_in_time(self, connection: Connection) -> None:
        """Lose what nobody can prove to be ours: by now a new daemon may have given it away."""
        if connection.grace_s is not None and time.monotonic() - connection.broken_at >= connection.grace_s:
            reason = f"the daemon was away for {connection.grace_s:g} s and cannot prove that this process lives"
            if self._connection is connection:
                self.ledger.lose_all(reason)

    # connecting

    def connection(self, deadline: float, start: Start) -> Connection:
        """Return the connection, made anew where it is broken.

        Args:
            deadline: monotonic instant.
            start: what may be done where no daemon answers.

        Raises:
            UnavailableError: nobody is there, with a hint what to do. RegistryError: refused, or no answer.
        """
        began = time.monotonic()
        while True:
            if not self._connecting.acquire(timeout=_lock_timeout_s(deadline)):
                raise RegistryTimeoutError(f"no connection to the daemon of {self.endpoint} in time")
            try:
                connection = self._connection
                if connection is not None and not connection.broken:
                    return connection
                connection = self._connect_once(deadline, start)
            finally:
                self._connecting.release()
            if connection is not None:
                return connection
            if start is Start.NEVER or time.monotonic() >= deadline:
                raise self._absent(start)
            time.sleep(max(0.0, min(_pause_s(began), deadline - time.monotonic())))

    def _connect_once(self, deadline: float, start: Start) -> Connection | None:
        """Connect, starting a daemon where that is allowed; None: nobody is there yet."""
        if self.closed:
            raise SessionRequiredError("the client is closed")
        # A daemon that is there and silent must not keep other threads from their own deadlines for ever.
        once = min(deadline, time.monotonic() + ATTEMPT_S)
        try:
            try:
                return self._open(once)
            except Absent:
                return self._open(once) if self._start_daemon(once, start) else None
        except Absent:
            return None
        except RegistryTimeoutError:
            if time.monotonic() >= deadline:
                raise
            return None

    def _start_daemon(self, deadline: float, start: Start) -> bool:
        if start in (Start.NEVER, Start.WAIT):
            return False
        from madsci_registry._autostart import make_folder, refusal, start_daemon  # not needed where one serves

        if refusal(self.endpoint) is not None:
            return False
        if start is Start.MAKE:
            make_folder(self.endpoint)
        elif not self.endpoint.exists():
            raise UnavailableError(
                f"there is no registry at {self.endpoint} yet",
                path=str(self.endpoint),
                hint="the first resolve makes one",
            )
        return start_daemon(self.endpoint, deadline)

    def _absent(self, start: Start) -> UnavailableError:
        from madsci_registry._autostart import hint, refusal

        why = "autostart is off" if start is Start.WAIT else refusal(self.endpoint)
        message = f"no daemon serves {self.endpoint}"
        if why and start is not Start.NEVER:
            message += f", and none was started: {why}"
        return UnavailableError(message, path=str(self.endpoint.socket), hint=hint(self.endpoint))

    def _open(self, deadline: float) -> Connection:
        """Resume, or begin a session where there is none (any more).

        Raises:
            Absent: nobody listens. RegistryError: refused.
        """
        paths = self.endpoint.lifeline, self.endpoint.socket
        last = self._connection
        if last is not None:
            try:
                connection = connect(*paths, self._resume(last.token), deadline)
            except SessionRequiredError:
                self.ledger.lose_all("the daemon ended the session while this process was cut off")
            else:
                return self._welcome(connection)
        return self._welcome(connect(*paths, protocol.Hello(client=CLIENT), deadline))

    def _resume(self, token: str) -> protocol.Resume:
        held = sorted(self.ledger.held(), key=lambda grant: grant.lab == "confirmed")
        holds = [
            protocol.Hold(name=key.name, instance=key.instance, fencing_token=held_token)
            for key, held_token in (grant.place for grant in held)
        ]
        resume = protocol.Resume(token=token, client=CLIENT, holds=holds)
        while len(protocol.encode(resume)) >= protocol.LINE_MAX_BYTES:
            # They matter after an I/O error of the daemon, and where a token may have grown meanwhile: those are first.
            resume.holds = resume.holds[: len(resume.holds) // 2]
        return resume

    def _welcome(self, connection: Connection) -> Connection:
        """Take a connection into use: give back what nobody here knows, lose what the daemon does not hold."""
        for line in connection.said_renamed:
            key = Key(line["instance"], line["name"])
            self.ledger.renamed(key, line["old_token"], line["to"], line["fencing_token"])
        strangers = self._give_back_unknown(connection, connection.said_held)
        if self._connection is not None:
            self.ledger.tell_all("suspended")
        self.ledger.reconcile(connection.said_held)
        self.ledger.stand(connection.said_in_lab)
        self._connection = connection
        self.ledger.tell_all("held")
        # A call that gave up between the look and now found no connection to say so.
        self._give_back_unknown(connection, [lock for lock in connection.said_held if lock not in strangers])
        if not self._has_reader:
            self._has_reader = start_thread(self._watch, connection)  # it cannot get on before `_connecting` is free
            if not self._has_reader:
                connection.fail()
                connection.close()
                raise UnavailableError("no thread could be started to watch the connection")
        return connection

    def _give_back_unknown(self, connection: Connection, said: list[tuple[Key, int]]) -> set[tuple[Key, int]]:
        strangers = self.ledger.unknown(said)
        for key, token in strangers:
            connection.say(protocol.LifelineRelease(instance=key.instance, name=key.name, fencing_token=token))
        return set(strangers)

    # the watching thread

    def _watch(self, connection: Connection | None) -> None:
        try:
            while connection is not None:
                connection.listen(self._told)
                connection.close()
                connection = self._next_connection(connection)
        except BaseException:
            self._has_reader = False
            raise

    def _told(self, connection: Connection, line: dict[str, Any]) -> None:
        op = line.get("op")
        if op == "refused":
            log.warning("the daemon refused a line: %s", line.get("error"))
        elif op in ("lost", "renamed", "lab", "conflict"):
            self._told_of_lock(connection, op, Key(line["instance"], line["name"]), line["fencing_token"], line)

    def _told_of_lock(self, connection: Connection, op: str, key: Key, token: int, line: dict[str, Any]) -> None:
        is_wanted = True
        if op == "lost":
            by = line.get("by") or {}
            who = f" (by uid {by['uid']}, pid {by['pid']})" if "uid" in by else ""
            self.ledger.lost(key, token, f"{line['reason']}{who}")
        elif connection is not self._connection:
            pass  # what an earlier one has left unread, the welcome of this one knows better
        elif op == "renamed":
            is_wanted = self.ledger.renamed(key, line["old_token"], line["to"], token)
            key = key._replace(name=line["to"])
        elif op == "lab":
            is_wanted = self.ledger.stands(key, line["old_token"], token, line["lab"])
        elif self.ledger.conflicts(key, token, line["preferred"]):
            text = "the lab knows %r as %s: this process keeps %s until it resolves the name anew"
            start_thread(log.warning, text, key.name, line["preferred"], line["id"])  # apart: as a loss is
        if not is_wanted:
            # It was released with what it was called before.
            connection.say(protocol.LifelineRelease(instance=key.instance, name=key.name, fencing_token=token))

    def _next_connection(self, ended: Connection) -> Connection | None:
        """Wait for, or make, the connection after `ended`; None: there is no need for one."""
        self._tell_suspended(ended)
        owes = not self.ledger.is_idle
        began, start_pause_s, next_start_at, complained = time.monotonic(), 1.0, 0.0, False
        while True:
            with self._connecting:
                if self._connection is not ended:
                    return self._connection
                if not owes:
                    self._has_reader = False
                    return None
                self._give_up_in_time(ended)
                now = time.monotonic()
                start = Start.EXISTING if self._wants_daemon() and now >= next_start_at else Start.WAIT
                if start is Start.EXISTING:
                    next_start_at, start_pause_s = now + start_pause_s, min(2 * start_pause_s, LONGEST_START_PAUSE_S)
                try:
                    connection = self._reconnect(start)
                    if self.closed and connection is not None:
                        connection.say(protocol.Bye())
                        connection.fail()
                        owes = False
                except RegistryError as error:
                    if not complained:
                        log.warning("cannot resume the session of %s: %s; trying on", self.endpoint, error)
                    complained = True
            time.sleep(_pause_s(began) if self._connection is ended else 0)

    def _tell_suspended(self, ended: Connection) -> None:
        if self._connection is not ended:
            return
        self.ledger.tell_all("suspended")
        if self._connection is not ended:  # another thread was quicker: the last word is what is so
            self.ledger.tell_all("held")

    def _wants_daemon(self) -> bool:
        return any(self.users.values()) and self.endpoint.exists() and not self.closed

    def _reconnect(self, start: Start) -> Connection | None:
        deadline = time.monotonic() + ATTEMPT_S
        try:
            return self._open(deadline)
        except Absent:
            self._start_daemon(deadline, start)
            return None

    # the end

    def close(self) -> None:
        """Say bye: the session and all that it holds end. Where the daemon is away, it hears of it when it is back."""
        self.closed = True
        connection = self._connection
        if connection is not None:
            connection.say(protocol.Bye())
            connection.fail()


def _pause_s(began: float) -> float:
    return min(max(FIRST_PAUSE_S, (time.monotonic() - began) / 4), LONGEST_PAUSE_S)


def _lock_timeout_s(deadline: float) -> float:
    left_s = max(0.0, deadline - time.monotonic())
    return -1 if math.isinf(left_s) else min(left_s, threading.TIMEOUT_MAX)
