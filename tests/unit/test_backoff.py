"""Waits between tries: at random, longer each time, never too long."""

from __future__ import annotations

from madsci_registryd.backoff import FIRST_S, Backoff

LONGEST_S = 30.0


def waits(tries: int, rounds: int = 400) -> list[list[float]]:
    """Return the waits of several tries in a row, try by try."""
    backoffs = [Backoff(LONGEST_S) for _ in range(rounds)]
    return [[backoff.next_s() for backoff in backoffs] for _ in range(tries)]


def test_waits_spread_over_a_window_that_doubles_up_to_the_longest() -> None:
    """Each wait is anything from nothing to a bound, which doubles from half a second to the longest."""
    bound_s = FIRST_S
    for each in waits(12):
        assert 0 <= min(each) < 0.1 * bound_s
        assert 0.9 * bound_s < max(each) <= bound_s
        bound_s = min(2 * bound_s, LONGEST_S)


def test_waits_are_short_again_after_a_reset() -> None:
    """What has worked once is tried again soon when it fails the next time."""
    backoff = Backoff(LONGEST_S)
    for _ in range(1000):
        backoff.next_s()
    backoff.reset()
    assert backoff.next_s() <= FIRST_S
