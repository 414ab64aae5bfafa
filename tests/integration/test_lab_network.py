"""Hosts that lose their network, and get it back: real cables to cut, where this machine lets us make some."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from helpers import PATIENCE_S, Worker, until
from lab_fleets import await_lab, following
from madsci_registry import LockLostError, RegistryClient
from networks import LabNetwork, need_networks

LEASE_S = 15.0
DEADLINE_S = 2.0
SLACK_S = 3.0


@pytest.fixture
def network(registry_path: Path) -> Iterator[LabNetwork]:
    """The hosts a, b and c, and their lab."""
    need_networks()
    with LabNetwork(registry_path.parent, "a", "b", "c") as joined:
        yield joined


@pytest.fixture
def clients(network: LabNetwork) -> Iterator[dict[str, RegistryClient]]:
    """A client on each host, whose daemon the lab has heard."""
    with ExitStack() as stack:
        made = {
            name: stack.enter_context(RegistryClient(daemon.registry, timeout=PATIENCE_S, autostart=False))
            for name, daemon in network.hosts.items()
        }
        for client in made.values():
            until(lambda: client.status()["lab"]["state"] == "up", "for the lab to be there")  # noqa: B023 - called here
        yield made


def test_host_that_was_cut_off_loses_what_others_took(network: LabNetwork, clients: dict[str, RegistryClient]) -> None:
    """A host that is cut off for its lease of 15 s goes on alone, after one wait of the deadline; a name of it is given
    to who waits on another host, when its holder has been told that it is confirmed no more; when the cable is mended,
    the holder of that name is told who has it, what nobody took is confirmed again, and what was made meanwhile is in
    the lab. Hosts with a cable notice nothing."""
    a, c = clients["a"], clients["c"]
    taken, kept, apart = a.resolve("taken", "node"), a.resolve("kept", "node"), c.resolve("apart", "node")
    token, kept_token, told = taken.fencing_token or 0, kept.fencing_token, following(apart)
    with Worker(network.hosts["b"].registry) as waiter:
        waiter.tell("resolve", "taken", wait=2 * LEASE_S + PATIENCE_S)
        assert not waiter.answered(0.5)
        network.cut("a")
        began = time.monotonic()
        alone = a.resolve("alone", "node")
        assert alone.lab == "unconfirmed" and time.monotonic() - began < DEADLINE_S + SLACK_S
        began = time.monotonic()
        assert a.resolve("alone too", "node").lab == "unconfirmed" and time.monotonic() - began < DEADLINE_S
        granted = waiter.answer(2 * LEASE_S + PATIENCE_S)
        assert (taken.lab, taken.state) == ("unconfirmed", "held")
        assert granted["fencing_token"] > token and granted["id"] == taken.id
        network.mend("a")
        until(lambda: taken.state == "lost", "for the holder to learn of it")
        with pytest.raises(LockLostError, match="gave it to b"):
            taken.ensure()
        for registration in (kept, alone):
            await_lab(registration, "confirmed")
        assert (kept.state, kept.fencing_token) == ("held", kept_token)
        assert a.lab_sync(wait=PATIENCE_S)["behind"] == 0
        assert c.resolve("alone", "node", acquire_lock=False).id == alone.id
        assert waiter.ask("held", "taken") and told == [] and apart.lab == "confirmed"


def test_cut_that_is_short_costs_nothing(network: LabNetwork, clients: dict[str, RegistryClient]) -> None:
    """A cable that is cut for less than the lease takes nothing from anybody, and nobody is told of anything."""
    held = clients["a"].resolve("held", "node")
    token, told = held.fencing_token, following(held)
    network.cut("a")
    assert clients["a"].resolve("meanwhile", "node").lab == "unconfirmed"
    network.mend("a")
    until(lambda: clients["a"].status()["lab"]["state"] == "up", "for the lab to be back")
    assert clients["a"].get("held").lab == "confirmed"
    assert (held.fencing_token, told) == (token, [])
