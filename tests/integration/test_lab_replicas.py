"""Two services of one lab on one etcd, and the daemons of two hosts: one of the services dies, or stands still."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import etcd
from etcd_fleets import EtcdFleet
from helpers import until
from lab_fleets import following

pytestmark = pytest.mark.skipif(not etcd.is_here(), reason=etcd.WHY_NOT)

DEADLINE_S = 6.0
"""Of the daemons' requests: shared by two services, so that half of it is lost at one that stands still."""
_numbers = itertools.count()


@pytest.fixture
def fleet(registry_path: Path) -> Iterator[EtcdFleet]:
    """Host a, which asks the first service, and host b, which asks the second one."""
    store = f"{etcd.shared().url}/replicas-{next(_numbers)}"
    env = {"MADSCI_REGISTRYD_EXPORT": "false", "MADSCI_REGISTRYD_LAB_DEADLINE_S": str(DEADLINE_S)}
    with EtcdFleet(registry_path.parent, store, "ab", services=2, **env) as running:
        yield running


def test_hosts_of_a_service_that_dies_go_on_by_the_other(fleet: EtcdFleet) -> None:
    """When a service is killed its hosts go on by the other one in the same request: what they hold stays confirmed,
    what they ask for is, and nobody finds the lab away. The cursor of a reader of one goes on at the other."""
    a, b = fleet["a"], fleet["b"]
    one, other = fleet.services
    held = a.client().resolve("arm", "node")
    told = following(held)
    cursor = fleet.feed(None)["cursor"]
    assert (held.lab, a.lab["url"], b.lab["url"]) == ("confirmed", one.url, other.url)
    one.kill()
    with a.asking() as asking:
        assert asking.resolve("leg", "node").lab == "confirmed"
    assert (a.lab["state"], a.lab["url"]) == ("up", other.url)
    with b.asking() as asking:
        assert asking.lookup("arm") == held.id and asking.resolve("eye", "node", acquire_lock=False).is_new
    told_by_other = fleet.told_by(other.url, cursor)
    one.start()
    assert fleet.told_by(one.url, cursor) == told_by_other
    assert [e["name"] for e in told_by_other if e["kind"] == "created"] == ["leg", "eye"]
    assert (held.lab, told) == ("confirmed", [])


def test_hosts_of_a_service_that_stands_still_go_on_by_the_other(fleet: EtcdFleet) -> None:
    """A service that is stopped costs its hosts a part of one request's time: then the other one answers, what they
    hold stays confirmed, and when they give it back another host has it, with a higher token."""
    a, b = fleet["a"], fleet["b"]
    one, other = fleet.services
    held = a.client().resolve("arm", "node")
    told, token = following(held), held.fencing_token or 0
    one.signal(signal.SIGSTOP)
    try:
        with a.asking() as asking:
            assert asking.resolve("leg", "node").lab == "confirmed"
        until(lambda: a.lab["url"] == other.url, "for host a to ask the other one")
        assert (held.lab, told, token > 0) == ("confirmed", [], True)
        held.release()
        with b.asking() as asking:
            assert (asking.resolve("arm", "node", wait=10).fencing_token or 0) > token
    finally:
        one.signal(signal.SIGCONT)
