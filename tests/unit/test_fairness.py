"""Users take turns, whatever each has sent."""

from __future__ import annotations

from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from madsci_registryd.fairness import FairQueue

T = TypeVar("T")


def take(queue: FairQueue[T], busy: int | None = None) -> T | None:
    """Take the next one, None where none is to be had."""
    user = queue.next_user(lambda user: user != busy)
    return None if user is None else queue.take(user)[0]


def test_user_with_one_request_waits_for_one_of_each_other() -> None:
    """A request comes after at most one of each other user, however many those have waiting."""
    queue: FairQueue[str] = FairQueue()
    for n in range(1000):
        queue.put(1, f"flood{n}", 10)
    queue.put(2, "mine", 10)
    assert [take(queue) for _ in range(3)] == ["flood0", "mine", "flood1"]


def test_busy_users_requests_wait_and_keep_their_place() -> None:
    """A user who may not have a turn just now is passed over, and is next when it may."""
    queue: FairQueue[str] = FairQueue()
    for user, item in ((1, "a"), (2, "b"), (2, "c")):
        queue.put(user, item, 1)
    assert [take(queue, busy=1), take(queue, busy=1), take(queue, busy=1), take(queue)] == ["b", "c", None, "a"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=60))
def test_each_users_requests_keep_their_order_and_none_is_lost(puts: list[tuple[str, int]]) -> None:
    """All that was put is taken, each user's in its order, and the counts return to nothing."""
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for n, (user, size) in enumerate(puts):
        queue.put(ord(user), (user, n), size)
    taken = []
    while (item := take(queue)) is not None:
        taken.append(item)
    for user in "abc":
        assert [n for u, n in taken if u == user] == [n for n, (u, _) in enumerate(puts) if u == user]
        assert (queue.waiting(ord(user)), queue.bytes_of(ord(user))) == (0, 0)
    assert len(taken) == len(puts)
