"""The rules of who may take a name, without anything around them."""

from __future__ import annotations

import math

import pytest

from madsci_registry.types import Process, Proof
from madsci_registryd.locks import (
    Claim,
    Identity,
    Owner,
    Presence,
    Queues,
    Session,
    Verdict,
    decide,
    next_claim,
)

ME, OTHER = Owner("s1", "i"), Owner("s2", "i")


@pytest.mark.parametrize(
    ("holder", "ahead", "may_wait", "verdict"),
    [
        (None, 0, False, Verdict.GRANT),
        (None, 0, True, Verdict.GRANT),
        (None, 1, False, Verdict.HELD),
        (None, 1, True, Verdict.QUEUE),
        (OTHER, 0, False, Verdict.HELD),
        (OTHER, 0, True, Verdict.QUEUE),
        (Owner("s1", "another instance"), 0, False, Verdict.HELD),
        (ME, 0, False, Verdict.SAME),
        (ME, 3, True, Verdict.SAME),
    ],
)
def test_decide_every_case_has_its_verdict(holder: Owner, ahead: int, may_wait: bool, verdict: Verdict) -> None:
    """A free name goes to the first; the owner has it already; everybody else waits or is refused."""
    assert decide(holder, ME, ahead=ahead, may_wait=may_wait) is verdict


def test_queues_are_first_in_first_out_and_forget_what_is_removed() -> None:
    """Places are those of arrival, and removing a claim closes the gap."""
    queues = Queues()
    claims = [Claim("n", Owner(f"s{n}", "i"), 1, None) for n in range(3)]
    for claim in claims:
        queues.add(claim)
    assert [queues.place(c) for c in claims] == [1, 2, 3]
    queues.remove(claims[0])
    queues.remove(claims[0])
    assert (queues.place(claims[2]), queues.count("n"), len(queues)) == (2, 2, 2)
    queues.remove(claims[1])
    queues.remove(claims[2])
    assert queues.of_name("n") == () and queues.find("s0", 1) is None


def test_next_claim_passes_over_who_cannot_hear() -> None:
    """A free name goes to the first waiter that can be told."""
    first, second = Claim("n", ME, 1, None), Claim("n", OTHER, 1, None)
    assert next_claim((first, second), lambda c: True) is first
    assert next_claim((first, second), lambda c: c is second) is second
    assert next_claim((first, second), lambda c: False) is None


@pytest.mark.parametrize(
    ("presence", "proof", "holds_nothing", "ends_after_s"),
    [
        (Presence.ATTACHED, "pidfd", False, math.inf),
        (Presence.ATTACHED, "pidfd", True, math.inf),
        (Presence.ATTACHED, "connection", False, math.inf),
        (Presence.DROPPED, "pidfd", False, 2),
        (Presence.DROPPED, "connection", False, 2),
        (Presence.DETACHED, "pidfd", False, math.inf),
        (Presence.DETACHED, "pidfd", True, 10),
        (Presence.DETACHED, "pid", False, math.inf),
        (Presence.DETACHED, "connection", False, 10),
    ],
)
def test_session_ends_only_by_its_rule(
    presence: Presence, proof: Proof, holds_nothing: bool, ends_after_s: float
) -> None:
    """Proven alive lasts over a restart for ever if it holds something, else and unproven 10 s; a lost connection 2 s;
    an attached one always."""
    process, identity = Process(pid=1, uid=1, gid=1, proof=proof), Identity(1, 1, 1, "boot", 1)
    session = Session("s", b"", process, identity, "t", presence=presence, since=100.0, holds_nothing=holds_nothing)
    assert session.ends_at() == 100.0 + ends_after_s
