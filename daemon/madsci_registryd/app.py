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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from madsci_registry import protocol as p
from madsci_registryd import database, facts, fragments, holders, messages, surroundings
from madsci_registryd.admission import Admission
from madsci_registryd.batch import Write, always
from madsci_registryd.bridge import Bridge
from madsci_registryd.clock import SystemClock, iso
from madsci_registryd.core import Core
from madsci_registryd.export import Export
from madsci_registryd.faults import BadConfiguration, CorruptDatabase, StartFault, StorageFault, os_fault
from madsci_registryd.holders import Life
from madsci_registryd.instance import InstanceLock
from madsci_registryd.lifelines import Lifelines
from madsci_registryd.locks import Session
from madsci_registryd.loop import Loop, Turn
from madsci_registryd.outlets import Outlets
from madsci_registryd.passes import Passes
from madsci_registryd.server import Server
from madsci_registryd.settings import NO_SUPERVISION, Places, Settings, Supervision, in_container
from madsci_registryd.sockets import ListeningPath
from madsci_registryd.supervisor import Supervisor, passed_sockets
from madsci_registryd.transaction import Tx

if TYPE_CHECKING:
    from madsci_registryd.lab_side import LabSide
    from madsci_registryd.metrics import Metrics

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
GRACES = {"io_error": "an I/O error ended the last daemon", "restored": "a backup was restored"}
"""After what nothing is granted for a while, by its note beside the lock (instance.py)."""
START_LONGER_S = 600.0
"""What a check of the whole database may take."""


class App:
    """One daemon, from `start()` through `run()` to `close()`."""

    def __init__(
        self,
        settings: Settings,
        *,
        config: Path | None = None,
        reload: Callable[[], Settings] | None = None,
        supervision: Supervision = NO_SUPERVISION,
        is_autostarted: bool = False,
    ) -> None:
        """`config` is the settings' file, for messages; `reload` reads them anew, at SIGHUP; None: there is none."""
        self.settings = settings
        self._reload = reload
        self._must_reload = False
        self._config = str(config or "the daemon's settings")
        self._supervision = supervision
        self._is_autostarted = is_autostarted
        self.supervisor = Supervisor(supervision)
        self.places = Places(settings)
        self.clock = SystemClock()
        self.loop = Loop(self.clock.monotonic)
        self.why_stop: str | None = None
        self.passes: Passes | None = None
        self.bridge: Bridge | None = None
        self._metrics: Metrics | None = None
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
        boot = holders.boot_id()
        grace = next((why for why in GRACES if notes.get(why) == boot), None)
        if grace == "io_error":
            self._check_after_error()
        try:
            self._build()
            self.core.begin(VERSION, self._judge)
            if self.lab is not None:
                self.lab.open()
            self._open_file()
        except database.DatabaseError as error:
            raise database.start_fault(error, self.places.database) from error
        if grace:
            self.service.no_grants_before = self.clock.monotonic() + p.GRACE_S
            self.service.why_no_grants = GRACES[grace]
        self._note(**({grace: boot} if grace else {}))
        self._watch_signals()  # first: whoever finds us listening may tell us to stop
        self.server.bind()
        if not self._is_autostarted:  # before the first client can come in
            self.supervisor.leave_word(self.places.kept, in_container=in_container())
        self.lifelines.reception.bind()
        self._watch_world(grace is not None)
        self.supervisor.ready(f"serving {self.places.registry}")
        where = self.places.registry, self.places.socket, self.core.epoch
        log.info("serving registry=%s socket=%s epoch=%d", *where, extra=messages.STARTED(version=VERSION))

    def _note(self, **more: Any) -> None:
        self.instance.note(pid=os.getpid(), socket=str(self.places.socket), epoch=self.core.epoch, **more)

    def _limits(self) -> None:
        """As many descriptors as allowed: libzmq aborts when they run out."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def _folders(self) -> None:
        surroundings.check_user(os.geteuid())
        folder = self.places.state
        try:
            folder.mkdir(mode=0o755, exist_ok=True)
            self._folder_identity = _identity(folder)
        except OSError as error:
            raise os_fault(error, str(folder)) from error
        surroundings.check_file_system(folder, lasting=in_container() and not self.settings.ephemeral)

    def _check_after_error(self) -> None:
        text = "the last daemon ended with an I/O error: checking the whole database"
        log.warning(text, extra=messages.CHECKING_AFTER_IO_ERROR())
        self.supervisor.starting_for(START_LONGER_S)
        found = database.faults_of(self.db)
        if found:
            where = str(self.places.database)
            raise CorruptDatabase(f"{where} is damaged: {found[0]}; madsci-registryd restore BACKUP", path=where)

    def _build(self) -> None:
        self.host = socket.gethostname()
        self.proof = holders.best_proof(self.settings.proof)
        self._started_s = self.clock.wall()
        self.started_at = iso(self._started_s)
        self.core = Core(
            self.db,
            self.places.database,
            self.clock,
            host=self.host,
            status=self.status,
            metrics=self.metrics,
            epoch_floor=self.instance.noted_epoch(),
            admission=self._admission(self.settings),
            limits=self.settings.limits,
        )
        self.lab = self._make_lab() if self.settings.lab_url else None
        self.loop.worked = self.core.meters.turns.add
        self.registrar, self.service, self.timers = self.core.registrar, self.core.service, self.core.timers
        requests, lifeline = self._listening_paths()
        self.server = Server(requests, self.service.admission, self.core.quotas, self.clock)
        self.server.is_busy, self.server.session_of = self.core.handlers.is_busy, self.core.handlers.session_of
        self.lifelines = Lifelines(
            lifeline, self.loop, self.core, version=VERSION, config=self._config, best_proof=self.settings.proof
        )

    def _make_lab(self) -> LabSide:
        from madsci_registryd.lab_side import LabSide  # httpx and its like: 70 ms, for those only who have a lab

        return LabSide(self.core, self.settings, self.places.database, self.host)

    def _listening_paths(self) -> list[ListeningPath]:
        given = passed_sockets(self._supervision.sockets)
        paths = [self.places.socket, self.places.lifeline]
        for path in given:
            if path not in paths:
                raise BadConfiguration(f"the service manager passed {path}; this daemon's sockets are {paths}")
        if len(given) == 1:
            raise BadConfiguration(f"the service manager passed one socket alone, it has to pass both: {paths}")
        return [ListeningPath(path, given.get(path), owns_folder=self.places.owns_socket_folder) for path in paths]

    def _admission(self, settings: Settings) -> Admission:
        group = self.places.state.stat().st_gid
        return Admission(settings.access, settings.allow_uids, os.geteuid(), group, settings.admin_gid)

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

    def _watch_world(self, has_grace: bool) -> None:
        self.loop.watch(self.server.fd, Turn.REQUESTS, self.server.wake)
        self.timers.every(LOOK_AFTER_S, self._look_after)
        if self.supervisor.alive_every_s is not None:
            self.supervisor.alive()
            self.timers.every(self.supervisor.alive_every_s, self.supervisor.alive)
        if self.lab is not None:
            self.loop.watch(self.lab.lanes.fd, Turn.REQUESTS, self.lab.lanes.take)
            self.lab.start()
            sys.setswitchinterval(SWITCH_S)
        if self.passes is not None:
            self.loop.watch(self.passes.fd, Turn.REQUESTS, self._take_passes)
            self.passes.start()
            sys.setswitchinterval(SWITCH_S)
        self.timers.after(TRIM_S, self._trim)
        listen = self.settings.metrics_address
        self.outlets = Outlets(self.clock, self.timers, self.metrics, listen=listen, file=self.settings.metrics_file)
        if has_grace:
            self.timers.after(p.GRACE_S, self._end_grace)

    def _watch_signals(self) -> None:
        wake, signalled = socket.socketpair()
        wake.setblocking(False)
        signalled.setblocking(False)
        signal.set_wakeup_fd(signalled.fileno(), warn_on_full_buffer=False)
        self._wake = wake, signalled
        self.loop.watch(wake.fileno(), Turn.DEATHS, lambda events: _read_all(wake))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if self._reload is not None:
            signal.signal(signal.SIGHUP, self._on_hangup)

    def _take_passes(self, events: int) -> None:
        assert self.passes is not None and self.bridge is not None
        for done in self.passes.take():
            self.core.meters.passed(done.result)
            self.bridge.done(done.result, done.was_asked)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.why_stop = signal.Signals(number).name

    def _on_hangup(self, number: int, frame: Any) -> None:
        self._must_reload = True

    # run

    def run(self) -> int:
        """Serve until told to stop; returns the exit status."""
        try:
            while self.why_stop is None:
                if self._must_reload:
                    self.reload()
                self._turn()
            self._turn()  # what was said before the stop is still done: a release must not be lost
        except (StorageFault, database.DatabaseError) as error:
            self._die(error)
        self.supervisor.stopping()
        log.info("stopping: %s", self.why_stop, extra=messages.STOPPED())
        return 0

    def reload(self) -> None:
        """Read the settings anew and take over what can be changed while serving; a fault in them changes nothing."""
        assert self._reload is not None
        self._must_reload = False
        self.supervisor.reloading()
        try:
            new = self._reload()
            admission = self._admission(self.settings.model_copy(update={"admin_group": new.admin_group}))
        except (StartFault, OSError) as fault:
            log.warning("the settings are not reloaded: %s", fault, extra=messages.NOT_RELOADED())
        else:
            self.lifelines.admit(admission)
            self._take_settings(new)
        self.supervisor.ready(f"serving {self.places.registry}")

    def _take_settings(self, new: Settings) -> None:
        changed = [key for key in Settings.model_fields if getattr(new, key) != getattr(self.settings, key)]
        taken = {key: getattr(new, key) for key in changed if key in Settings.RELOADED}
        self.settings = self.settings.model_copy(update=taken)
        self.core.quotas.limits = self.settings.limits
        logging.getLogger().setLevel(self.settings.log_level.upper())
        late = ", ".join(key for key in changed if key not in taken) or "nothing"
        text = "settings reloaded; changed: %s; changed, but only with a restart: %s"
        log.info(text, ", ".join(taken) or "nothing", late, extra=messages.RELOADED())

    def _turn(self) -> None:
        self.timers.run_due()
        self.registrar.commit()
        if self.bridge is not None:
            self.bridge.pump()
        if self.lab is not None:
            self.lab.pump()
        self.lifelines.reception.begin_turn()
        self.loop.turn(0 if self.why_stop or self.server.has_input() else self.timers.next_s())
        self.server.drain(self.core.handlers.request)
        self.registrar.commit()

    def _die(self, error: Exception) -> NoReturn:
        """An I/O error: what was being committed may or may not be on disk, so nothing more is said, not even by
        closing files in order. The next daemon checks the database and lets holders come back first."""
        log.critical("I/O error, exiting: %s", error, extra=messages.IO_ERROR())
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
                self._say_made_again(self.places.socket)
            if not self.lifelines.reception.path.is_ours():
                self.lifelines.reception.bind()
                self._say_made_again(self.places.lifeline)
        except (StartFault, OSError) as error:
            log.warning("cannot listen: %s", error, extra=messages.CANNOT_LISTEN())
        self._look_idle()

    def _say_made_again(self, path: Path) -> None:
        log.warning("the socket %s was gone: made again", path, extra=messages.SOCKET_MADE_AGAIN(path=path))

    def _is_folder_ours(self) -> bool:
        try:
            return _identity(self.places.state) == self._folder_identity
        except OSError:
            return False

    def _save_database(self) -> None:
        """Somebody deleted the database under us: write what we have to its place, and start anew on that."""
        if self.places.database.exists():
            text = "%s was replaced while it was served: leaving it to the next start"
            log.critical(text, self.places.database, extra=messages.DATABASE_REPLACED())
            os._exit(StorageFault.status)
        text = "%s was deleted while it was served: writing it again"
        log.critical(text, self.places.database, extra=messages.DATABASE_DELETED())
        copy = self.places.database.with_name(f"{self.places.database.name}.copy-saved")
        for old in ("-wal", "-shm"):
            Path(f"{self.places.database}{old}").unlink(missing_ok=True)
        try:
            database.copy_to(self.db, copy)
            copy.chmod(0o600)
            copy.rename(self.places.database)
            database.sync_folder(self.places.state)
        except (database.DatabaseError, OSError) as error:
            log.critical("could not write it: %s", error, extra=messages.DATABASE_NOT_SAVED())
            return
        log.critical("the database is written again: starting anew on it", extra=messages.DATABASE_SAVED())
        os._exit(StorageFault.status)  # at once: what were committed now would go with the deleted file

    def _look_idle(self) -> None:
        limit_s = self.settings.idle_exit
        if self.lifelines.reception.lines or self.registrar.sessions or limit_s is None:
            self._busy_at = self.clock.monotonic()
        elif self.clock.monotonic() - self._busy_at >= limit_s and self.lifelines.reception.stop_if_quiet():
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
        """Holders had their time after an I/O error or a restore: names may be granted again."""
        self._note()
        for name in {claim.name for claim in self.registrar.queues}:
            self.registrar.reconsider(name)

    def metrics(self) -> str:
        """Say in Prometheus' text format what the daemon counts, and how it stands."""
        if self._metrics is None:
            from madsci_registryd.metrics import Metrics  # 40 ms, for those only who want it

            self._metrics = Metrics(self.core, self.status, self.places.database, self._started_s)
        return self._metrics.text()

    def status(self) -> dict[str, Any]:
        """Say what the daemon is and does."""
        store = self.service.store
        names, retired, held = store.counts()
        degraded = []
        if self.clock.monotonic() < self.service.no_grants_before:
            degraded.append(f"{self.service.why_no_grants}: nothing is granted for 10 s")
        if self.proof != "pidfd":
            why = "the setting proof says so" if self.proof == self.settings.proof else "this kernel gives no more"
            degraded.append(f"holders are proven alive by {self.proof} only: {why}")
        if self.bridge is not None:
            degraded += self.bridge.degraded()
        if self.lab is not None:
            degraded += self.lab.degraded()
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
            "access": self.settings.access,
            "allow_uids": sorted(self.settings.allow_uids),
            "proof": self.proof,
            "export": self.bridge.status() if self.bridge is not None else {"state": "off"},
            "lab": self.core.handlers.lab.status(),
            "degraded": degraded,
        }

    def close(self) -> None:
        """Tell the clients, close the sockets, then the database; locks stay in it for the next daemon."""
        self.registrar.close()
        self.lifelines.reception.close()
        self.server.close()
        if self.lab is not None:
            self.lab.close()
        if self.passes is not None and self.bridge is not None:
            self.passes.stop()
            self.bridge.close()
        self.core.close()
        self.outlets.close()
        self.supervisor.close()
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
