"""Which names this host holds in the lab, and what the rules of locks ask of that.

Rules
1. The host holds a name in the lab (a *tenure*, with a term), not a client: hand-overs inside the host ask nobody.
2. A name is ready for a client when the host has its tenure, or when the lab is away and need not be there.
3. While the host has a tenure, fencing tokens are made of its term, also while the lab is away.
4. What was granted without the lab is asked for as soon as the lab is there. A lock ends for the lab's sake only where
   the lab states a higher term that another host was given.
5. A tenure that no client uses or waits for is given back, by its term. One that a client uses is not, not for a
   moment: another host would have the name.
6. A name that breaks today's rules (from a very old registry) stays on its host: the lab is not asked for it.

Theory of operation
Four classes, each on top of the one before: this one has the tenures, answers the rules of locks, and gives back;
`Asking` (lab_asking.py) asks the lab before a request is run; `Confirming` (lab_confirming.py) asks it afterwards for
what was granted without it; `Lab` (lab.py) keeps tenures and lab in step. About a name there is one request at a time
(`is_asking`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from madsci_registry.errors import LabUnavailableError, RegistryError
from madsci_registry.names import name_fault
from madsci_registryd.core import Core
from madsci_registryd.identities import TERM_LIMIT, TOKENS_A_TERM
from madsci_registryd.lab_gateway import Gateway
from madsci_registryd.lab_lanes import Send
from madsci_registryd.lab_link import Link
from madsci_registryd.lab_tier import Found, LabTier, Standing, away
from madsci_registryd.locks import Session
from madsci_registryd.store import Row
from madsci_registryd.tenure import KEPT_S, LOOK_S, REMEMBERED_S, Has, Tenure

SILENCE_S = 3.0
"""How long a request counts as one that the lab did not answer in time: it may have to wait for registry.json first."""
GIVEN_AT_ONCE = 100
"""Names in one request: as many as a process has that ends."""
PROPOSAL_MAX = TERM_LIMIT - (1 << 20) - 1
"""The lab takes none above it, to have a million terms left."""
FACT_MAX_BYTES = 60
"""A holder's facts stand in the lab's feed: it takes 1 KiB of all."""


class Tenures(LabTier):
    """All of them. Belongs to the loop's thread."""

    is_on = True

    def __init__(self, core: Core, link: Link, send: Send, *, require: bool) -> None:
        self._store = core.store
        self._queues = core.queues
        self._service = core.service
        self._registrar = core.registrar
        self._clock = core.clock
        self._timers = core.timers
        self._epoch = core.epoch
        self._link = link
        self._send = send
        self._require = require
        self._tenures: dict[str, Tenure] = {}
        self._moved: set[Tenure] = set()
        """Those with `told_as`."""
        self._renames: list[tuple[str, str]] = []
        """Renames that no tenure has followed yet: something is just being asked about it."""
        self._to_give: dict[str, int] = {}
        """Names to be given back, with their terms."""
        self._is_giving = False
        self._wanted: set[str] = set()
        self._unconfirmed: set[str] = set()
        """Names that are held here and have to be confirmed by the lab."""
        self._later: set[str] = set()
        """The same, but not before the next keepalive: the lab has said no."""
        self._anew: set[str] = set()
        """Of those, the ones that go on with no earlier term: a higher one is asked for."""
        self._to_tell: list[str] = []
        """Names whose holders are to be told how their locks stand."""
        self.contested: dict[str, str] = {}
        """Of those, the ones that another host holds too, and which."""

    def _tenure(self, name: str) -> Tenure:
        return self._tenures.setdefault(name, Tenure(name))

    def _note(self, tenure: Tenure, answer: Found | RegistryError) -> None:
        tenure.answer, tenure.answered_at = answer, self._clock.monotonic()
        self._watch(tenure)

    # what the rules of locks ask

    def ready(self, name: str) -> bool:
        if self.term(name) is not None:
            return self._link.is_confirmed or not self._require
        if name_fault(name) is not None:
            return True
        if self._require:
            return False
        return self._link.is_away or isinstance(self._answer(name), LabUnavailableError)

    def _forget_silence(self) -> None:
        """The lab is back: what it did not answer is asked again."""
        for tenure in self._tenures.values():
            if isinstance(tenure.answer, LabUnavailableError):
                tenure.answer = None

    def _fits(self, name: str, term: int) -> bool:
        """Tell whether the next token of a name can be made of this term."""
        before = self._store.name_row(name)
        return before is None or (before.last_token + 1) // TOKENS_A_TERM <= term

    def _answer(self, name: str) -> Found | RegistryError | None:
        tenure = self._tenures.get(name)
        if tenure is None:
            return None
        is_silence = isinstance(tenure.answer, LabUnavailableError)
        since = self._clock.monotonic() - (SILENCE_S if is_silence else REMEMBERED_S)
        return tenure.answer if tenure.answered_at >= since else None

    def refusal(self, name: str) -> RegistryError | None:
        answer = self._answer(name)
        if isinstance(answer, LabUnavailableError) or self._link.is_away:
            return away(self._link.error or "it is slow") if self._require else None
        return answer if isinstance(answer, RegistryError) else None

    def found(self, name: str) -> Found | None:
        answer = self._answer(name)
        return answer if isinstance(answer, Found) and self._store.by_id(answer.id) is None else None

    def id_for(self, name: str) -> str | None:
        found, tenure = self.found(name), self._tenures.get(name)
        id = found.id if found else tenure.proposed_id if tenure else None
        return id if id is None or self._store.by_id(id) is None else None  # it may have left with its component

    def known(self, name: str) -> Standing | None:
        return "confirmed" if self.found(name) is not None else "unconfirmed"

    def term(self, name: str) -> int | None:
        tenure = self._tenures.get(name)
        return tenure.term if tenure is not None and tenure.has is Has.IT and self._fits(name, tenure.term) else None

    def standing(self, row: Row) -> Standing | None:
        if row.lock is None:
            return None
        tenure = self._tenures.get(row.name)
        if tenure is None or tenure.has is not Has.IT or tenure.told_as is not None:
            return "unconfirmed"
        return "confirmed" if row.lock.lab_term == tenure.term and self._link.is_confirmed else "unconfirmed"

    def granted(self, name: str, term: int | None) -> None:
        tenure = self._tenures.get(name)
        if tenure is not None:
            tenure.kept_until = 0.0
        if term is None:
            self._unconfirmed.add(name)

    # what is said to the lab

    def _who(self) -> dict[str, Any]:
        return {"host": self._link.host.name, "session": self._link.session}

    def _wish(self, name: str, who: Session | None, term: int | None = None) -> dict[str, Any]:
        """Return what the lab is to know of a lock that is asked for."""
        before = self._store.name_row(name)
        highest = (before.last_token if before else 0) // TOKENS_A_TERM
        wish = {"proposal": min(max(self._epoch, highest), PROPOSAL_MAX), "holder": self._facts(who)}
        return wish if term is None else wish | {"term": term}

    def _facts(self, who: Session | None) -> dict[str, Any]:
        """Say who wants a name, for people on other hosts."""
        facts: dict[str, Any] = {"host": _short(self._service.host)}
        if who is not None:
            of = who.process
            facts |= {"pid": of.pid, "uid": of.uid, "gid": of.gid, "proof": of.proof}
            texts = {"user": of.user, "comm": of.comm, "unit": of.unit, "container": of.container, "client": who.client}
            facts |= {key: _short(text) for key, text in texts.items() if text}
        return facts

    # what comes of it

    def _take(self, tenure: Tenure, term: int) -> None:
        """The lab has given this host a name. A lock here that was granted without that is confirmed."""
        tenure.has, tenure.term = Has.IT, term
        self._unconfirmed.discard(tenure.name)
        self.contested.pop(tenure.name, None)
        row = self._store.by_name(tenure.name)
        if row is None or row.lock is None:
            tenure.kept_until = self._clock.monotonic() + KEPT_S
            self._watch(tenure)
        elif row.lock.fencing_token // TOKENS_A_TERM == term or self._fits(tenure.name, term):
            self._anew.discard(tenure.name)
            self._registrar.insist(lambda tx: self._service.confirm_in_lab(tx, tenure.name, term))
        else:  # the token must not go back: a higher term is needed
            self._release(tenure.name, term)
            self._anew.add(tenure.name)
            self._unconfirmed.add(tenure.name)

    def _lose(self, tenure: Tenure, term: int, host: str) -> None:
        """Another host was given the name, with a higher term: whoever holds it here has lost it."""
        name = tenure.name
        tenure.has, tenure.told_as = Has.NOTHING, None
        self._moved.discard(tenure)
        self._watch(tenure)
        row = self._store.by_name(name)
        if row is not None and row.lock is not None and row.lock.fencing_token // TOKENS_A_TERM >= term:
            self._anew.add(name)  # its token is higher by now than what the other one has: it is held twice
            self._unconfirmed.add(name)
            return
        self._unconfirmed.discard(name)
        self.contested.pop(name, None)
        self._registrar.insist(lambda tx: self._service.lose_to_lab(tx, name, term, host))

    def _watch(self, tenure: Tenure, after_s: float = LOOK_S) -> None:
        """Look in a while whether a tenure is to be given back or forgotten."""
        if not tenure.is_watched:
            tenure.is_watched = True

            def due() -> None:
                tenure.is_watched = False
                self._look_at(tenure)

            self._timers.after(after_s, due)

    def _look_at(self, tenure: Tenure) -> None:
        """Give a tenure back that nobody uses, waits for, or has asked for just now; forget one that is over."""
        name, now = tenure.name, self._clock.monotonic()
        row = self._store.by_name(name)
        if self._tenures.get(name) is not tenure or (row is not None and row.lock is not None):
            return  # when its lock ends it is looked at again
        wait_s = tenure.kept_until - now
        is_renamed = any(old == name for old, _ in self._renames)
        if tenure.is_asking or tenure.waiting or is_renamed or self._queues.count(name):
            wait_s = LOOK_S
        elif wait_s <= 0 and tenure.has is Has.IT and self._link.session is not None:
            self._moved.discard(tenure)
            in_lab, tenure.told_as, tenure.has = tenure.told_as or name, None, Has.NOTHING
            self._release(in_lab, tenure.term)
            wait_s = LOOK_S
        elif wait_s <= 0:
            wait_s = tenure.answered_at + REMEMBERED_S - now
        if wait_s > 0:
            self._watch(tenure, wait_s)
        else:
            self._moved.discard(tenure)
            del self._tenures[name]

    def _release(self, name: str, term: int) -> None:
        """Give a name back to the lab, by the name that it has there. What the lab does not hear of that now it asks
        about at the next keepalive."""
        tenure = self._tenure(name)
        tenure.has, tenure.is_asking = Has.NOTHING, True
        self._to_give[name] = term
        self._watch(tenure)
        self._timers.after(0, lambda: None)  # with the next turn

    def _give_some(self) -> None:
        """Give back what is to be given back, one request at a time."""
        if self._is_giving or not self._link.is_up or self._link.session is None:
            return
        some = dict(islice(self._to_give.items(), GIVEN_AT_ONCE))
        for name in some:
            del self._to_give[name]
        self._is_giving = True
        body, within_s = self._who() | {"locks": some}, self._link.within_s

        def call(gateway: Gateway) -> dict[str, Any]:
            return gateway.post("/registry/release", body, within_s=within_s)

        def done(result: dict[str, Any] | RegistryError) -> None:
            self._is_giving = False
            if isinstance(result, LabUnavailableError):
                self._link.failed(result)
            self._given(some)

        self._send("ask", call, done)

    def _given(self, names: Iterable[str]) -> None:
        for name in names:
            tenure = self._tenure(name)
            tenure.is_asking = False
            if name in self._later:
                self._later.discard(name)
                self._unconfirmed.add(name)
            self._watch(tenure)
            self._go_on(tenure)

    def _give_nothing(self) -> None:
        """The lab is away, or its session began without a lock."""
        names, self._to_give = self._to_give, {}
        self._given(names)

    def _go_on(self, tenure: Tenure) -> None:
        """A request about a name has ended: see to who waits."""


def _short(text: str) -> str:
    """Return text as it may stand in a request, cut to a few words."""
    return text.encode(errors="replace")[:FACT_MAX_BYTES].decode(errors="ignore")
