"""Under which name this host is known to the lab, and that a copy of its files elsewhere is not it.

A host's name in the lab, and the numbering (epoch) of the changes that it sends, are kept in the database, with the
place where that was: which machine, folder and file. Found at another place, the database is a copy, or was restored:
that is a new host, which tells the lab all it has anew.
"""

from __future__ import annotations

import hashlib
import logging
import socket
from contextlib import suppress
from pathlib import Path

import ulid

from madsci_registryd import messages
from madsci_registryd.clock import Clock
from madsci_registryd.store import Store

log = logging.getLogger(__name__)

_MACHINE_ID = Path("/etc/machine-id")
_HOSTNAME_MAX_BYTES = 200
"""Of 255 that a name may have."""


class LabHost:
    """The name and the numbering. Belongs to the thread that owns the database."""

    def __init__(self, store: Store, clock: Clock, database: Path, given: str | None) -> None:
        """`given`: the name that the host's token is for; None: one is made."""
        self._store = store
        self._clock = clock
        self._given = given
        self._place = place_of(database)
        self.is_elsewhere = False
        """This start found the database at another place than the last one: it is a copy, or was moved or restored."""

    @property
    def is_given(self) -> bool:
        """Its name stands in the lab's token file: no other can be taken."""
        return self._given is not None

    @property
    def name(self) -> str:
        return str(self._store.meta("lab_host"))

    @property
    def epoch(self) -> int:
        return int(self._store.meta("lab_epoch"))

    def settle(self) -> None:
        """Be the host that this database was, or a new one. To be called in a transaction, before the others."""
        known, place = self._store.meta("lab_host"), self._store.meta("lab_place")
        if known is None:
            self.be_new(self.make_name())
        elif place != self._place:
            self.is_elsewhere = True
            self.be_new(self.make_name())
            text = "this registry was %r of the lab at another place: here it is a new host, %r"
            log.warning(text, known, self.name, extra=messages.LAB_HOST_NEW(was=known, name=self.name))
        elif self._given is not None and known != self._given:
            self.be_new(self._given)

    def make_name(self) -> str:
        """Return a name that no other host of the lab has; the given one, where there is one."""
        hostname = socket.gethostname().encode()[:_HOSTNAME_MAX_BYTES].decode(errors="ignore") or "host"
        return self._given or f"{hostname}-{str(ulid.ULID())[-8:].lower()}"

    def be_new(self, name: str) -> None:
        """Take another name, and number all changes anew. In a transaction."""
        before = self._store.meta("lab_epoch") or 0
        self._store.set_meta("lab_host", name)
        self._store.set_meta("lab_epoch", max(int(before) + 1, int(self._clock.wall())))
        self._store.set_meta("lab_place", self._place)
        for key in ("lab_session", "lab_revision"):
            self._store.drop_meta(key)


def place_of(database: Path) -> str:
    """Return what tells a database from a copy of it on another machine, in another folder or container."""
    machine = ""
    with suppress(OSError):
        machine = _MACHINE_ID.read_text().strip()
    facts = f"{machine}\n{database}\n{database.stat().st_ino}"
    return hashlib.sha256(facts.encode()).hexdigest()
