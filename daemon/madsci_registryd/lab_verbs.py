"""The verbs that the lab answers, by way of this daemon: lookups of unknown names, conflicts, and when it has all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from madsci_registry import protocol as p
from madsci_registry.errors import (
    InternalError,
    LabUnavailableError,
    NotFoundError,
    PermissionDeniedError,
    RegistryError,
)
from madsci_registry.names import name_fault
from madsci_registryd import lab_answers as a
from madsci_registryd.clock import Clock, Timers
from madsci_registryd.forwarder import Forwarder
from madsci_registryd.identities import Identities
from madsci_registryd.lab_gateway import Gateway
from madsci_registryd.lab_lanes import Send
from madsci_registryd.lab_link import Link
from madsci_registryd.lab_tier import Answer, NoLabVerbs, away
from madsci_registryd.locks import Session

LOOK_S = 0.05


class LabVerbs(NoLabVerbs):
    """Belongs to the loop's thread."""

    is_on = True
    decided: Callable[[], None] = staticmethod(lambda: None)
    """Called when the lab was told to decide something."""

    def __init__(
        self,
        link: Link,
        forwarder: Forwarder,
        send: Send,
        service: Identities,
        clock: Clock,
        timers: Timers,
        status: Callable[[], dict[str, Any]],
        *,
        require: bool,
    ) -> None:
        self._link = link
        self._forwarder = forwarder
        self._send = send
        self._service = service
        self._clock = clock
        self._timers = timers
        self.status = status  # type: ignore[method-assign]
        self._require = require

    def lookup(self, name: str, answer: Answer) -> None:
        def done(result: dict[str, Any] | RegistryError) -> None:
            if isinstance(result, NotFoundError):
                answer({"ok": {"id": None}})
            elif isinstance(result, (LabUnavailableError, PermissionDeniedError)):
                self._without(result.message, answer)
            elif isinstance(result, RegistryError):
                answer({"error": result.to_wire()})
            else:
                answer({"ok": {"id": result["id"]}})

        if name_fault(name) is not None:  # such a name stays on its host
            answer({"ok": {"id": None}})
            return
        if self._link.is_away:
            self._without(self._link.error, answer)
            return

        def call(gateway: Gateway) -> dict[str, Any]:
            body = {"name": name}
            entry = a.read(a.Entry, gateway.post("/registry/lookup", body, within_s=self._link.within_s))
            return {"id": entry.id if entry.name == name else None}

        self._ask(call, done)

    def _without(self, why: str, answer: Answer) -> None:
        """The lab is away: this host's word alone, if that will do."""
        answer({"error": away(why).to_wire()} if self._require else {"ok": {"id": None}})

    def conflicts(self, who: Session, r: p.LabConflicts, answer: Answer) -> None:
        body = {"decided": r.decided} | ({"after": list(r.after)} if r.after is not None else {})
        self._relay("/registry/conflicts", body, a.Conflicts, answer)

    def merge(self, who: Session, r: p.LabMerge, answer: Answer) -> None:
        self._service.need_admin(who, "decide a conflict of the lab")
        body = {"host": self._link.host.name, "name": r.name, "prefer": r.prefer}

        def answered(reply: dict[str, Any]) -> None:
            self.decided()
            answer(reply)

        self._relay("/registry/merge", body, a.Merged, answered)

    def _relay(self, route: str, body: dict[str, Any], model: type[a.Relayed], answer: Answer) -> None:
        """Ask the lab for somebody, and hand its answer on."""

        def call(gateway: Gateway) -> dict[str, Any]:
            return a.read(model, gateway.post(route, body, within_s=self._link.within_s)).handed_on()

        def done(result: dict[str, Any] | RegistryError) -> None:
            answer({"error": result.to_wire()} if isinstance(result, RegistryError) else {"ok": result})

        self._ask(call, done)

    def _ask(self, call: Callable[[Gateway], Any], done: Callable[[Any], None]) -> None:
        """Make a call to the lab; nobody waits for longer than for any other."""
        over: list[bool] = []

        def first(result: Any) -> None:
            if not over:
                over.append(True)
                done(result)

        def answered(result: Any) -> None:
            if isinstance(result, (LabUnavailableError, InternalError)):
                self._link.failed(result)  # a fault of ours says nothing of the lab
                first(LabUnavailableError(result.message))
            else:
                self._link.heard()
                first(result)

        self._send("ask", call, answered)
        late = LabUnavailableError(f"the lab did not answer within {self._link.within_s:g} s")
        self._timers.after(self._link.within_s, lambda: first(late))

    def sync(self, who: Session, r: p.LabSync, answer: Answer) -> None:
        until = self._clock.monotonic() + r.wait_s
        self._forwarder.wake()

        def look() -> None:
            behind = self._forwarder.behind()
            if behind and self._clock.monotonic() < until:
                self._timers.after(LOOK_S, look)
            else:
                answer({"ok": {"behind": behind, "lab": self.status()}})

        look()
