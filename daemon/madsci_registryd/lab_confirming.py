"""Has the lab confirm what is held here without it: granted while it was away, or in a session that has ended.

Many names go in one request, and one request is under way at a time. What the lab says no to is asked for again with
the next keepalive; where it cannot read a request, half of the names are asked for, until it is known which one it is.
"""

from __future__ import annotations

import logging
from itertools import islice
from typing import Any

from madsci_registry.errors import (
    InvalidError,
    LabUnavailableError,
    NotFoundError,
    RegistryError,
    SessionRequiredError,
    TooLargeError,
)
from madsci_registry.names import name_fault
from madsci_registryd import lab_answers as a
from madsci_registryd import messages
from madsci_registryd.core import Core
from madsci_registryd.identities import TOKENS_A_TERM
from madsci_registryd.lab_asking import Asking
from madsci_registryd.lab_gateway import Gateway
from madsci_registryd.lab_lanes import Send
from madsci_registryd.lab_link import Link
from madsci_registryd.locks import Presence
from madsci_registryd.tenure import Tenure

log = logging.getLogger(__name__)

CONFIRMED_AT_ONCE = 100
"""Names in one request: some 50 KiB, and some milliseconds of the loop when the answer comes."""
CONFIRM_WITHIN_S = 10.0
"""How long the lab may take for them: each is a write to its disk, and nobody waits for it."""


class Confirming(Asking):
    """Belongs to the loop's thread."""

    def __init__(self, core: Core, link: Link, send: Send, *, require: bool) -> None:
        super().__init__(core, link, send, require=require)
        self._unheard: set[str] = set()
        """Unconfirmed names of which the lab has to hear first."""
        self._confirming: dict[str, dict[str, Any]] = {}
        """Names of the request under way, and what it says of them."""
        self._at_once = CONFIRMED_AT_ONCE

    def _confirm_some(self) -> None:
        """Ask the lab for names that are held here already."""
        for name in list(islice(self._unconfirmed, self._at_once)):
            self._unconfirmed.discard(name)
            row, tenure = self._store.by_name(name), self._tenure(name)
            self._watch(tenure)
            if row is None or row.lock is None or name_fault(name) is not None:
                continue
            who = self._service.session(row.lock.owner.session)
            # A copy has the records of processes that live and are another registry's clients: who comes here, counts.
            is_ours = who is not None and (who.presence is Presence.ATTACHED or not self._link.host.is_elsewhere)
            if tenure.is_asking or tenure.told_as is not None or not is_ours:
                self._later.add(name)
                continue
            term = None if name in self._anew else row.lock.lab_term
            self._confirming[name] = {"name": name, **self._wish(name, who, term)}
            tenure.is_asking = True
        if not self._confirming:
            return
        body = self._who() | {"locks": [*self._confirming.values()]}

        def call(gateway: Gateway) -> a.Locked:
            return a.read(a.Locked, gateway.post("/registry/lock", body, within_s=CONFIRM_WITHIN_S))

        self._send("ask", call, lambda result: self._confirmed(body["session"], result))

    def _confirmed(self, session: str, result: a.Locked | RegistryError) -> None:
        wishes, self._confirming = self._confirming, {}
        answers: dict[str, a.Lock | a.Refused] = {}
        again = self._later
        if isinstance(result, LabUnavailableError):
            self._link.failed(result)
        elif isinstance(result, (InvalidError, TooLargeError)) and len(wishes) > 1:
            self._at_once = max(len(wishes) // 2, 1)  # find out which of them it is
            again = self._unconfirmed
        elif isinstance(result, a.Locked) and session == self._link.session:
            self._link.heard()
            self._at_once = min(2 * self._at_once, CONFIRMED_AT_ONCE)
            answers = {answer.name: answer for answer in result.locks}
        for name, wish in wishes.items():
            tenure, answer = self._tenure(name), answers.get(name)
            tenure.is_asking = False
            if isinstance(answer, a.Lock):
                self._take(tenure, answer.term)
            elif answer is None:
                again.add(name)
            else:
                self._not_confirmed(tenure, wish.get("term"), a.refusal_of(answer.error))
            self._go_on(tenure)
        if isinstance(result, SessionRequiredError) and session == self._link.session:
            self._link.end_session()

    def _not_confirmed(self, tenure: Tenure, term: int | None, error: RegistryError | None) -> None:
        """The lab has said no to a lock that a client of this host has."""
        name, row = tenure.name, self._store.by_name(tenure.name)
        if row is None or row.lock is None:
            return
        ours = term if term is not None else row.lock.fencing_token // TOKENS_A_TERM
        if isinstance(error, (a.HeldInLabError, a.GivenAwayError)):
            is_anothers = error.host not in (None, self._link.host.name)
            if is_anothers and error.term > ours:
                self._lose(tenure, error.term, str(error.host))
                return
            if isinstance(error, a.GivenAwayError) and name not in self._anew:
                self._anew.add(name)
                self._unconfirmed.add(name)
                return
            if is_anothers and self.contested.get(name) != error.host:
                self.contested[name] = str(error.host)
                text, extra = "%r is held here without the lab, and by %s", messages.HELD_IN_LAB_TOO
                log.error(text, name, error.host, extra=extra(name=name, host=error.host))
        (self._unheard if isinstance(error, NotFoundError) else self._later).add(name)
