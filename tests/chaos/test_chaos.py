"""The promises under many kills, and how long a hand-over takes. `make chaos` runs these."""

from __future__ import annotations

import pytest

from helpers import DaemonProcess
from madsci_registry import RegistryClient
from madsci_registry.protocol import RESUME_S
from rounds import check, fresh_seed, hammer_and_kill, hand_over_s, spread_ms

HAND_OVER_P99_S = 0.050
"""Promise 3. Judged on a quiet machine only, which this is not always: more than this is shown, not failed."""


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_two_hundred_daemon_kills_break_no_promise(daemon: DaemonProcess) -> None:
    """Over 200 SIGKILLs of the daemon and 200 of clients no name is held twice, no token shrinks, no identity goes."""
    verdict = hammer_and_kill(daemon, clients=16, client_kills=200, daemon_kills=200, seed=fresh_seed())
    check(daemon, verdict, least_grants=2000)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_hand_over_after_death_is_quick(daemon: DaemonProcess) -> None:
    """After 200 deaths of a holder the next waiter had the name each time without waiting for a timeout."""
    taken = hand_over_s(daemon.registry, rounds=200)
    slow = sum(s > HAND_OVER_P99_S for s in taken)
    print(f"hand-over after SIGKILL: {spread_ms(taken)}; {slow} of {len(taken)} over {HAND_OVER_P99_S * 1e3:.0f} ms")
    assert max(taken) < RESUME_S / 2


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_hand_over_beside_many_locks_is_quick(daemon: DaemonProcess) -> None:
    """With 1,000 names held by others a hand-over does not wait for any timeout either."""
    with RegistryClient(daemon.registry) as crowd:
        crowd.resolve_many((f"other-{i}", "node") for i in range(1000))
        taken = hand_over_s(daemon.registry, rounds=50)
    print(f"hand-over beside 1,000 held names: {spread_ms(taken)}")
    assert max(taken) < RESUME_S / 2
