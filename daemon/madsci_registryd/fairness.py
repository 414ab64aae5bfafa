"""Whose request is next: users take turns, whatever each has sent. Pure.

One user's flood then costs another the time of one request, not of all that came before. Who is asking is known by
where the request came from (`source`), once a request from there has been decoded; until then each source is a user of
its own, who may have only a few requests waiting. A source that lies gains one request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

SOURCES_KEPT = 65536


class Waiting(NamedTuple, Generic[T]):
    """A request that waits for its turn."""

    item: T
    size_bytes: int


class FairQueue(Generic[T]):
    """Requests, each user's in the order of their coming, the users one after the other."""

    def __init__(self) -> None:
        self._users: dict[Hashable, deque[Waiting[T]]] = {}
        """In the order of their turns."""
        self._bytes: dict[Hashable, int] = {}
        self._uid_of: dict[Hashable, int] = {}
        self.size_bytes = 0
        """Of all that wait."""

    def user_of(self, source: Hashable) -> Hashable:
        return self._uid_of.get(source, source)

    def know(self, source: Hashable, uid: int) -> None:
        """Note whose a source is."""
        if self._uid_of.get(source) != uid:
            if len(self._uid_of) >= SOURCES_KEPT:
                self._uid_of.clear()
            self._uid_of[source] = uid

    def waiting(self, user: Hashable) -> int:
        """Return how many requests of a user wait."""
        return len(self._users.get(user, ()))

    def bytes_of(self, user: Hashable) -> int:
        """Return how many bytes the requests of a user have that wait."""
        return self._bytes.get(user, 0)

    def put(self, user: Hashable, item: T, size_bytes: int) -> None:
        self._users.setdefault(user, deque()).append(Waiting(item, size_bytes))
        self._bytes[user] = self._bytes.get(user, 0) + size_bytes
        self.size_bytes += size_bytes

    def next_user(self, may: Callable[[Hashable], bool]) -> Hashable | None:
        """Return whose turn it is of those who `may` have one; None where nobody waits who may."""
        return next((user for user in self._users if may(user)), None)

    def take(self, user: Hashable) -> T:
        """Return the first request of a user, for whom one waits; who has more comes last again."""
        waiting = self._users.pop(user)
        item, size_bytes = waiting.popleft()
        self.size_bytes -= size_bytes
        if waiting:
            self._users[user] = waiting
            self._bytes[user] -= size_bytes
        else:
            del self._bytes[user]
        return item
