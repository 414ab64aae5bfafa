"""Requests that wait for changes: they cost a coroutine each, not a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable

from starlette.concurrency import run_in_threadpool

from madsci_registry_lab.store import LabStore, Page


class Feed:
    """Answers with changes as soon as there are any. Its requests may be of several event loops."""

    def __init__(self, store: LabStore) -> None:
        self._store = store
        self._guard = threading.Lock()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._over = False
        store.on_change(self._wake)

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    async def changes(self, cursor: str | None, limit: int, wait_s: float, gone: Awaitable[object]) -> Page:
        """Return the changes after `cursor`; where there are none, wait for some for `wait_s` at most.

        Args:
            cursor: see LabStore.
            limit: at most so many.
            wait_s: 0: do not wait.
            gone: is done when nobody waits for the answer any more.

        Raises:
            CompactedError, InvalidError: as the store's.
        """
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        until = loop.time() + wait_s
        left_alone = asyncio.ensure_future(gone)
        left_alone.add_done_callback(lambda _: woken.set())
        with self._guard:
            self._waiting.add((loop, woken))
        try:
            while True:
                woken.clear()  # before the look: a change that comes after it is not slept through
                page = await run_in_threadpool(self._store.changes, cursor, limit)
                left = until - loop.time()
                if page.events or cursor is None or left <= 0 or self._over or left_alone.done():
                    return page
                try:
                    await asyncio.wait_for(woken.wait(), left)
                except (TimeoutError, asyncio.TimeoutError):
                    return page
        finally:
            left_alone.cancel()
            with self._guard:
                self._waiting.discard((loop, woken))

    def end(self) -> None:
        """Answer all who wait: this program ends."""
        self._over = True
        self._wake()

    def _wake(self) -> None:
        with self._guard:
            waiting = [*self._waiting]
        for loop, woken in waiting:
            try:
                loop.call_soon_threadsafe(woken.set)
            except RuntimeError:
                pass  # that loop has ended, and its requests with it
