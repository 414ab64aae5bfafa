"""A client and the daemon's core joined without a socket: real handlers, real SQLite file, a clock to turn."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers import FakeClock
from madsci_registry import errors, protocol
from madsci_registry.types import Process
from madsci_registryd import database
from madsci_registryd.core import Core
from madsci_registryd.handlers import hash_token
from madsci_registryd.locks import Identity, Presence, Session
from madsci_registryd.transaction import Tx


class Asked:
    """One request: its reply, None while it waits."""

    def __init__(self) -> None:
        self.reply: dict[str, Any] | None = None

    def __call__(self, reply: dict[str, Any]) -> None:
        assert self.reply is None, "answered twice"
        self.reply = reply

    @property
    def code(self) -> str | None:
        """The error's code, "ok", or None while it waits."""
        if self.reply is None:
            return None
        return "ok" if "ok" in self.reply else str(self.reply["error"]["code"])

    def ok(self) -> dict[str, Any]:
        assert self.reply is not None and "ok" in self.reply, self.reply
        return dict(self.reply["ok"])

    def error(self) -> errors.RegistryError:
        assert self.reply is not None and "error" in self.reply, self.reply
        return errors.from_wire(self.reply["error"])


class Pair:
    """The daemon's core on a real file, and client sessions that ask it."""

    def __init__(self, path: Path, clock: FakeClock | None = None) -> None:
        self.path = path
        self.clock = clock or FakeClock()
        self.dead: set[str] = set()
        self.told: list[tuple[str, dict[str, Any]]] = []
        self._open()

    def _open(self) -> None:
        self.core = Core(database.open_database(self.path), self.path, self.clock, host="here", status=dict)
        self.core.registrar.is_dead = lambda session: session.id in self.dead
        self.core.registrar.tell = lambda session, line: self.told.append((session, line))
        self.core.begin("test", self._judge)

    def _judge(self, tx: Tx, session: Session) -> None:
        if session.id in self.dead:
            self.core.service.end_session(tx, session, "its process died")
        else:
            session.process = replace(session.process, proof="pidfd")
            session.since = tx.monotonic
            self.core.registrar.add_session(session)

    def restart(self) -> None:
        """End the daemon and start it again; sessions are detached until they resume."""
        self.core.registrar.close()
        self.core.close()
        self._open()

    def session(self, name: str, uid: int = 1000, *, is_admin: bool = True) -> Client:
        return Client(self, name, uid, is_admin)

    def commit(self) -> None:
        """End the daemon's turn."""
        self.core.registrar.commit()

    def turn(self) -> None:
        """Let the daemon do what is due."""
        self.core.timers.run_due()
        self.core.registrar.commit()

    def wait(self, seconds: float) -> None:
        """Let time pass and the daemon do what is due."""
        self.clock.advance(seconds)
        self.turn()
        while self.core.timers.next_s() == 0:
            self.turn()

    def close(self) -> None:
        self.core.close()


class Client:
    """One session."""

    def __init__(self, pair: Pair, name: str, uid: int, is_admin: bool) -> None:
        self._pair = pair
        self._is_admin = is_admin
        self.id = name
        self._seq = itertools.count(1)
        pair.core.registrar.add_session(
            Session(
                id=name,
                token_hash=hash_token(name),
                process=Process(pid=4711, uid=uid, gid=uid, proof="pidfd"),
                identity=Identity(4711, 1, 1, "boot", 1),
                started_at="2026-01-01T00:00:00.000000Z",
                is_admin=is_admin,
            )
        )

    @property
    def record(self) -> Session:
        return self._pair.core.registrar.sessions[self.id]

    def send(
        self, op: str, *, turn: bool = True, seq: int | None = None, epoch: int | None = None, **fields: Any
    ) -> Asked:
        """Ask; with `turn` the daemon commits at once, without it the request waits for the next batch."""
        seq = next(self._seq) if seq is None else seq
        request = protocol.REQUESTS[op](
            token=self.id, epoch=self._pair.core.epoch if epoch is None else epoch, seq=seq, **fields
        )
        return self.raw(protocol.encode(request), turn=turn)

    def raw(self, frame: bytes, *, turn: bool = True) -> Asked:
        asked = Asked()
        self._pair.core.handlers.request(frame, asked)
        if turn:
            self._pair.commit()
        return asked

    def resolve(self, name: str, component_type: str = "node", *, instance: str = "i", **fields: Any) -> Asked:
        return self.send("resolve", name=name, component_type=component_type, instance=instance, **fields)

    def release(self, name: str, token: int, *, instance: str = "i") -> bool:
        return bool(self.send("release", name=name, instance=instance, fencing_token=token).ok()["released"])

    def get(self, name: str) -> dict[str, Any]:
        return dict(self.send("get", name=name).ok()["component"])

    def die(self) -> None:
        """The process is killed; the daemon has not noticed yet."""
        self._pair.dead.add(self.id)

    def ended(self) -> None:
        """The daemon notices that the process died."""
        self._pair.dead.add(self.id)
        self._pair.core.registrar.end_session(self.record, "its process died")
        self._pair.core.registrar.commit()

    def drop(self) -> None:
        """The connection ends, the process lives."""
        self._pair.core.registrar.drop(self.record)
        self._pair.core.registrar.commit()

    def resume(self) -> None:
        self.record.is_admin = self._is_admin
        self._pair.core.registrar.attach(self.record)
        assert self.record.presence is Presence.ATTACHED
        self._pair.core.registrar.commit()
