"""One lock of this process, as long as it lasts and after, and how those are told who want to know of its changes.

release and close come from atexit, `__del__` and signal handlers, in the middle of any line of this module, so nothing
on their way takes a lock. `Grant.enter` and `leave` alone have one; finalizers do not come there. Who wants to be told
of changes is told by one thread, which also sees to it that each is told once.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple

from madsci_registry._threads import start_thread
from madsci_registry.types import LabState, LockState

log = logging.getLogger("madsci_registry")


class Key(NamedTuple):
    """Who asks for what: a RegistryClient of this process and a name."""

    instance: str
    name: str


def lab_state(word: str | None) -> LabState:
    """Say what the daemon's word on the lab means: none, where it has no lab or is an older one."""
    return "confirmed" if word == "confirmed" else "unconfirmed" if word == "unconfirmed" else "none"


class Grant:
    """One lock that was granted to this process. Threads share it."""

    def __init__(self, key: Key, fencing_token: int, lab: LabState = "none") -> None:
        self.place = (key, fencing_token)
        """Changed as one when the component is renamed, or the lab gives the lock a higher token."""
        self.lab = lab
        """How it stands in the lab, by the daemon's last word."""
        self.preferred_id: str | None = None
        """The ULID that the lab prefers for the component; None: nothing was said of that."""
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

    def tell_news(self) -> None:
        """Let listeners be told that something else than the state has changed; never waits."""
        if self.listeners:
            _callbacks.put(self, None)

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


class _Callbacks:
    """The one thread that runs callbacks, so that none runs in a thread that has to read on, and each is told once."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Grant, LockState | None]] = SimpleQueue()
        self._has_thread = False
        self._lock = threading.Lock()

    def start(self) -> None:
        with self._lock:
            if not self._has_thread:
                # Where none can be started any more, nobody is told.
                self._has_thread = start_thread(self._run)

    def put(self, grant: Grant, state: LockState | None) -> None:
        self._queue.put((grant, state))

    def _run(self) -> None:
        while True:
            _tell(*self._queue.get())


def _tell(grant: Grant, state: LockState | None) -> None:
    """Tell the state that a grant is in now; None: the one that was told last, since there is other news."""
    if grant.told in ("lost", "released"):
        state = grant.told  # the end has overtaken it; but who came late still hears of the end
    elif state == grant.told:
        return
    grant.told = state = state or grant.told
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
