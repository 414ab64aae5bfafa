"""One name with two ULIDs, made on two hosts apart: what becomes of it on its way to a real lab and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forwarding import Forwarding, InnerLab
from helpers import FakeClock

AT = "2026-01-01T00:00:00.000000Z"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Forwarding, Forwarding]]:
    """Two hosts of one lab that have made `arm` apart; the first one was in the lab first."""
    lab = InnerLab(tmp_path, FakeClock())
    with Forwarding(tmp_path, lab, name="a") as a, Forwarding(tmp_path, lab, name="b") as b:
        a.make("arm", by="a")
        b.make("arm", by="b")
        a.keepalive()
        yield a, b
    lab.close()


def test_name_made_on_two_hosts_is_one_component_everywhere(hosts: tuple[Forwarding, Forwarding]) -> None:
    """The lab and both hosts know both ULIDs as one component; the first one in the lab is preferred, and what is
    changed on the second host afterwards reaches the lab."""
    a, b = hosts
    ids = {a.id_of("arm"), b.id_of("arm")}
    preferred = a.id_of("arm")
    b.keepalive()
    assert b.id_of("arm") == preferred
    for id in ids:
        assert b.client.send("whois", id=id).ok()["component"]["name"] == "arm"
        assert a.lab.registry.store.find(id=id).name == "arm"
    b.set("arm", by="b again")
    b.run()
    assert json.loads(a.lab.find("arm").metadata) == {"by": "b again"}
    assert b.forwarder.behind() == 0


def test_holder_of_a_name_with_two_ulids_keeps_its_own(hosts: tuple[Forwarding, Forwarding]) -> None:
    """A running holder is told once, whatever is changed meanwhile; who resolves after it has the lab's ULID."""
    a, b = hosts
    held = b.client.resolve("arm").ok()
    b.keepalive()
    b.set("arm", n=1)
    b.run()
    assert [line["op"] for _, line in b.pair.told] == ["conflict"]
    assert b.id_of("arm") == held["id"] != a.id_of("arm")
    assert b.forwarder.objections.counts["two_ids"] == 2
    b.client.release("arm", held["fencing_token"])
    assert b.client.resolve("arm").ok()["id"] == a.id_of("arm")


def test_decision_of_a_person_reaches_both_hosts_with_their_next_change(hosts: tuple[Forwarding, Forwarding]) -> None:
    """Where a person has decided for the other ULID, a host that says something of the component learns it."""
    a, b = hosts
    first, second = a.id_of("arm"), b.id_of("arm")
    b.keepalive()
    a.lab.registry.store.merge("a", "arm", second)
    for host in (a, b):
        host.set("arm", seen=host.host.name)
        host.run()
        assert host.id_of("arm") == second
        assert host.client.send("whois", id=first).ok()["component"]["id"] == second


def test_conflict_in_a_sync_is_noted_as_one_in_a_change(tmp_path: Path) -> None:
    """A host whose first word to the lab is a sync learns of a name with two ULIDs by it."""
    lab = InnerLab(tmp_path, FakeClock())
    with Forwarding(tmp_path, lab, name="a") as a, Forwarding(tmp_path, lab, name="b") as b:
        a.make("arm")
        b.make("arm")
        a.keepalive()
        b.keepalive()
        assert not b.sent()
        assert a.id_of("arm") == b.id_of("arm")
    lab.close()


@pytest.mark.parametrize("preferred", ["", "x" * 300, "a\nb", 7, None])
def test_preferred_ulid_that_is_none_changes_nothing(here: Forwarding, preferred: Any) -> None:
    """What a lab says is checked: text that cannot be an id is not taken over."""
    id = here.make("arm")
    here.run()
    post = here.lab.post

    def lie(route: str, body: dict[str, Any], *, within_s: float) -> dict[str, Any]:
        answer = post(route, body, within_s=within_s)
        return answer | {"unapplied": [{"name": "arm", "id": id, "reason": "two_ids", "preferred": preferred}]}

    here.lab.post = lie  # type: ignore[method-assign]
    here.set("arm", n=1)
    here.run()
    assert here.id_of("arm") == id
    assert here.client.get("arm")["preferred_id"] is None
