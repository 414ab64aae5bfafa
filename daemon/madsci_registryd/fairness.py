"""Whose request is next: users take turns, whatever each has sent. Pure.

One user's flood then costs another the time of one request, not of all that came before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Requests, each user's in the order of their coming, the users one after the other."""

    def __init__(self) -> None:
        self._users: dict[int, deque[tuple[T, int]]] = {}
        """In the order of their turns: requests with their bytes."""
        self._bytes: dict[int, int] = {}

    def waiting(self, user: int) -> int:
        """Return how many requests of a user wait."""
        return len(self._users.get(user, ()))

    def bytes_of(self, user: int) -> int:
        """Return how many bytes the requests of a user have that wait."""
        return self._bytes.get(user, 0)

    def put(self, user: int, item: T, size_bytes: int) -> None:
        self._users.setdefault(user, deque()).append((item, size_bytes))
        self._bytes[user] = self._bytes.get(user, 0) + size_bytes

    def next_user(self, may: Callable[[int], bool]) -> int | None:
        """Return whose turn it is of those who `may` have one; None where nobody waits who may."""
        return next((user for user in self._users if may(user)), None)

    def take(self, user: int) -> tuple[T, int]:
        """Return the first request of a user, for whom one waits, and its bytes; who has more comes last again."""
        waiting = self._users.pop(user)
        taken = waiting.popleft()
        if waiting:
            self._users[user] = waiting
            self._bytes[user] -= taken[1]
        else:
            del self._bytes[user]
        return taken
