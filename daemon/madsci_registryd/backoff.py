"""How long to wait before something is tried again: longer each time, and at random, so that hosts do not ask in step.

"Full jitter": any time up to a bound that doubles. (Exponential Backoff And Jitter, AWS Architecture Blog, 2015.)
"""

from __future__ import annotations

from tenacity import RetryCallState, Retrying, wait_random_exponential

FIRST_S = 0.5
"""The bound of the first wait."""


class Backoff:
    """The waits between tries of one thing."""

    def __init__(self, longest_s: float) -> None:
        """`longest_s`: no wait is longer."""
        self._wait = wait_random_exponential(multiplier=FIRST_S, max=longest_s)
        self._state = RetryCallState(Retrying(), None, (), {})

    def next_s(self) -> float:
        """Return how long to wait after one more failure."""
        wait_s = float(self._wait(self._state))
        self._state.attempt_number += 1
        return wait_s

    def reset(self) -> None:
        """It has worked: begin with short waits again."""
        self._state.attempt_number = 1
