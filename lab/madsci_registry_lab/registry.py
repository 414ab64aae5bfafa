"""A lab registry: its store, its router, and the thread that ends the sessions of silent hosts."""

from __future__ import annotations

import logging
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Response

from madsci_registry.errors import RegistryError
from madsci_registry_lab.clock import Clock, SystemClock, iso
from madsci_registry_lab.etcd_access import NO_FILES, EtcdFiles, parse
from madsci_registry_lab.faults import BAD_CONFIGURATION, Fault
from madsci_registry_lab.feed import Feed
from madsci_registry_lab.gate import Gate
from madsci_registry_lab.legacy import Legacy
from madsci_registry_lab.metrics import CONTENT_TYPE, Metrics
from madsci_registry_lab.routes import LEASE_S, add_routes
from madsci_registry_lab.sqlite_store import SqliteStore
from madsci_registry_lab.store import LabStore
from madsci_registry_lab.tokens import TokenFile

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often silent hosts are looked for."""
API_VERSION = 1
"""Of the lab's own routes."""


class LabRegistry:
    """What serves a lab: `router` goes into any FastAPI application, of one process. `close` ends it."""

    def __init__(
        self,
        store: str = "sqlite:.madsci/lab.db",
        *,
        etcd: EtcdFiles = NO_FILES,
        token_file: Path | str | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Open the store and begin to serve.

        Args:
            store: `sqlite:PATH`, whose folder is made, or `etcd://HOST:PORT,HOST:PORT,...`.
            etcd: what etcd asks for.
            token_file: lines `host token`, read again when it changes; None: whoever reaches the application may do
                all.
            clock: for tests.

        Raises:
            Fault: with the exit status that says why.
        """
        self._clock = clock or SystemClock()
        self.version = version("madsci-registryd")
        self._tokens = TokenFile(Path(token_file)) if token_file is not None else None
        self.store: LabStore = open_store(store, self._clock, etcd)
        self.failed = ""
        """Why the store answers no more, for good or until a new start; empty: it does."""
        self.feed = Feed(self.store)
        self._gate = Gate(self._tokens)
        self._metrics = Metrics(self.store, self.feed, self._gate, self.version)
        self.router = self._make_router()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="lab-leases", daemon=True)
        self._thread.start()

    def app(self, *, only_loopback: bool = False) -> FastAPI:
        """Return an application of the router alone, with `/health` and `/metrics` as MADSci's managers have them.

        `only_loopback`: it has no tokens, and listens on loopback addresses for that reason.
        """
        self._gate.only_loopback = only_loopback
        app = FastAPI(title="MADSci lab registry", version=self.version)
        app.include_router(self.router)
        outer = self._gate.router()
        outer.add_api_route("/health", self.health, methods=["GET"], tags=["open"])
        outer.add_api_route("/metrics", self.metrics, methods=["GET"], response_class=Response)
        app.include_router(outer)
        return app

    def close(self) -> None:
        """Answer who waits, and close the store; locks stay for the next start."""
        self.feed.end()
        self._over.set()
        self._thread.join()
        self.store.close()

    def health(self) -> dict[str, Any]:
        """Say whether all is well, in the shape of MADSci's ManagerHealth."""
        if self.failed:
            return {"healthy": False, "description": self.failed, "version": self.version}
        try:
            about = self.store.about()
        except RegistryError as error:
            return {"healthy": False, "description": error.message, "version": self.version}
        text = f"{about.names} names, {about.locks} held by {about.sessions} hosts, {about.conflicts} conflicts"
        return {"healthy": True, "description": text, "version": self.version}

    def identify(self) -> dict[str, Any]:
        """Say that this is a lab registry, and how it is."""
        health = self.health()
        told = {"service": "madsci-registry-lab", "api_version": API_VERSION, "lease_s": LEASE_S, **health}
        if health["healthy"]:
            about = self.store.about()
            told |= {"epoch": about.epoch, "cursor": about.cursor}
        return told

    def metrics(self) -> Response:
        """Return the metrics, in Prometheus' text format."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    def _make_router(self) -> APIRouter:
        router = self._gate.router("/registry")
        router.add_api_route("/health", self.identify, methods=["GET"], tags=["open"])
        router.add_api_route("/metrics", self.metrics, methods=["GET"], response_class=Response)
        add_routes(router, self.store, self.feed, self._now)
        Legacy(self.store, self._now).add_to(router)
        return router

    def _now(self) -> str:
        return iso(self._clock.wall())

    def _look(self) -> None:
        trouble = ""
        while not self._over.wait(LOOK_S):
            try:
                if self._tokens is not None:
                    self._tokens.look()
                self.store.expire()
                trouble = ""
            except RegistryError as error:  # hosts keep their leases meanwhile
                if error.message != trouble:
                    log.error("silent hosts cannot be looked for: %s", error.message)  # noqa: TRY400 - no fault of ours
                trouble = error.message
            except Exception as error:
                log.exception("silent hosts are not looked for any more")
                self.failed = f"a fault: {error!r}"
                return
            self.failed = self.store.broken


def open_store(url: str, clock: Clock, etcd: EtcdFiles = NO_FILES) -> LabStore:
    """Open the store that a setting names. Raises Fault."""
    kind, _, rest = url.partition(":")
    if kind == "etcd":
        from madsci_registry_lab.etcd_store import EtcdStore  # with what it needs, only where it is used

        return EtcdStore(parse(url, etcd), clock)
    if kind != "sqlite" or not rest:
        raise Fault(BAD_CONFIGURATION, f"store: must be sqlite:PATH or etcd://HOST:PORT,... (it is {url!r})")
    return SqliteStore(Path(rest), clock)
