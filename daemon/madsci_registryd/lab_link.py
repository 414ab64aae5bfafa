"""This host's session in the lab: one keepalive for all that it holds there, and whether the lab is there at all.

Rules
- A lock is confirmed as long as the lab has heard this host within the lease: counted from when the keepalive that was
  answered last was *sent*, by a clock that goes on while the machine sleeps.
- Nobody waits twice for a lab that is away: once it is found away, it is away until a keepalive is answered again.
- A daemon that was restarted goes on with its session. Another boot, or a copy of the registry's files, cannot.

Theory of operation
One exchange at a time is under way: a registration where there is no session, else a keepalive. Where none is answered,
the next ones follow at growing random intervals, never longer than between two keepalives. They begin short again when
two keepalives in a row were answered, and nobody found the lab away in between: a lab that answers keepalives alone is
not asked in haste.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

from madsci_registry.errors import (
    ConflictError,
    InternalError,
    LabUnavailableError,
    RegistryError,
    SessionRequiredError,
)
from madsci_registryd import lab_answers as a
from madsci_registryd import messages
from madsci_registryd.backoff import Backoff
from madsci_registryd.clock import Clock, Timers, iso
from madsci_registryd.lab_gateway import Gateway
from madsci_registryd.lab_host import LabHost
from madsci_registryd.lab_lanes import Send
from madsci_registryd.store import Store
from madsci_registryd.transaction import Tx

log = logging.getLogger(__name__)

State = Literal["connecting", "up", "away", "refused"]
KEEPALIVE_S = 5.0
"""Until the lab has said its lease, of which it is a third."""
REFUSED_S = 30.0
"""A lab that refuses us is asked again, at most so seldom: its token file may be mended."""
AGAIN_S = 1.0
"""How long after a registration the next one follows at the earliest: a lab may forget each session at once."""
COPY_S = 35.0
"""Longer than two leases: a session of ours from before a reboot has ended by then, though the lab was started anew
meanwhile; one that lives on is a copy's."""


class Listener(Protocol):
    """Who follows the link. Called on the loop's thread."""

    def holds(self) -> dict[str, int]:
        """Return the names that this host holds in the lab, with their terms."""

    def began(self) -> None:
        """A new session has begun, without any lock."""

    def kept(self, said: a.Kept, stated: dict[str, int]) -> None:
        """A keepalive that stated this was answered."""

    def came(self, mark: a.Mark | None) -> None:
        """The lab is there; how far it has our changes."""

    def gone(self) -> None:
        """The lab is away."""


class Link:
    """The session. Belongs to the loop's thread."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        timers: Timers,
        send: Send,
        insist: Callable[[Callable[[Tx], Any]], None],
        host: LabHost,
        *,
        boot: str,
        label: str,
        within_s: float,
    ) -> None:
        self._store = store
        self._clock = clock
        self._timers = timers
        self._send = send
        self._insist = insist
        self.host = host
        self._boot = boot
        self._label = label
        self.within_s = within_s
        """How long a request to the lab, or for one, may take."""
        self._backoff = Backoff(KEEPALIVE_S)
        self._keepalive_s = KEEPALIVE_S
        self.listener: Listener
        self.state: State = "connecting"
        self.since = iso(clock.wall())
        self.error = ""
        self.session: str | None = store.meta("lab_session")
        self._lives_until = 0.0
        """By the clock that counts sleep: until when what we hold is ours for sure."""
        self.heard_at = 0.0
        """Monotonic: when the lab answered last, whatever it was asked."""
        self._is_asking = False
        self._must_ask = False
        self._next = 0
        """Which of the timers for the next exchange counts: the last one."""
        self._copy_since: float | None = None
        self._registered_at = -math.inf

    @property
    def is_up(self) -> bool:
        return self.state == "up"

    @property
    def is_away(self) -> bool:
        """Nobody shall wait for the lab."""
        return self.state in ("away", "refused")

    @property
    def is_confirmed(self) -> bool:
        """What this host holds in the lab nobody else can have been given."""
        return self.session is not None and self._clock.boottime() < self._lives_until

    def start(self) -> None:
        """Begin to keep the session, a new one if there is none."""
        self._exchange()

    def ask_now(self) -> None:
        """Send a keepalive now: what it states has changed."""
        if self._is_asking:
            self._must_ask = True
        else:
            self._exchange()

    def heard(self) -> None:
        """The lab has answered something."""
        self.heard_at = self._clock.monotonic()

    def failed(self, error: RegistryError) -> None:
        """The lab did not answer somebody, or does not let us in: it is away until it answers a keepalive. (An answer
        that cannot be used, and a fault of ours, say nothing of the lab.)"""
        if self.is_away or isinstance(error, (a.UselessAnswerError, InternalError)):
            return
        self._be_away(error)
        if not self._is_asking:
            self._after(self._backoff.next_s())

    def _be_away(self, error: RegistryError) -> None:
        was_away = self.is_away
        self._turn("away", error.message)
        if not was_away:
            self.listener.gone()

    def end_session(self) -> None:
        """The lab does not know our session any more: begin a new one."""
        if self.session is not None:
            self.session = None
            self.ask_now()

    # the exchange

    def _after(self, delay_s: float) -> None:
        self._next += 1
        number = self._next
        self._timers.after(delay_s, lambda: self._exchange() if number == self._next else None)

    def _exchange(self) -> None:
        if self._is_asking:
            return
        wait_s = self._registered_at + AGAIN_S - self._clock.monotonic()
        if self.session is None and wait_s > 0:
            self._after(wait_s)
            return
        self._is_asking, self._must_ask = True, False
        sent_at = self._clock.boottime()
        who: dict[str, Any] = {"host": self.host.name, "boot": self._boot}
        if self.session is None:
            self._post(
                "/registry/hosts/register", who | {"label": self._label}, a.Registered, self._registered, sent_at
            )
            return
        stated = self.listener.holds()

        def kept(said: a.Kept, sent_at: float) -> None:
            self._kept(said, stated, sent_at)

        body = who | {"session": self.session, "holds": stated}
        self._post("/registry/hosts/keepalive", body, a.Kept, kept, sent_at)

    def _post(
        self, route: str, body: dict[str, Any], model: Any, then: Callable[[Any, float], None], at: float
    ) -> None:
        within_s = min(self.within_s, self._keepalive_s)  # a lost one must not cost the lease

        def call(gateway: Gateway) -> Any:
            return a.read(model, gateway.post(route, body, within_s=within_s))

        def done(result: Any) -> None:
            self._is_asking = False
            if isinstance(result, RegistryError):
                self._refused(result)
            else:
                self.heard()
                then(result, at)

        self._send("keep", call, done)

    def _registered(self, said: a.Registered, sent_at: float) -> None:
        self.session, self._registered_at = said.session, self._clock.monotonic()
        self._copy_since = None
        self._insist(lambda tx: self._store.set_meta("lab_session", said.session))
        self._note_lease(said.lease_s, sent_at)
        self.listener.began()
        self._came(said.mark)

    def _kept(self, said: a.Kept, stated: dict[str, int], sent_at: float) -> None:
        self._note_lease(said.lease_s, sent_at)
        self.listener.kept(said, stated)
        self._came(said.mark)

    def _note_lease(self, lease_s: float, sent_at: float) -> None:
        self._lives_until = sent_at + lease_s
        self._timers.after(self._lives_until - self._clock.boottime(), lambda: None)  # holders are told then, not later
        if self._keepalive_s != lease_s / 3:
            self._keepalive_s = lease_s / 3
            self._backoff = Backoff(self._keepalive_s)

    def _came(self, mark: a.Mark | None) -> None:
        self._after(0.0 if self._must_ask else self._keepalive_s)
        if self.is_up:
            self._backoff.reset()
        else:
            self._turn("up", "")
        self.listener.came(mark)

    def _refused(self, error: RegistryError) -> None:
        if isinstance(error, SessionRequiredError) and self.session is not None:
            self.session = None
            self._exchange()
        elif isinstance(error, (LabUnavailableError, InternalError)):
            self._copy_since = None  # whether another one lives by our name is not known for all that time
            self._be_away(error)
            self._after(self._backoff.next_s())
        elif isinstance(error, ConflictError) and self._is_copied():
            self._after(0.0)  # the new name is written by then
        else:
            if not self.is_away:
                self.listener.gone()
            self._turn("refused", error.message)
            self._after(min(REFUSED_S, self._keepalive_s if isinstance(error, ConflictError) else REFUSED_S))

    def _is_copied(self) -> bool:
        """Another one lives in the lab by our name: be a new host where it lives on, and the name is ours to choose."""
        now = self._clock.monotonic()
        if self._copy_since is None:
            self._copy_since = now
        if now - self._copy_since < COPY_S or self.host.is_given:
            return False
        self._copy_since = None
        was, name = self.host.name, self.host.make_name()
        text = "another host of the lab goes by the name %r, with a copy of this registry: this one is %r now"
        log.warning(text, was, name, extra=messages.LAB_HOST_NEW(was=was, name=name))

        def be_new(tx: Tx) -> None:
            tx.durable = True
            self.host.be_new(name)

        self._insist(be_new)
        return True

    def _turn(self, state: State, error: str) -> None:
        if (state, error) != (self.state, self.error):
            if state != self.state:
                self.since = iso(self._clock.wall())
            text, extra = _SAID[state]
            if state != self.state or state == "refused":
                log.log(logging.INFO if state == "up" else logging.WARNING, text, error, extra=extra(error=error))
        self.state, self.error = state, error


_SAID: dict[State, Any] = {
    "up": ("the lab is there%s", messages.LAB_UP),
    "away": ("the lab is away, going on without it: %s", messages.LAB_AWAY),
    "refused": ("the lab refuses this host, going on without it: %s", messages.LAB_REFUSED),
}
