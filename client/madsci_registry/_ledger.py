"""What this process holds, and what it has asked for: pure bookkeeping, no socket.

Rules
1. A Grant is one lock: (instance, name, fencing_token). It ends once, for good: released here, or lost.
2. A lost lock never comes back: a grant at or below the highest lost token of its name is born lost, because the loss
   (lifeline) can overtake the grant (reply).
3. A grant that another thread is just releasing is not handed out again: each call under way remembers the highest
   token that was given back meanwhile, and asks again if it is answered with that one.
4. What the daemon says we hold and neither a grant nor a call under way knows of is given back.

Theory of operation
release and close come from atexit, `__del__` and signal handlers, in the middle of any line of this module. So nothing
here takes a lock: each step is one operation that the interpreter does at once (a dict's or list's own method), and a
Grant ends by whoever is first to put its end into a dict. `Grant.enter` and `leave` alone have a lock; finalizers do
not come there. Who wants to be told of changes is told by one thread, which also sees to it that each is told once.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any, NamedTuple

from madsci_registry._threads import start_thread
from madsci_registry.types import LockState

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
        self.latest = 0
        """The number of the last Registration of it: resolving anew hands the lock on to that one."""
        self.told: LockState = "held"
        """What its listeners were told last; only for the thread that tells them."""
        self.listeners: deque[tuple[Callable[[Any, LockState], None], Any]] = deque()
        self.mourners: deque[tuple[Callable[[Any], None], Any]] = deque()
        """Who wants to know of its loss, once."""
        self._last_told: LockState = "held"
        """The last state of which anybody would have been told."""
        self._numbers = itertools.count(1)
        self._end: dict[None, tuple[str, LockState]] = {}
        self._nest = 0
        self._nest_lock = threading.RLock()  # a signal handler may enter in the middle of a leave

    @property
    def held(self) -> bool:
        return not self._end

    @property
    def end_reason(self) -> str:
        """Why it ended, "" while it has not."""
        return self._end[None][0] if self._end else ""

    def state(self, *, is_connected: bool) -> LockState:
        """Say how it stands, given whether the daemon is there."""
        if self._end:
            return self._end[None][1]
        return "held" if is_connected else "suspended"

    @property
    def key(self) -> Key:
        return self.place[0]

    @property
    def fencing_token(self) -> int:
        return self.place[1]

    def end(self, reason: str, *, lost: bool) -> bool:
        """End the grant; True for the one caller that did."""
        end: tuple[str, LockState] = (reason, "lost" if lost else "released")
        is_first = self._end.setdefault(None, end) is end
        if is_first:
            self.tell(end[1])
        return is_first

    def hand_out(self) -> int:
        """Number one more Registration of it."""
        self.latest = next(self._numbers)
        return self.latest

    def on_lost(self, callback: Callable[[Any], None], registration: Any) -> None:
        """Have `callback(registration)` called once when the lock is lost, now if it is already."""
        self.mourners.append((callback, registration))
        self._told_from_now_on()

    def on_state(self, callback: Callable[[Any, LockState], None], registration: Any) -> None:
        """Have `callback(registration, state)` called at each change; now if the lock has ended already."""
        self.listeners.append((callback, registration))
        if len(self.listeners) == 1 and not self.mourners:
            self.told = self._last_told  # nobody has been told so far: changes count from here
        self._told_from_now_on()

    def _told_from_now_on(self) -> None:
        _callbacks.start()
        if self._end:
            self.tell(self._end[None][1])

    def tell(self, state: LockState) -> None:
        """Let who wants to know be told of a state, in the order of these calls; never waits."""
        self._last_told = state
        if self.listeners or self.mourners:
            _callbacks.put(self, state)

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
    """The one thread that runs callbacks, so that none runs in a thread that has to read on, and each is told once."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Grant, LockState]] = SimpleQueue()
        self._has_thread = False
        self._lock = threading.Lock()

    def start(self) -> None:
        with self._lock:
            if not self._has_thread:
                # Where none can be started any more, nobody is told.
                self._has_thread = start_thread(self._run)

    def put(self, grant: Grant, state: LockState) -> None:
        self._queue.put((grant, state))

    def _run(self) -> None:
        while True:
            _tell(*self._queue.get())


def _tell(grant: Grant, state: LockState) -> None:
    if grant.told in ("lost", "released"):
        state = grant.told  # the end has overtaken it; but who came late still hears of the end
    elif state == grant.told:
        return
    grant.told = state
    if state in ("held", "suspended"):
        for callback, registration in list(grant.listeners):
            _call(callback, registration, state)
        return
    while grant.listeners:
        callback, registration = grant.listeners.popleft()
        _call(callback, registration, state)
    while state == "lost" and grant.mourners:
        mourner, registration = grant.mourners.popleft()
        _call(mourner, registration)


def _call(callback: Callable[..., None], *arguments: Any) -> None:
    try:
        callback(*arguments)
    except (Exception, SystemExit):  # the outer loop of this thread: a callback's fault is its author's
        log.exception("a callback for a lock raised")


_callbacks = _Callbacks()


def forget_parent() -> None:
    """Let a forked child start a callback thread of its own."""
    global _callbacks
    _callbacks = _Callbacks()
