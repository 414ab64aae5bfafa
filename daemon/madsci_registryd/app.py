"""Builds and joins the parts, and owns the order of start and stop.

Start: instance lock; open, check and migrate the database; one durable transaction (epoch above all that could have
been given, sessions of dead processes ended); only then the sockets. Stop: sockets first, database last.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from madsci_registry import protocol as p
from madsci_registryd import database, facts, fragments, holders
from madsci_registryd.batch import Write, always
from madsci_registryd.bridge import Bridge
from madsci_registryd.clock import SystemClock, iso
from madsci_registryd.core import Core
from madsci_registryd.export import Export
from madsci_registryd.faults import CorruptDatabase, StartFault, StorageFault, os_fault
from madsci_registryd.holders import Life
from madsci_registryd.instance import InstanceLock
from madsci_registryd.lifelines import Lifelines
from madsci_registryd.locks import Session
from madsci_registryd.loop import Loop, Turn
from madsci_registryd.passes import Passes
from madsci_registryd.server import Server
from madsci_registryd.settings import Places, Settings
from madsci_registryd.sockets import ListeningPath
from madsci_registryd.transaction import Tx

log = logging.getLogger(__name__)

VERSION = version("madsci-registryd")
LOOK_AFTER_S = 0.5
"""How often the sockets' and the registry's folders are looked at."""
TRIM_S = 60.0
TRIM_SOON_S = 0.2
TRIM_ROWS = 500
"""2,500 events a second, each time for about 2 ms."""
SWITCH_S = 0.0005
"""How long another thread may keep the loop waiting; Python's own 5 ms would be the file thread's each time."""
LOCK_EVENTS_KEPT = 1_000_000
LOCK_EVENTS_KEPT_S = 30 * 86400.0


class App:
    """One daemon, from `start()` through `run()` to `close()`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.places = Places(settings)
        self.clock = SystemClock()
        self.loop = Loop()
        self.why_stop: str | None = None
        self.passes: Passes | None = None
        self.bridge: Bridge | None = None
        self._busy_at = self.clock.monotonic()

    # start

    def start(self) -> None:
        """Get ready to serve. Raises: StartFault; nothing that existed was overwritten."""
        self._limits()
        self._folders()
        self.instance = InstanceLock(self.places.lock, self.places.lock_beside)
        notes = self.instance.notes()
        self.db = database.open_database(self.places.database)
        self._database_identity = _identity_of(self.places.database)
        after_error = notes.get("io_error") == holders.boot_id()
        if after_error:
            self._check_after_error()
        try:
            self._build()
            self.core.begin(VERSION, self._judge)
            self._open_file()
        except database.DatabaseError as error:
            raise database.start_fault(error, self.places.database) from error
        if after_error:
            self.service.no_grants_before = self.clock.monotonic() + p.GRACE_S
        self.instance.note(
            pid=os.getpid(), socket=str(self.places.socket), **({"io_error": notes["io_error"]} if after_error else {})
        )
        self.server.bind()
        self.lifelines.bind()
        self._watch_world(after_error)
        log.info("serving registry=%s socket=%s epoch=%d", self.places.registry, self.places.socket, self.core.epoch)

    def _limits(self) -> None:
        """As many descriptors as allowed: libzmq aborts when they run out."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def _folders(self) -> None:
        folder = self.places.state
        try:
            folder.mkdir(mode=0o755, exist_ok=True)
            self._folder_identity = _identity(folder)
        except OSError as error:
            raise os_fault(error, str(folder)) from error
        database.check_file_system(folder)

    def _check_after_error(self) -> None:
        log.warning("the last daemon ended with an I/O error: checking the whole database")
        found = database.faults_of(self.db)
        if found:
            where = str(self.places.database)
            raise CorruptDatabase(f"{where} is damaged: {found[0]}; madsci-registryd restore BACKUP", path=where)

    def _build(self) -> None:
        self.host = socket.gethostname()
        self.proof = holders.best_proof(self.settings.proof)
        self.started_at = iso(self.clock.wall())
        self.core = Core(self.db, self.places.database, self.clock, host=self.host, status=self.status)
        self.registrar, self.service, self.timers = self.core.registrar, self.core.service, self.core.timers
        self.server = Server(ListeningPath(self.places.socket))
        self.lifelines = Lifelines(
            ListeningPath(self.places.lifeline),
            self.loop,
            self.core,
            version=VERSION,
            sessions_per_uid=self.settings.sessions_per_uid,
            best_proof=self.settings.proof,
        )

    def _open_file(self) -> None:
        """Bring registry.json and the database together, and begin to keep the file."""
        if not self.settings.export:
            return
        now = iso(self.clock.wall())
        claim = fragments.claim(os.getpid(), self.host, self.core.epoch, now)
        created_at = str(self.service.store.meta("created_at"))
        export = Export(self.places.registry, self.clock, claim, created_at)
        self.passes = Passes(export)
        self.bridge = Bridge(self.core, export, self.passes.send)
        self.service.old_programs = self.bridge
        self.bridge.open()

    def _judge(self, tx: Tx, session: Session) -> None:
        """Find out whether the process of a session that an earlier daemon left is alive."""
        found = holders.find(session.identity, self.settings.proof)
        if found.life is Life.DEAD:
            self.service.end_session(tx, session, "its process died while no daemon was up")
            return
        peer = holders.peer_found(session.identity, found, uid=session.uid, gid=session.process.gid)
        session.process = facts.process_of(peer)
        session.since = tx.monotonic
        session.holds_nothing = not self.service.store.locks_of(session.id)
        self.registrar.add_session(session)
        if found.pidfd is not None:
            self.lifelines.watch_process(session, found.pidfd)

    def _watch_world(self, after_error: bool) -> None:
        self.loop.watch(self.server.fd, Turn.REQUESTS, self.server.wake)
        self.timers.every(LOOK_AFTER_S, self._look_after)
        if self.passes is not None:
            self.loop.watch(self.passes.fd, Turn.REQUESTS, self._take_passes)
            self.passes.start()
            sys.setswitchinterval(SWITCH_S)
        self.timers.after(TRIM_S, self._trim)
        if after_error:
            self.timers.after(p.GRACE_S, self._end_grace)
        wake, signalled = socket.socketpair()
        wake.setblocking(False)
        signalled.setblocking(False)
        signal.set_wakeup_fd(signalled.fileno(), warn_on_full_buffer=False)
        self._wake = wake, signalled
        self.loop.watch(wake.fileno(), Turn.DEATHS, lambda events: _read_all(wake))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _take_passes(self, events: int) -> None:
        assert self.passes is not None and self.bridge is not None
        for done in self.passes.take():
            self.bridge.done(done.result, done.was_asked)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.why_stop = signal.Signals(number).name

    # run

    def run(self) -> int:
        """Serve until told to stop; returns the exit status."""
        try:
            while self.why_stop is None:
                self._turn()
            self._turn()  # what was said before the stop is still done: a release must not be lost
        except (StorageFault, database.DatabaseError) as error:
            self._die(error)
        log.info("stopping: %s", self.why_stop)
        return 0

    def _turn(self) -> None:
        self.timers.run_due()
        self.registrar.commit()
        if self.bridge is not None:
            self.bridge.pump()
        self.loop.turn(0 if self.why_stop or self.server.has_input() else self.timers.next_s())
        self.server.drain(self.core.handlers.request)
        self.registrar.commit()

    def _die(self, error: Exception) -> NoReturn:
        """An I/O error: what was being committed may or may not be on disk, so nothing more is said, not even by
        closing files in order. The next daemon checks the database and lets holders come back first."""
        log.critical("I/O error, exiting: %s", error)
        self.instance.note(pid=None, io_error=holders.boot_id())
        os._exit(StorageFault.status)

    def _look_after(self) -> None:
        if not self._is_folder_ours():
            self.why_stop = "the registry's folder is gone"
            return
        if self._database_identity != _identity_of(self.places.database):
            self._save_database()
            return
        try:
            if not self.server.path.is_ours():
                self.server.bind()
                log.warning("the socket %s was gone: made again", self.places.socket)
            if not self.lifelines.path.is_ours():
                self.lifelines.bind()
                log.warning("the socket %s was gone: made again", self.places.lifeline)
        except (StartFault, OSError) as error:
            log.warning("cannot listen: %s", error)
        self._look_idle()

    def _is_folder_ours(self) -> bool:
        try:
            return _identity(self.places.state) == self._folder_identity
        except OSError:
            return False

    def _save_database(self) -> None:
        """Somebody deleted the database under us: write what we have to its place, and start anew on that."""
        if self.places.database.exists():
            log.critical("%s was replaced while it was served: leaving it to the next start", self.places.database)
            os._exit(StorageFault.status)
        log.critical("%s was deleted while it was served: writing it again", self.places.database)
        copy = self.places.database.with_name(f"{self.places.database.name}.copy-saved")
        for old in ("-wal", "-shm"):
            Path(f"{self.places.database}{old}").unlink(missing_ok=True)
        try:
            database.copy_to(self.db, copy)
            copy.chmod(0o600)
            copy.rename(self.places.database)
            database.sync_folder(self.places.state)
        except (database.DatabaseError, OSError) as error:
            log.critical("could not write it: %s", error)
            return
        log.critical("the database is written again: starting anew on it")
        os._exit(StorageFault.status)  # at once: what were committed now would go with the deleted file

    def _look_idle(self) -> None:
        limit_s = self.settings.idle_exit
        if not self.lifelines.is_quiet or self.registrar.sessions or limit_s is None:
            self._busy_at = self.clock.monotonic()
        elif self.clock.monotonic() - self._busy_at >= limit_s and self.lifelines.stop_if_quiet():
            self.why_stop = f"no client for {limit_s:g} s"

    def _trim(self) -> None:
        """Drop old lock events, a few milliseconds' worth at a time, sooner again while there are more."""
        before = iso(self.clock.wall() - LOCK_EVENTS_KEPT_S)
        store = self.service.store

        def done(more: Any) -> None:
            self.timers.after(TRIM_SOON_S if more is True else TRIM_S, self._trim)

        self.registrar.submit(
            Write(lambda tx: store.trim_lock_events(before, LOCK_EVENTS_KEPT, TRIM_ROWS), done, light=always)
        )

    def _end_grace(self) -> None:
        """Holders had their time after an I/O error: names may be granted again."""
        self.instance.note(pid=os.getpid(), socket=str(self.places.socket))
        for name in {claim.name for claim in self.registrar.queues}:
            self.registrar.reconsider(name)

    def status(self) -> dict[str, Any]:
        """Say what the daemon is and does."""
        store = self.service.store
        names, retired, held = store.counts()
        degraded = []
        if self.clock.monotonic() < self.service.no_grants_before:
            degraded.append("an I/O error ended the last daemon: nothing is granted for 10 s")
        if self.proof != "pidfd":
            why = "the setting proof says so" if self.proof == self.settings.proof else "this kernel gives no more"
            degraded.append(f"holders are proven alive by {self.proof} only: {why}")
        if self.bridge is not None:
            degraded += self.bridge.degraded()
        return {
            "version": VERSION,
            "protocol_version": p.PROTOCOL_VERSION,
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "host": self.host,
            "registry": str(self.places.registry),
            "database": str(self.places.database),
            "socket": str(self.places.socket),
            "started_at": self.started_at,
            "epoch": self.core.epoch,
            "revision": store.revision,
            "sqlite_version": database.sqlite_version(),
            "names": names,
            "retired": retired,
            "held": held,
            "sessions": len(self.registrar.sessions),
            "waiting": len(self.registrar.queues),
            "proof": self.proof,
            "export": self.bridge.status() if self.bridge is not None else {"state": "off"},
            "degraded": degraded,
        }

    def close(self) -> None:
        """Tell the clients, close the sockets, then the database; locks stay in it for the next daemon."""
        self.registrar.close()
        self.lifelines.close()
        self.server.close()
        if self.passes is not None and self.bridge is not None:
            self.passes.stop()
            self.bridge.close()
        self.core.close()
        self.instance.close()
        signal.set_wakeup_fd(-1)
        for sock in self._wake:
            sock.close()
        self.loop.close()


def _identity_of(path: Path) -> tuple[int, int] | None:
    try:
        return _identity(path)
    except OSError:
        return None


def _read_all(wake: socket.socket) -> None:
    wake.recv(4096)


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
