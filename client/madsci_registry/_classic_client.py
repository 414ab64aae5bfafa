"""What the classic classes ask by and remember: the client of one LocalRegistryManager, and what was resolved.

Theory of operation
A LocalRegistryManager has no close. So its client leaves the session when the manager is collected, unless locks of its
instance live on: those belong to the process, and the session must outlive them. Managers of one instance share its
place in the session, which the last of them gives up.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from madsci_registry import _session
from madsci_registry._arguments import seconds, text
from madsci_registry._ask import Start
from madsci_registry._process import this_process
from madsci_registry.client import RegistryClient
from madsci_registry.errors import ConflictError, UnavailableError, WrongTypeError
from madsci_registry.registration import Registration

log = logging.getLogger("madsci_registry")

T = TypeVar("T")

_TYPE_TRIES = 3
"""A rename may put a component of another type under the name between two tries."""

_clients: dict[int, ClassicClient] = {}
"""Those of managers that are there, by `id`."""


class ClassicClient(RegistryClient):
    """The client of one LocalRegistryManager, for the instance of its LockManager; lives at least as long as it."""

    def __init__(self, registry: str | os.PathLike[str] | None, instance: str, timeout_s: float) -> None:
        """Choose the registry; connect to nothing. Raises as RegistryClient."""
        super().__init__(registry, timeout=timeout_s)
        self.instance = instance

    def serve(self, manager: object) -> None:
        """Be in the session until `manager` is collected; connects to nothing.

        From now on it knows what other managers of the same instance take in this process.
        """
        with _session._sessions_lock:
            _clients[id(self)] = self
            self._shared()
        weakref.finalize(manager, _leave, self).atexit = False

    def resolve_of_any_type(
        self, name: str, component_type: Any, metadata: dict[str, Any] | None, wait_s: float, acquire_lock: bool
    ) -> Registration:
        """As `resolve`; a known name keeps its own type, with a warning. Raises RegistryError."""
        until = time.monotonic() + wait_s
        for _ in range(_TYPE_TRIES):
            try:
                left_s = max(0.0, until - time.monotonic())
                return self.resolve(name, component_type, metadata, wait=left_s, acquire_lock=acquire_lock)
            except WrongTypeError as error:
                log.warning("%s; it stays what it is", error)
                component_type = error.component_type
        raise ConflictError(f"{name!r} changed its component_type again and again", name=name)

    def lookup_to_resolve(self, name: str, wait_s: float) -> str | None:
        """As `lookup`, for who is about to resolve: waits as long, and may make the registry."""
        body = {"op": "lookup", "name": text(name, "name")}
        id: str | None = self._shared().read(body, self.timeout + wait_s, self._start(Start.MAKE))["id"]
        return id

    def read_or(self, nothing: T, read: Callable[[], T]) -> T:
        """Return what `read` reads; `nothing` where there is no registry yet: then nothing is in it, for sure."""
        try:
            return read()
        except UnavailableError:
            if self._is_new():
                return nothing
            raise

    def _is_new(self) -> bool:
        endpoint = self.endpoint
        if endpoint.registry is None or endpoint.socket_is_given or endpoint.is_system:
            return False
        try:
            return not endpoint.exists()
        except OSError:
            return False


def _leave(client: ClassicClient) -> None:
    """Leave the session, unless somebody of the same instance is there or holds something. Works from finalizers."""
    # At interpreter shutdown whoever has the lock may never run again.
    has_lock = _session._sessions_lock.acquire(timeout=_session.FINAL_S)
    try:
        _clients.pop(id(client), None)
        session = client._session
        if client._closed or session is None or session.closed or session.process != this_process():
            return
        others = [c for c in list(_clients.values()) if c._session is session and c.instance == client.instance]
        if not others and not session.ledger.held(client.instance):
            _session.detach(session, client.instance)
    finally:
        if has_lock:
            _session._sessions_lock.release()


class Taken:
    """The locks that one object has resolved, by the name that it asked for. Threads share it; takes no lock.

    A name stays in it when its lock was released: who releases it once more must not free what another object of the
    same holder has taken since.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, list[Registration]] = {}

    def add(self, name: str, registration: Registration) -> None:
        """Remember one more, and forget those of that name that can release nothing any more."""
        mine = self._by_name.setdefault(name, [])
        # Two threads may come here in another order than they were granted: the newest is not always the last.
        mine.append(registration)
        for other in list(mine):
            if other is not registration and not other._may_release:
                try:
                    mine.remove(other)
                except ValueError:
                    pass  # another thread was quicker

    def all(self, name: str) -> list[Registration]:
        """Return those that were asked for under a name; none: it was not."""
        return list(self._by_name.get(name, ()))

    def called(self, name: str) -> list[Registration]:
        """Return those of a name that are still called so; where none is, those that were renamed."""
        mine = self.all(name)
        return [r for r in mine if r.name == name] or mine

    def names(self) -> list[str]:
        return list(self._by_name)


def wait_seconds(retry_timeout: object) -> float:
    """Return how many seconds a resolve waits; below 0 is 0, as in MADSci. Raises InvalidError."""
    if retry_timeout is None or (isinstance(retry_timeout, (int, float)) and retry_timeout < 0):
        return 0.0
    return seconds(retry_timeout, "retry_timeout", least=0)
