"""One epoll for everything that can wake the daemon, served in a fixed order: deaths, lifelines, requests."""

from __future__ import annotations

import select
from collections.abc import Callable
from enum import IntEnum


class Turn(IntEnum):
    """The order within a turn: who died is known before anything is granted."""

    DEATHS = 0
    LIFELINES = 1
    REQUESTS = 2


READ = select.EPOLLIN | select.EPOLLRDHUP
WRITE = select.EPOLLOUT


class Loop:
    """File descriptors and what to call when they are ready. One thread."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._woke_at = 0.0
        self.worked: Callable[[float], None] = lambda seconds: None
        """Told, before each wait, how long there was work since the last."""
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[Turn, Callable[[int], None]]] = {}

    def watch(self, fd: int, turn: Turn, callback: Callable[[int], None], events: int = READ) -> None:
        """Call `callback(events)` whenever `fd` is ready (level-triggered)."""
        self._epoll.register(fd, events)
        self._watched[fd] = turn, callback

    def is_watched(self, fd: int) -> bool:
        return fd in self._watched

    def change(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Forget a descriptor; call it before the descriptor is closed."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def turn(self, timeout_s: float | None) -> None:
        """Wait until something is ready, at most `timeout_s` (None: for ever), and call what is to be called."""
        if self._woke_at:
            self.worked(self._now() - self._woke_at)
        ready = self._epoll.poll(-1 if timeout_s is None else max(timeout_s, 0))
        self._woke_at = self._now()
        calls = [(*self._watched[fd], fd, events) for fd, events in ready]
        if len(calls) > 1:
            calls.sort(key=lambda call: call[0])
        for _, callback, fd, events in calls:
            if fd in self._watched and self._watched[fd][1] is callback:  # not unwatched by an earlier call
                callback(events)

    def close(self) -> None:
        self._epoll.close()
