"""What this process holds, and what it has asked for: pure bookkeeping, no socket.

Rules
1. A Grant is one lock: (instance, name, fencing_token). It ends once: released here, or lost.
2. A lost lock never comes back: a grant at or below the highest lost token of its name is born lost, because the loss
   (lifeline) can overtake the grant (reply).
3. A grant that another thread is just releasing is not handed out again: each call under way remembers the highest
   token that was given back meanwhile, and asks again if it is answered with that one.
4. What the daemon says we hold and neither a grant nor a call under way knows of is given back.

Theory of operation
release and close come from atexit, `__del__` and signal handlers, in the middle of any line of this module. So nothing
here takes a lock: each step is one operation that the interpreter does at once (a dict's or list's own method), and a
Grant ends by whoever pops the only element of a list. `Grant.nest` alone has a lock; finalizers do not come there.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any, NamedTuple

log = logging.getLogger("madsci_registry")


class Key(NamedTuple):
    """Who asks for what: a RegistryClient of this process and a name."""

    instance: str
    name: str


class Grant:
    """One lock that was granted to this process. Threads share it."""

    def __init__(self, key: Key, fencing_token: int) -> None:
        self.place = (key, fencing_token)
        """Changed as one when the component is renamed."""
        self.by_hold = False
        self.end_reason = ""
        self.was_lost = False
        self._live = [True]
        self._callbacks: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._nest = 0
        self._nest_lock = threading.Lock()

    @property
    def held(self) -> bool:
        return bool(self._live)

    @property
    def key(self) -> Key:
        return self.place[0]

    @property
    def fencing_token(self) -> int:
        return self.place[1]

    def end(self, reason: str, *, lost: bool) -> bool:
        """End the grant; True for the one caller that did."""
        try:
            self._live.pop()
        except IndexError:
            return False
        self.end_reason = reason
        self.was_lost = lost
        if lost:
            self._call_back()
        return True

    def on_lost(self, callback: Callable[[Any], None], registration: Any) -> None:
        """Have `callback(registration)` called once when the lock is lost, now if it is already."""
        _callbacks.start()
        self._callbacks.append((callback, registration))
        if self.was_lost:
            self._call_back()

    def _call_back(self) -> None:
        while True:
            try:
                callback, registration = self._callbacks.popleft()
            except IndexError:
                return
            _callbacks.put(callback, registration)

    def enter(self) -> bool:
        """Count one more `hold`; False where the grant has ended."""
        with self._nest_lock:
            if not self.held:
                return False
            self._nest += 1
            return True

    def leave(self, release: Callable[[], object]) -> None:
        """Count one `hold` less, and release after the last one if a hold was what took the lock."""
        with self._nest_lock:
            self._nest -= 1
            is_last = self._nest == 0 and self.by_hold
            if is_last:
                release()


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
        self.renamed: dict[tuple[str, int], tuple[str, int]] = {}
        """(name, token) of a grant whose reply is still on its way: what it is called now."""

    def asks_for(self, key: Key) -> bool:
        return key.instance == self.instance and key.name in self.names

    def outdate(self, name: str, token: int) -> None:
        self.stale[name] = max(self.stale.get(name, 0), token)


class Ledger:
    """All grants and calls of one session."""

    def __init__(self) -> None:
        self._grants: dict[Key, Grant] = {}
        self._calls: dict[Call, None] = {}
        self._lost: dict[str, int] = {}

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

    @property
    def is_idle(self) -> bool:
        """True: the daemon holds nothing for this process, as far as we know."""
        return not self._grants and not self._calls

    # grants

    def granted(self, call: Call, name: str, token: int) -> Grant | None:
        """Record a reply that grants a lock; None: it was given back meanwhile, ask again."""
        name, token = call.renamed.pop((name, token), (name, token))
        if token <= call.stale.get(name, 0):
            return None
        key = Key(call.instance, name)
        known = self._grants.get(key)
        if known is not None and known.fencing_token == token:
            return known if known.held else None
        grant = Grant(key, token)
        if token <= self._lost.get(name, 0):
            grant.end("it was ended before the answer came", lost=True)
            return grant
        self._grants[key] = grant
        if known is not None:
            known.end("it was granted anew, with a higher token", lost=True)
        return grant

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
        self._lost[key.name] = max(self._lost.get(key.name, 0), token)
        grant = self._grants.get(key)
        if grant is not None and grant.fencing_token <= token:
            self.lose(grant, reason)

    def lose(self, grant: Grant, reason: str) -> None:
        """End a grant as lost and tell whoever wants to know."""
        if grant.end(reason, lost=True):
            log.warning("the lock on %r (fencing token %s) is lost: %s", grant.key.name, grant.fencing_token, reason)
        self.drop(grant)

    def lose_all(self, reason: str) -> None:
        """End all grants as lost: the session is gone."""
        for grant in list(self._grants.values()):
            self.lose(grant, reason)

    def renamed(self, key: Key, old_token: int, to: str, token: int) -> bool:
        """The component of a lock has another name now; False: we do not want that lock (any more)."""
        grant = self._grants.get(key)
        if grant is not None and grant.fencing_token == old_token and grant.held:
            self._grants.pop(key, None)
            grant.place = (Key(key.instance, to), token)
            self._grants[grant.key] = grant
            return grant.held
        calls = [call for call in list(self._calls) if call.asks_for(key)]
        for call in calls:
            call.renamed[key.name, old_token] = (to, token)
        return bool(calls)

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


class _Callbacks:
    """The one thread that runs callbacks, so that none runs in a thread that has to read on."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Callable[[Any], None], Any]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="madsci-registry-callbacks", daemon=True)
                self._thread.start()

    def put(self, callback: Callable[[Any], None], registration: Any) -> None:
        self._queue.put((callback, registration))

    def _run(self) -> None:
        while True:
            callback, registration = self._queue.get()
            try:
                callback(registration)
            except Exception:  # the outer loop of this thread: a callback's fault is its author's
                log.exception("a callback for a lost lock raised")


_callbacks = _Callbacks()


def forget_parent() -> None:
    """Let a forked child start a callback thread of its own."""
    global _callbacks
    _callbacks = _Callbacks()
