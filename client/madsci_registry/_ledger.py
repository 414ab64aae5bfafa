"""What this process holds, and what it has asked for: pure bookkeeping, no socket.

Rules
1. A Grant is one lock: (instance, name, fencing_token). It ends once, for good: released here, or lost.
2. A lost lock never comes back: a grant at or below the highest lost token of its name is born lost, because the loss
   (lifeline) can overtake the grant (reply).
3. A grant that another thread is just releasing is not handed out again: each call under way remembers the highest
   token that was given back meanwhile, and asks again if it is answered with that one.
4. What the daemon says we hold and neither a grant nor a call under way knows of is given back.
5. A lock stays the same Grant when its name or its token changes: renamed, or confirmed by the lab, which may give it a
   higher token. Lines that say so can overtake the reply that grants the lock: while a call asks for a name, the ledger
   remembers which Grant a reply means (`_meant`), and whoever comes first makes it.

Theory of operation
release and close come from atexit, `__del__` and signal handlers, in the middle of any line of this module. So nothing
on their way (end, give_back, drop, find, held) takes a lock: each step is one operation that the interpreter does at
once (a dict's or list's own method), and a Grant ends by whoever is first to put its end into a dict. What replies and
lines do with a lock has to be done as one, and has a lock of its own, under which nobody waits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping

from madsci_registry._grants import Grant, Key, lab_state
from madsci_registry._threads import start_thread
from madsci_registry.types import LockState

log = logging.getLogger("madsci_registry")


class Call:
    """A resolve under way: who asks for which names, and what happened to them meanwhile."""

    def __init__(self, instance: str, names: Iterable[str]) -> None:
        self.seq = 0
        """Its number in the session, 0 before it has one."""
        self.is_open = False
        """True: it was sent, and a lock that it may have been granted is not in the ledger yet."""
        self.instance = instance
        self.names = frozenset(names)
        self.stale: dict[str, int] = {}
        """The highest token of each name that was given back while this call was under way."""

    def asks_for(self, key: Key) -> bool:
        return key.instance == self.instance and key.name in self.names

    def outdate(self, name: str, token: int) -> None:
        self.stale[name] = max(self.stale.get(name, 0), token)


class Ledger:
    """All grants and calls of one session."""

    def __init__(self) -> None:
        self._grants: dict[Key, Grant] = {}
        self._meant: dict[tuple[Key, int], Grant] = {}
        """What a reply that grants this name and token means, for as long as a call asks for the name."""
        self._calls: dict[Call, None] = {}
        self._lost: dict[str, int] = {}
        self._changing = threading.RLock()  # a signal handler may resolve in the middle of it

    # calls

    def begin(self, call: Call) -> None:
        """Note a resolve before it is sent."""
        self._calls[call] = None
        for name in call.names:
            grant = self._grants.get(Key(call.instance, name))
            if grant is not None and not grant.held:
                call.outdate(name, grant.fencing_token)

    def finish(self, call: Call) -> None:
        """Forget a resolve: answered, or given up."""
        self._calls.pop(call, None)
        with self._changing:
            for place, grant in list(self._meant.items()):
                is_over = not grant.held and grant.place == place  # then `stale` and `_lost` know of it
                if call.asks_for(place[0]) and (is_over or not self._is_asked_for(place[0])):
                    del self._meant[place]

    def _is_asked_for(self, key: Key) -> bool:
        return any(call.asks_for(key) for call in list(self._calls))

    @property
    def is_idle(self) -> bool:
        """True: the daemon holds nothing for this process, as far as we know."""
        return not self._grants and not self._calls

    # grants

    def granted(self, call: Call, name: str, token: int, lab: str | None, look: Callable[[], object]) -> Grant | None:
        """Record a reply that grants a lock; None: it was given back meanwhile, ask again.

        Args:
            call: the resolve that is answered.
            name: as it was asked for.
            token: the fencing token of the reply.
            lab: how the lock stood in the lab when the reply was made; what lines say of it counts more.
            look: takes in the lines that came before the reply.
        """
        key = Key(call.instance, name)
        with self._changing:
            grant = self._meaning(key, token, lab)
            known = self.find(grant.key)
            if known is None or known.fencing_token >= grant.fencing_token:
                return self._entered(call, grant)
        look()  # another lock, or the one that is known with a token that has grown: a line has said so
        with self._changing:
            return self._entered(call, self._meaning(key, token, lab))

    def _entered(self, call: Call, grant: Grant) -> Grant | None:
        key, token = grant.place
        if not grant.held or token <= call.stale.get(key.name, 0):
            return None
        if token <= self._lost.get(key.name, 0):
            grant.end("it was ended before the answer came", lost=True)
            return grant
        known = self.find(key)
        if known is not None and known.fencing_token >= token:
            return known  # a later reply, or a line, was quicker
        self._grants[key] = grant
        if known is not None:
            known.end("it was granted anew, with a higher token", lost=True)
        return grant

    def _meaning(self, key: Key, token: int, lab: str | None) -> Grant:
        """Return the grant that is answered with this name and token, wherever it is by now."""
        grant = self._held_at(key, token) or self._meant.get((key, token)) or self._expected_at(key, token)
        grant = self._meant[key, token] = grant or Grant(key, token, lab_state(lab))
        return grant

    def _held_at(self, key: Key, token: int) -> Grant | None:
        grant = self.find(key)
        return grant if grant is not None and grant.fencing_token == token else None

    def _expected_at(self, key: Key, token: int) -> Grant | None:
        """Return the grant that lines have brought to this name and token, before the reply to it has come."""
        return next((grant for grant in list(self._meant.values()) if grant.place == (key, token)), None)

    def held(self, instance: str | None = None) -> list[Grant]:
        """List what is held, by all clients of this process or by one."""
        grants = list(self._grants.values())
        return [g for g in grants if g.held and (instance is None or g.key.instance == instance)]

    def find(self, key: Key) -> Grant | None:
        """Return the grant that is held under this key, None where there is none."""
        grant = self._grants.get(key)
        return grant if grant is not None and grant.held else None

    def give_back(self, grant: Grant) -> bool:
        """End a grant that is about to be released; True for the one caller that shall tell the daemon."""
        if not grant.end("it was released", lost=False):
            return False
        self._outdate(*grant.place)
        return True

    def drop(self, grant: Grant) -> None:
        """Forget an ended grant, once the daemon knows."""
        if self._grants.get(grant.key) is grant:
            self._grants.pop(grant.key, None)

    def _outdate(self, key: Key, token: int) -> None:
        for call in list(self._calls):
            if call.asks_for(key):
                call.outdate(key.name, token)

    # what the daemon says

    def lost(self, key: Key, token: int, reason: str) -> None:
        """The daemon ended a lock."""
        with self._changing:
            self._lost[key.name] = max(self._lost.get(key.name, 0), token)
            grant = self._grants.get(key)
            if grant is not None and grant.fencing_token <= token:
                self.lose(grant, reason)

    def lose(self, grant: Grant, reason: str) -> None:
        """End a grant as lost and tell whoever wants to know."""
        if grant.end(reason, lost=True):
            # Apart: a log that nobody reads may block, and who holds what must not wait for that.
            text = "the lock on %r (fencing token %s) is lost: %s"
            start_thread(log.warning, text, grant.key.name, grant.fencing_token, reason)
        self.drop(grant)

    def tell_all(self, state: LockState) -> None:
        """Tell of a state that all locks which are held are in now."""
        for grant in self.held():
            grant.tell(state)

    def lose_all(self, reason: str) -> None:
        """End all grants as lost: the session is gone."""
        for grant in list(self._grants.values()):
            self.lose(grant, reason)

    def renamed(self, key: Key, old_token: int, to: str, token: int) -> bool:
        """The component of a lock has another name, or the lock another token; False: we do not want it (any more)."""
        with self._changing:
            grant = self._moved(key, old_token, (Key(key.instance, to), token))
            return grant is not None and (grant.held or self._is_asked_for(key))

    def stands(self, key: Key, old_token: int, token: int, lab: str | None) -> bool:
        """A lock stands differently in the lab, its token may have grown; False: we do not want it (any more)."""
        with self._changing:
            grant = self._moved(key, old_token, (key, token))
            if grant is None:
                return False
            if grant.held and (grant.lab != lab_state(lab) or token != old_token):
                grant.lab = lab_state(lab)
                grant.tell_news()
            return grant.held or self._is_asked_for(key)

    def conflicts(self, key: Key, token: int, preferred: str) -> bool:
        """The lab prefers another ULID for what we hold; True: nobody has been told of that yet."""
        with self._changing:
            grant = self._moved(key, token, (key, token))
            if grant is None or not grant.held or grant.preferred_id == preferred:
                return False
            grant.preferred_id = preferred
            grant.tell_news()
            return True

    def _moved(self, key: Key, token: int, place: tuple[Key, int]) -> Grant | None:
        """Bring a grant to another name or token; None: nobody here has it, or asks for that name."""
        # A reply with the new ones may have overtaken the line; one with the old ones may still come.
        grant = self._held_at(key, token) or self._held_at(*place) or self._expected_at(key, token)
        if self._is_asked_for(key):
            grant = self._meant[key, token] = grant or Grant(key, token)
        if grant is not None and grant.held and grant.place != place:
            is_entered = self._grants.get(grant.key) is grant
            if is_entered:
                self._grants.pop(grant.key, None)
            grant.place = place
            if is_entered:
                self._grants[grant.key] = grant
        return grant

    def unknown(self, said: Iterable[tuple[Key, int]]) -> list[tuple[Key, int]]:
        """Say which of the locks that the daemon holds for us nobody here knows of; they are to be given back."""
        strangers = []
        for key, token in said:
            grant = self.find(key)
            if grant is not None and grant.fencing_token == token:
                continue
            if any(call.asks_for(key) for call in list(self._calls)):
                continue  # its reply is on its way, or will be asked for again
            self._outdate(key, token)
            strangers.append((key, token))
        return strangers

    def reconcile(self, said: Iterable[tuple[Key, int]]) -> None:
        """After a resume: lose what the daemon does not say we hold, forget what was released meanwhile."""
        tokens = dict(said)
        for grant in list(self._grants.values()):
            if not grant.held:
                self.drop(grant)
            elif tokens.get(grant.key) != grant.fencing_token:
                self.lose(grant, "the daemon did not hold it any more when the connection was back")

    def stand(self, said: Mapping[tuple[Key, int], str | None]) -> None:
        """After a resume: note how what is held stands in the lab by now."""
        for grant in self.held():
            grant.lab = lab_state(said.get(grant.place))
