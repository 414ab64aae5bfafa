"""Three hosts and their lab, as real processes over real HTTP: the order of a resolve, moves, deaths and restarts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import PATIENCE_S, until
from lab_fleets import LabFleet, ShortLab, await_lab, following, soon, start_all
from madsci_registry import HeldError, LabUnavailableError, LockLostError, NotFoundError, RegistryClient, WrongTypeError

LEASE_S = 6.0
RESOLVE = "POST /registry/resolve"


@pytest.fixture(scope="module")
def running(base_folder: Path) -> Iterator[LabFleet]:
    """The hosts a, b and c; the tests of this module share them, each with names of its own."""
    folder = Path(tempfile.mkdtemp(dir=base_folder))
    with LabFleet(folder, lab=ShortLab(folder, lease_s=LEASE_S), MADSCI_REGISTRYD_EXPORT="false") as fleet:
        yield fleet


@pytest.fixture
def fleet(running: LabFleet) -> Iterator[LabFleet]:
    """The same, all well; clients that a test makes end with it."""
    running.mend()
    yield running
    for host in running.hosts.values():
        host.dismiss()


@pytest.fixture
def a(fleet: LabFleet) -> RegistryClient:
    """A client on host a."""
    return fleet["a"].client()


@pytest.fixture
def b(fleet: LabFleet) -> RegistryClient:
    """A client on host b."""
    return fleet["b"].client()


# the order of a resolve


def test_resolve_asks_here_then_the_lab_then_makes(fleet: LabFleet, a: RegistryClient, b: RegistryClient) -> None:
    """A name that nobody knows is made, and the lab has it when the answer comes; one that only the lab knows is taken
    from there; one that is known here is answered here, and the lab is not asked."""
    made = a.resolve("order", "node", {"x": 1}, acquire_lock=False)
    assert (made.is_new, made.source, made.lab) == (True, "local", "confirmed")
    assert fleet.entry("order")["id"] == made.id
    found = b.resolve("order", "node", acquire_lock=False)
    assert (found.id, found.is_new, found.source, found.lab) == (made.id, False, "lab", "confirmed")
    assert b.get("order").metadata == {"x": 1}
    before = fleet["b"].proxy.requests[RESOLVE]
    again = b.resolve("order", "node", acquire_lock=False)
    assert (again.id, again.source) == (made.id, "local")
    assert fleet["b"].proxy.requests[RESOLVE] == before


def test_lock_here_then_in_the_lab(fleet: LabFleet, a: RegistryClient) -> None:
    """A granted name is the host's in the lab when the answer comes, with the term that the token is made of."""
    granted = a.resolve("locked", "node")
    lock = fleet.entry("locked")["lock"]
    assert granted.lab == "confirmed" and granted.fencing_token
    assert (lock["host"], lock["term"]) == (fleet["a"].name, granted.fencing_token >> 20)
    assert a.get("locked").lab == "confirmed"


def test_resolve_many_takes_what_the_lab_knows(fleet: LabFleet, a: RegistryClient, b: RegistryClient) -> None:
    """Of many names each is made, or taken from the lab, or refused by itself."""
    known = a.resolve("many-1", "node", acquire_lock=False).id
    held = a.resolve("many-2", "node")
    one, two, three = b.resolve_many([("many-1", "node"), ("many-2", "node"), ("many-3", "node")])
    assert not isinstance(one, Exception) and (one.id, one.lab) == (known, "confirmed")
    assert isinstance(two, HeldError) and held.held
    assert not isinstance(three, Exception) and (three.is_new, three.lab) == (True, "confirmed")


def test_type_of_the_lab_counts(a: RegistryClient, b: RegistryClient) -> None:
    """A name that is another type of component in the lab is not made here."""
    a.resolve("typed", "node", acquire_lock=False)
    with pytest.raises(WrongTypeError):
        b.resolve("typed", "module")
    with pytest.raises(NotFoundError):
        b.get("typed")


def test_lookup_of_an_unknown_name_asks_the_lab(fleet: LabFleet, a: RegistryClient, b: RegistryClient) -> None:
    """A lookup finds what only other hosts have made; with the lab away it answers at once what is known here."""
    id = a.resolve("looked for", "node", acquire_lock=False).id
    assert (b.lookup("looked for"), b.lookup("never made")) == (id, None)
    fleet["b"].proxy.mode = "refuse"
    assert b.lookup("looked for") is None
    fleet["b"].await_state("away")
    assert b.lookup("looked for") is None


def test_changes_of_identities_reach_the_lab_in_order(fleet: LabFleet, a: RegistryClient, b: RegistryClient) -> None:
    """Metadata, rename, retire and revive of a host are the lab's history of the component, in their order."""
    id = a.resolve("changing", "node", acquire_lock=False).id
    a.set_metadata("changing", {"rack": 3})
    a.rename("changing", "changed")
    a.retire("changed")
    a.revive("changed")
    assert a.lab_sync(wait=PATIENCE_S)["behind"] == 0
    entry = fleet.entry("changed")
    assert (entry["id"], entry["metadata"], entry["retired"]) == (id, {"rack": 3}, False)
    assert fleet.kinds("changed") == ["created", "metadata", "renamed", "retired", "revived"]
    assert fleet.entry("changing") is None and b.lookup("changed") == id


# locks in the whole lab


def test_name_held_on_another_host_is_refused_with_who(fleet: LabFleet, b: RegistryClient) -> None:
    """A name that is held on another host is refused, and the refusal says which host and process has it."""
    holder = fleet["a"].worker()
    holder.ask("resolve", "held")
    with pytest.raises(HeldError, match=fleet["a"].name) as refused:
        b.resolve("held", "node")
    assert refused.value.holder and refused.value.holder.pid == holder.pid


def test_component_that_moves_keeps_its_ulid(fleet: LabFleet) -> None:
    """From host to host a component has one ULID, and each grant a higher token than the ones before it."""
    grants = []
    for letter in "abcab":
        with fleet[letter].asking() as there:
            granted = there.resolve("mover", "node", wait=10)
            grants.append((granted.id, granted.fencing_token or 0, granted.lab))
    assert {(id, lab) for id, _, lab in grants} == {(grants[0][0], "confirmed")}
    tokens = [token for _, token, _ in grants]
    assert tokens == sorted(set(tokens))


def test_hand_over_inside_a_host_asks_nobody(fleet: LabFleet, a: RegistryClient) -> None:
    """Between clients of one host a name goes from hand to hand without the lab, still confirmed, in the same term."""
    other = fleet["a"].worker()
    first = a.resolve("inside", "node")
    other.tell("resolve", "inside", wait=10)
    until(lambda: a.get("inside").waiting == 1, "for the other one to wait")
    before = fleet["a"].proxy.requests[RESOLVE]
    token = first.fencing_token
    assert first.release() and token
    assert other.answer()["fencing_token"] == token + 1
    assert a.get("inside").lab == "confirmed"
    assert fleet["a"].proxy.requests[RESOLVE] == before


def test_rename_of_a_held_component_takes_its_lock_along(fleet: LabFleet, a: RegistryClient, b: RegistryClient) -> None:
    """A component that is renamed while it is held is held under its new name in the whole lab, and never lost."""
    held = a.resolve("old name", "node")
    told = following(held)
    a.rename("old name", "new name", force=True)
    fleet["a"].await_settled()
    assert (held.name, held.lab) == ("new name", "confirmed")
    with pytest.raises(HeldError):
        b.resolve("new name", "node")
    other = soon(lambda: b.resolve("old name", "node"), but=HeldError)
    assert other.id != held.id
    assert held.held and not [line for line in told if line[0] == "lost"]


# deaths


def test_holder_that_dies_frees_its_name_for_other_hosts(fleet: LabFleet) -> None:
    """After SIGKILL of a holder who waits on another host has the name, with the same ULID and a higher token."""
    holder, waiter = fleet["a"].worker(), fleet["b"].worker()
    held = holder.ask("resolve", "mortal")
    waiter.tell("resolve", "mortal", wait=PATIENCE_S)
    assert not waiter.answered(0.2)
    holder.kill()
    granted = waiter.answer()
    assert granted["id"] == held["id"] and granted["fencing_token"] > held["fencing_token"]


def test_daemon_that_is_killed_keeps_what_its_host_holds(fleet: LabFleet, a: RegistryClient, b: RegistryClient) -> None:
    """SIGKILL of a daemon, or its restart, frees nothing in the lab: the holder goes on with its token, confirmed."""
    held = a.resolve("outlives", "node")
    token, told = held.fencing_token, following(held)
    fleet["a"].daemon.kill()
    with pytest.raises(HeldError):
        b.resolve("outlives", "node")
    fleet["a"].daemon.start()
    until(lambda: held.state == "held", "for the holder to resume")
    until(lambda: held.lab == "confirmed", "for the lab to hear of it")
    assert held.fencing_token == token
    assert fleet["a"].daemon.terminate() == 0
    fleet["a"].daemon.start()
    until(lambda: held.state == "held", "for the holder to resume")
    fleet["a"].await_settled()
    with pytest.raises(HeldError):
        b.resolve("outlives", "node")
    assert held.fencing_token == token and not [line for line in told if line[0] == "lost"]


def test_holder_that_dies_with_its_daemon_frees_its_name(fleet: LabFleet, b: RegistryClient) -> None:
    """A holder that died while its daemon was dead too has no name any more once the daemon is back."""
    holder = fleet["a"].worker()
    token = holder.ask("resolve", "both die")["fencing_token"]
    fleet["a"].daemon.kill()
    holder.kill()
    fleet["a"].daemon.start()
    granted = b.resolve("both die", "node", wait=PATIENCE_S)
    assert (granted.fencing_token or 0) > token and granted.lab == "confirmed"


def test_host_that_dies_frees_its_names_after_its_lease(fleet: LabFleet, a: RegistryClient, b: RegistryClient) -> None:
    """A daemon that is away for longer than its lease loses its host's names to who asks; when it is back the holder
    learns which, and keeps those that nobody has taken."""
    taken, kept = a.resolve("taken", "node"), a.resolve("kept", "node")
    token, kept_token = taken.fencing_token or 0, kept.fencing_token
    fleet["a"].daemon.kill()
    moved = b.resolve("taken", "node", wait=LEASE_S + PATIENCE_S)
    assert (moved.fencing_token or 0) > token and moved.id == taken.id
    fleet["a"].daemon.start()
    until(lambda: taken.state == "lost", "for the holder to learn of it")
    with pytest.raises(LockLostError):
        taken.ensure()
    assert [event.why.get("lab_host") for event in a.history("taken") if event.kind == "ended"] == [fleet["b"].name]
    await_lab(kept, "confirmed")
    assert (kept.state, kept.fencing_token) == ("held", kept_token)


def test_lab_that_is_killed_costs_nobody_a_lock(fleet: LabFleet, a: RegistryClient, b: RegistryClient) -> None:
    """While the lab is dead names are made and held by each host alone, unconfirmed, and those that were held stay;
    when it is back it has all of them, and confirms the locks with higher tokens, of which the holders are told."""
    before = a.resolve("before", "node")
    token = before.fencing_token
    fleet.lab.kill()
    meanwhile = a.resolve("meanwhile", "node")
    first, told = meanwhile.fencing_token or 0, following(meanwhile)
    assert (meanwhile.lab, meanwhile.is_new) == ("unconfirmed", True)
    assert b.resolve("of b", "node").lab == "unconfirmed"
    assert before.held
    fleet.lab.start()
    await_lab(meanwhile, "confirmed")
    until(lambda: told, "for the callback")
    assert told[-1] == ("held", "confirmed", meanwhile.fencing_token)
    assert (meanwhile.fencing_token or 0) > first
    fleet["a"].await_settled()
    fleet["b"].await_settled()
    assert fleet.entry("meanwhile")["id"] == meanwhile.id and fleet.entry("of b")
    assert (before.state, before.lab, before.fencing_token) == ("held", "confirmed", token)
    last = meanwhile.fencing_token or 0
    assert meanwhile.release()
    assert (b.resolve("meanwhile", "node", wait=PATIENCE_S).fencing_token or 0) > last


def test_restart_of_all_changes_nothing(fleet: LabFleet) -> None:
    """After SIGKILL of the lab and of all daemons at once, in any order of their starts, each holder has its name and
    token, confirmed, and nobody else gets it."""
    holders = {letter: fleet[letter].worker() for letter in "abc"}
    tokens = {c: holder.ask("resolve", f"all-{c}")["fencing_token"] for c, holder in holders.items()}
    fleet.lab.kill()
    for host in fleet.hosts.values():
        host.daemon.kill()
    start_all([fleet["a"].daemon])
    fleet.lab.start()
    start_all([fleet["b"].daemon, fleet["c"].daemon])
    for letter, holder in holders.items():
        fleet[letter].await_settled()
        assert holder.ask("held", f"all-{letter}") and not holder.ask("losses", 1, 0.0)
        assert holder.ask("token", f"all-{letter}") == tokens[letter]
        with fleet["b" if letter == "a" else "a"].asking() as other, pytest.raises(HeldError):
            other.resolve(f"all-{letter}", "node")


# lab.require


def test_required_lab_is_waited_for_by_nobody_and_refused_for(fleet: LabFleet) -> None:
    """With lab.require nothing new is given while the lab is away: lab_unavailable; what is held stays, and what is
    known is still looked up; when the lab is back it goes on."""
    host = fleet.hosts.get("strict") or fleet.add("strict", MADSCI_REGISTRYD_LAB_REQUIRE="true")
    fleet.mend()
    strict = host.client()
    held = strict.resolve("strict one", "node")
    host.proxy.mode = "refuse"
    with pytest.raises(LabUnavailableError):
        strict.resolve("strict two", "node")
    host.await_state("away")
    for resolve in (
        lambda: strict.resolve("strict two", "node"),
        lambda: strict.resolve("strict two", "node", wait=5),
        lambda: strict.resolve("strict two", "node", acquire_lock=False),
        lambda: strict.lookup("strict two"),
    ):
        with pytest.raises(LabUnavailableError):
            resolve()
    assert held.held and strict.lookup("strict one") == held.id
    host.proxy.mode = "pass"
    assert soon(lambda: strict.resolve("strict two", "node"), but=LabUnavailableError).lab == "confirmed"
    host.daemon.kill()
    del fleet.hosts["strict"]
