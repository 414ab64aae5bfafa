"""A host and its lab, with a proxy in between that fails in every way that it can: who waits, for how long, and what is
so when it is well again."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest

from helpers import Worker, until
from lab_fleets import LabFleet, ShortLab, await_lab, following
from lab_proxy import Mode
from madsci_registry import HeldError, Registration

LEASE_S = 4.0
DEADLINE_S = 1.0
SLACK_S = 2.0
"""How much longer all may take on a machine that is busy."""
FAULTS = [mode for mode in get_args(Mode) if mode != "pass"]
HANGING = ("silent", "mute", "drip")
"""Those in which nothing says that there will be no answer."""
DONE_UNHEARD = ("drop", "mute", "drip", "cut")
"""Those in which the lab does what it is asked, and the answer does not arrive."""


@pytest.fixture(scope="module")
def running(base_folder: Path) -> Iterator[LabFleet]:
    """The hosts a and b; the tests of this module share them, each with names of its own."""
    folder = Path(tempfile.mkdtemp(dir=base_folder))
    env = {"MADSCI_REGISTRYD_EXPORT": "false", "MADSCI_REGISTRYD_LAB_DEADLINE_S": str(DEADLINE_S)}
    with LabFleet(folder, "ab", lab=ShortLab(folder, lease_s=LEASE_S), **env) as fleet:
        yield fleet


@pytest.fixture
def fleet(running: LabFleet) -> Iterator[LabFleet]:
    """The same, all well; clients that a test makes end with it."""
    running.mend()
    yield running
    for host in running.hosts.values():
        host.dismiss()


@pytest.mark.parametrize("mode", FAULTS)
def test_lab_that_fails_is_waited_for_once_and_has_all_afterwards(fleet: LabFleet, mode: Mode) -> None:
    """However the way to the lab fails, one request waits for it, no longer than the deadline; others are answered
    meanwhile, and later ones do not wait; when it is well again, all that was granted is confirmed, and the lab has
    each component once."""
    host, name = fleet["a"], mode
    client, other = host.client(), host.worker()
    known = client.resolve(f"{name} known", "node", acquire_lock=False).id
    host.proxy.mode = mode
    with ThreadPoolExecutor(1) as threads:
        began = time.monotonic()
        waiting = threads.submit(client.resolve, f"{name} first", "node")
        for _ in range(20):
            assert other.ask("lookup", f"{name} known") == known
        assert mode not in HANGING or not waiting.done()
        first = waiting.result()
    assert time.monotonic() - began < DEADLINE_S + SLACK_S
    assert (first.lab, first.is_new) == ("unconfirmed", True)
    assert host.lab["state"] == "away"
    began = time.monotonic()
    later = [client.resolve(f"{name} {n}", "node") for n in range(5)]
    client.set_metadata(f"{name} known", {"mode": mode})
    assert client.lookup(f"{name} never made") is None
    assert time.monotonic() - began < SLACK_S
    host.proxy.mode = "refuse"  # ends what hangs: a batch of changes would for 10 s
    host.proxy.mode = "pass"
    for registration in (first, *later):
        await_lab(registration, "confirmed")
    host.await_settled()
    for registration in (first, *later):
        entry = fleet.entry(registration.name)
        assert (entry["id"], entry["other_ids"], entry["lock"]["host"]) == (registration.id, [], host.name)
        assert entry["lock"]["term"] == (registration.fencing_token or 0) >> 20
        assert fleet.kinds(registration.name) == ["created"]
    assert fleet.kinds(f"{name} known") == ["created", "metadata"]


@pytest.mark.parametrize("mode", ["drop", "cut"])
def test_change_whose_answer_is_lost_counts_once(fleet: LabFleet, mode: Mode) -> None:
    """Changes that the lab took in without its answer arriving are sent again, and count once, in their order."""
    host, name = fleet["a"], f"change {mode}"
    client = host.client()
    client.resolve(name, "node", acquire_lock=False)
    host.await_settled()
    host.proxy.only, host.proxy.mode = frozenset({"/registry/changes"}), mode
    before = host.proxy.requests["POST /registry/changes"]
    client.set_metadata(name, {"n": 1})
    client.rename(name, f"{name} renamed")
    client.retire(f"{name} renamed")
    until(lambda: fleet.kinds(f"{name} renamed")[-1:] == ["retired"], "for the lab to have all, unheard")
    assert host.lab["behind"] > 0
    host.proxy.mode = "pass"
    host.await_settled()
    assert host.proxy.requests["POST /registry/changes"] > before + 1
    assert fleet.kinds(f"{name} renamed") == ["created", "metadata", "renamed", "retired"]


@pytest.mark.parametrize("mode", ["drop", "mute"])
def test_grant_whose_answer_is_lost_is_not_lost_in_the_lab(fleet: LabFleet, mode: Mode) -> None:
    """A lock that the lab gave without its answer arriving is this host's, confirmed soon after, and given back to the
    lab when it is released: other hosts get it."""
    a, b = fleet["a"], fleet["b"]
    held, name = a.client(), f"grant {mode}"
    a.proxy.only, a.proxy.mode = frozenset({"/registry/resolve"}), mode
    granted = held.resolve(name, "node")
    assert granted.lab == "unconfirmed"
    assert fleet.entry(name)["id"] == granted.id
    await_lab(granted, "confirmed")
    with pytest.raises(HeldError):
        b.client().resolve(name, "node")
    token = granted.fencing_token or 0
    assert granted.release()
    assert (b.client().resolve(name, "node", wait=20).fencing_token or 0) > token


def test_release_whose_answer_is_lost_frees_the_name(fleet: LabFleet) -> None:
    """A name that was released, when the lab did not hear of it or could not say so, is soon free for other hosts."""
    a, b = fleet["a"], fleet["b"]
    modes: tuple[Mode, ...] = ("drop", "500")
    for mode in modes:
        name = f"release {mode}"
        granted = a.client().resolve(name, "node")
        a.proxy.only, a.proxy.mode = frozenset({"/registry/release"}), mode
        assert granted.release()
        assert b.client().resolve(name, "node", wait=20).lab == "confirmed"
        a.proxy.mode = "pass"


def test_keepalives_that_do_not_arrive_are_told(fleet: LabFleet) -> None:
    """A host whose keepalives fail for its lease has no confirmed lock any more, and says so; what nobody has taken
    meanwhile is confirmed again, with the same token."""
    host = fleet["a"]
    held = host.client().resolve("kept alive", "node")
    token, told = held.fencing_token, following(held)
    host.proxy.only, host.proxy.mode = frozenset({"/registry/hosts/keepalive"}), "500"
    await_lab(held, "unconfirmed")
    assert held.held and host.client().get("kept alive").lab == "unconfirmed"
    host.proxy.mode = "pass"
    await_lab(held, "confirmed")
    assert (held.state, held.fencing_token) == ("held", token)
    until(lambda: len(told) >= 2, "for both callbacks")
    assert told[:2] == [("held", "unconfirmed", token), ("held", "confirmed", token)]


def test_name_that_the_lab_was_away_for_is_asked_for_when_it_is_back(fleet: LabFleet) -> None:
    """That the lab did not answer about a name is forgotten when it is back: held on another host, it is refused."""
    a, b = fleet["a"], fleet["b"]
    client, other = a.client(), b.client()
    other.resolve("asked in vain", "node", acquire_lock=False)
    a.proxy.mode = "refuse"
    client.resolve("asked in vain", "node", acquire_lock=False)
    a.proxy.mode = "pass"
    a.await_settled()
    assert other.resolve("asked in vain", "node").lab == "confirmed"
    with pytest.raises(HeldError):
        client.resolve("asked in vain", "node")


def gets_alone(fleet: LabFleet, name: str) -> tuple[Registration, Worker]:
    """Let a host hold a name, and a waiter of another host get it from that one alone, as it cannot reach the lab."""
    a, b = fleet["a"], fleet["b"]
    first = a.client().resolve(name, "node")
    waiter = b.worker()
    waiter.ask("resolve", name, acquire_lock=False)
    waiter.tell("resolve", name, wait=20)
    assert not waiter.answered(0.2)
    b.proxy.mode = "refuse"
    assert waiter.answer()["id"] == first.id
    with b.asking() as looker:
        assert looker.get(name).lab == "unconfirmed"
    return first, waiter


def test_lock_of_a_host_alone_is_lost_where_the_labs_is_higher(fleet: LabFleet) -> None:
    """Who waits for a name that another host holds gets it, unconfirmed, when its own host loses the lab; where the
    other one's term is the higher one, it is told of its loss when the lab is back, and the other one keeps it."""
    first, waiter = gets_alone(fleet, "lower")
    token = waiter.ask("token", "lower")
    assert first.fencing_token and token < first.fencing_token
    fleet["b"].proxy.mode = "pass"
    assert waiter.ask("losses", 1) == [["lower", token]]
    assert (first.state, first.lab) == ("held", "confirmed")


def test_lock_of_a_host_alone_that_is_higher_is_contested(fleet: LabFleet) -> None:
    """Where the term of the host alone is the higher one, both holders keep the name, and that host's status says so
    until one of them gives it up; then the other one's is confirmed."""
    b = fleet["b"]
    with fleet["a"].asking() as on_a:
        epoch = on_a.status()["epoch"]
    while not (b.lab["state"] == "up" and b.client().status()["epoch"] > epoch + 1):
        b.dismiss()
        b.daemon.restart()
        b.await_settled()
    first, waiter = gets_alone(fleet, "higher")
    b.proxy.mode = "pass"
    until(lambda: b.lab["contested"] == ["higher"], "for the other host to be known")
    assert (first.state, first.lab) == ("held", "confirmed") and waiter.ask("held", "higher")
    token = first.fencing_token or 0
    assert first.release()
    b.await_settled()
    assert b.lab["contested"] == [] and waiter.ask("held", "higher")
    assert waiter.ask("token", "higher") > token
