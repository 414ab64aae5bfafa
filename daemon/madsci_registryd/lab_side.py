"""All that a daemon with a lab has for it, put together: threads, session, tenures, forwarder, verbs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from madsci_registryd import holders
from madsci_registryd.core import Core
from madsci_registryd.database import transaction
from madsci_registryd.forwarder import Forwarder
from madsci_registryd.lab import Lab
from madsci_registryd.lab_answers import Mark
from madsci_registryd.lab_conflicts import note_conflict
from madsci_registryd.lab_decisions import Decisions
from madsci_registryd.lab_gateway import Gateway, Pass, read_pass
from madsci_registryd.lab_host import LabHost
from madsci_registryd.lab_lanes import Lanes
from madsci_registryd.lab_link import Link
from madsci_registryd.lab_verbs import LabVerbs
from madsci_registryd.settings import Settings


class LabSide:
    """One daemon's side of its lab, from `open()` to `close()`. Belongs to the loop's thread."""

    def __init__(
        self,
        core: Core,
        settings: Settings,
        database: Path,
        host: str,
        make_lanes: Callable[[Gateway], Lanes] = Lanes,
    ) -> None:
        """Raises: BadConfiguration: the token or the certificates cannot be read."""
        self._core = core
        self._require = settings.lab_require
        self._urls = settings.lab_url
        given = read_pass(settings.lab_token_file) if settings.lab_token_file else Pass("", "")
        self.gateway = Gateway(settings.lab_url, given.token or None, settings.lab_ca_file)
        self.lanes = make_lanes(self.gateway)
        self.host = LabHost(core.store, core.clock, database, given.host or None)
        with transaction(core.db):
            self.host.settle()
        insist, send = core.registrar.insist, self.lanes.send
        self.link = Link(
            core.store, core.clock, core.timers, send, insist, self.host,
            boot=holders.boot_id(), label=host, within_s=settings.lab_deadline_s,
        )  # fmt: skip
        self.tenures = Lab(core, self.link, send, require=settings.lab_require)
        self.forwarder = Forwarder(core, send, self.host, on_away=self.link.failed)
        self.decisions = Decisions(core, send)
        self.verbs = LabVerbs(
            self.link, self.forwarder, send, core.service, core.clock, core.timers, self.status,
            require=settings.lab_require,
        )  # fmt: skip

    def open(self) -> None:
        """Join the parts, and go on with what an earlier daemon held."""
        self.link.listener = self.tenures
        self.tenures.conflict = lambda name, id, preferred: note_conflict(self._core, name, id, preferred)
        self.tenures.on_came = self._came
        self.tenures.on_gone = self._gone
        self.verbs.decided = lambda: self.decisions.look(now=True)
        self.forwarder.delivered.append(self.tenures.delivered)
        self.tenures.open()
        self._core.service.lab = self.tenures
        self._core.handlers.use_lab(self.verbs)

    def start(self) -> None:
        """Begin to talk to the lab."""
        self.lanes.start()
        if self._core.service.no_grants_before:
            self.tenures.doubt()
        self.link.start()

    def _came(self, mark: Mark | None) -> None:
        self.forwarder.begin((mark.epoch, mark.revision) if mark else None)
        self.decisions.look()

    def _gone(self) -> None:
        self.forwarder.pause()
        self.decisions.lost()

    def pump(self) -> None:
        """Go on with what is to be done. For every turn of the loop."""
        self.tenures.pump()
        self.forwarder.pump()

    def status(self) -> dict[str, Any]:
        """Say how the lab is reached, and what it has of this host."""
        confirmed, unconfirmed = self.tenures.counts()
        return {
            "state": self.link.state,
            "url": self.gateway.url,
            "urls": [*self._urls],
            "host": self.host.name,
            "since": self.link.since,
            "error": self.link.error or self.forwarder.error,
            "require": self._require,
            "behind": self.forwarder.behind(),
            "revision": self.forwarder.revision,
            "confirmed": confirmed,
            "unconfirmed": unconfirmed,
            "contested": sorted(self.tenures.contested),
            "conflicts": self._core.store.preferred_count(),
        }

    def degraded(self) -> list[str]:
        """Say what is not as it should be."""
        found = []
        if self.link.is_away:
            how = "names are refused" if self._require else "names are given without it"
            found.append(f"the lab {self._says()}, and {how}: {self.link.error}")
        if self.tenures.contested:
            names = ", ".join(repr(name) for name in sorted(self.tenures.contested)[:5])
            found.append(f"{len(self.tenures.contested)} names are held here and by another host of the lab: {names}")
        return found

    def _says(self) -> str:
        return "refuses this host" if self.link.state == "refused" else "is away"

    def close(self) -> None:
        """Say nothing more to the lab: what is held stays held for the next daemon."""
        self.lanes.stop()
