"""What a lab and its hosts know when one of them was set back, copied, or apart from the others; real processes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import PATIENCE_S, until
from lab_fleets import LOCK_KINDS, LabFleet, ShortLab, await_lab, following
from madsci_registry import HeldError, RegistryClient, RegistryError

LEASE_S = 4.0
QUEUED = 2_000


@pytest.fixture(scope="module")
def running(base_folder: Path) -> Iterator[LabFleet]:
    """The hosts a and b; the tests of this module share them, each with names of its own."""
    folder = Path(tempfile.mkdtemp(dir=base_folder))
    with LabFleet(folder, "ab", lab=ShortLab(folder, lease_s=LEASE_S), MADSCI_REGISTRYD_EXPORT="false") as fleet:
        yield fleet


@pytest.fixture
def fleet(running: LabFleet) -> Iterator[LabFleet]:
    """The same, all well; clients that a test makes end with it."""
    running.mend()
    yield running
    for host in running.hosts.values():
        host.dismiss()


Known = dict[str, tuple[Any, ...]]


def identities(client: RegistryClient, prefix: str) -> Known:
    """Return what a daemon knows of its components with such names."""
    return {c.name: (c.id, c.metadata, c.state == "retired") for c in client.list(f"{prefix}*", include_retired=True)}


def labs(fleet: LabFleet, prefix: str = "") -> Known:
    """Return the same of the lab."""
    entries = fleet.entries().items()
    return {name: (e["id"], e["metadata"], e["retired"]) for name, e in entries if name.startswith(prefix)}


def changes(fleet: LabFleet, cursor: str) -> list[tuple[str, str, str]]:
    """Return the identity changes of the lab after a cursor: kind, name and ULID."""
    found: list[tuple[str, str, str]] = []
    while True:
        page = fleet.feed(cursor)
        found += [(e["kind"], e["name"], e["id"]) for e in page["events"] if e["name"] and e["kind"] not in LOCK_KINDS]
        if not page["events"]:
            return found
        cursor = page["cursor"]


# the lab was set back


def test_lab_that_was_restored_from_a_backup_learns_all_again(fleet: LabFleet) -> None:
    """A lab that was set back to an older backup has soon all that its hosts know again, each component once and with
    its ULID, also what moved since; who held a name holds it still, confirmed; and tokens go on growing."""
    a, b = fleet["a"].client(), fleet["b"].client()
    a.resolve("early", "node", acquire_lock=False)
    kept = a.resolve("kept", "node")
    fleet["a"].await_settled()
    assert fleet.lab.terminate() == 0
    backup = fleet.folder / "backup.db"
    shutil.copy(fleet.folder / "lab.db", backup)
    fleet.lab.start()
    fleet.mend()
    a.set_metadata("early", {"n": 1})
    a.rename("early", "later")
    a.retire("later")
    late, moved = a.resolve("late", "node"), a.resolve("moved", "node")
    last = moved.fencing_token or 0
    assert moved.release()
    moved = b.resolve("moved", "node", wait=PATIENCE_S)
    assert (moved.fencing_token or 0) > last
    tokens = [r.fencing_token for r in (kept, late, moved)]
    fleet.mend()
    before = labs(fleet)
    fleet.lab.kill()
    for path in fleet.folder.glob("lab.db*"):
        path.unlink()
    shutil.copy(backup, fleet.folder / "lab.db")
    fleet.lab.start()
    until(lambda: labs(fleet) == before, f"for the lab to know all again: {before}")
    fleet.mend()
    for registration in (kept, late, moved):
        await_lab(registration, "confirmed")
    assert [r.fencing_token for r in (kept, late, moved)] == tokens and all(r.held for r in (kept, late, moved))
    for name, other in (("kept", b), ("late", b), ("moved", a)):
        with pytest.raises(HeldError):
            other.resolve(name, "node")
    last = moved.fencing_token or 0
    assert moved.release()
    assert (a.resolve("moved", "node", wait=PATIENCE_S).fencing_token or 0) > last


def test_lab_that_lost_its_file_is_told_all(fleet: LabFleet) -> None:
    """A lab that begins anew, without its file, is told all identities by its hosts, and has one ULID for each name."""
    a, b = fleet["a"].client(), fleet["b"].client()
    for n in range(20):
        (a if n % 2 else b).resolve(f"n{n}", "node", acquire_lock=False)
    shared = a.resolve("n0", "node")
    assert shared.id == b.get("n0").id
    fleet.mend()
    before = labs(fleet)
    fleet.lab.kill()
    for path in fleet.folder.glob("lab.db*"):
        path.unlink()
    fleet.lab.start()
    until(lambda: labs(fleet) == before, f"for the lab to know all again: {before}")
    await_lab(shared, "confirmed")
    assert a.lab_conflicts("n0") == []


# the hosts were apart


def test_names_made_apart_become_one_component_each(fleet: LabFleet) -> None:
    """Two hosts that made the same names apart agree: the first one's ULID in the lab is preferred, the other one is
    known as the same component on that host, in the lab, and in what is said of conflicts; who holds a name meanwhile
    is told, keeps its ULID, and has the preferred one when it resolves anew."""
    a, b = fleet["a"].client(), fleet["b"].client()
    fleet["b"].proxy.mode = "refuse"
    theirs = {n: a.resolve(f"twin {n}", "node", {"from": "a"}, acquire_lock=False).id for n in range(3)}
    ours = {n: b.resolve(f"twin {n}", "node", {"from": "b"}, acquire_lock=False).id for n in range(3)}
    held = b.resolve("twin 0", "node")
    told = following(held)
    assert all(ours[n] != theirs[n] for n in range(3))
    fleet["b"].proxy.mode = "pass"
    until(lambda: held.preferred_id == theirs[0], "for the holder to be told")
    fleet["b"].await_settled()
    assert (held.id, held.state) == (ours[0], "held") and told
    assert b.get("twin 0").preferred_id == theirs[0]
    for n in range(3):
        entry = fleet.entry(f"twin {n}")
        assert (entry["id"], entry["other_ids"]) == (theirs[n], [ours[n]])
        assert fleet.ask("lookup", id=ours[n])["id"] == theirs[n]
    assert {(c["name"], c["id"], c["entry"]["id"]) for c in b.lab_conflicts() if c["name"] != "twin"} == {
        (f"twin {n}", ours[n], theirs[n]) for n in range(3)
    }
    for n in range(3):
        with b.hold(f"twin {n}", "node") as again:
            assert again.id == theirs[n]
        assert b.get(f"twin {n}").other_ids == [ours[n]]
        assert b.whois(ours[n]).id == b.whois(theirs[n]).id == theirs[n]
    assert b.lookup("twin 1") == theirs[1]


def test_person_decides_a_conflict(fleet: LabFleet) -> None:
    """A merge makes the other ULID the one of the name, in the lab and, with the next resolve, on each host; both stay
    known as the same component, and nothing is left to decide."""
    a, b = fleet["a"].client(), fleet["b"].client()
    fleet["b"].proxy.mode = "refuse"
    theirs = a.resolve("twin", "node", acquire_lock=False).id
    ours = b.resolve("twin", "node", acquire_lock=False).id
    fleet["b"].proxy.mode = "pass"
    until(lambda: b.get("twin").id == theirs, "for the lab's ULID to be taken over")
    assert a.lab_merge("twin", ours)["id"] == ours
    assert a.lab_conflicts("twin") == [] and {c["id"] for c in a.lab_conflicts("twin", decided=True)} == {ours, theirs}
    assert fleet.entry("twin")["id"] == ours and fleet.ask("lookup", id=theirs)["id"] == ours
    for client in (a, b):
        with client.hold("twin", "node", wait=PATIENCE_S):
            pass
        with client.hold("twin", "node", wait=PATIENCE_S) as again:
            assert again.id == ours
        assert client.whois(theirs).id == client.whois(ours).id == ours


# a host was copied


def test_copied_folder_is_a_new_host(fleet: LabFleet) -> None:
    """A copy of a host's folder, in another place, is another host of the lab, and says so in its log; it takes no lock
    of the first one, and what both know is one component."""
    a = fleet["a"].client()
    known = a.resolve("copied", "node", acquire_lock=False).id
    fleet["a"].await_settled()
    was = fleet["a"].name
    holder = fleet["a"].worker()
    token = holder.ask("resolve", "held here")["fencing_token"]
    assert fleet["a"].daemon.terminate() == 0
    copy = fleet.add("copy")
    for path in fleet["a"].folder.glob("registry.*"):
        if path.is_file():
            shutil.copy(path, copy.folder)
    fleet["a"].daemon.start()
    fleet["a"].await_settled()
    copy.daemon.start()
    copy.await_state("up")
    assert fleet["a"].name == was and copy.name != was
    assert "id=lab_host_new" in copy.daemon.log and "id=lab_host_new" not in fleet["a"].daemon.log
    until(lambda: copy.lab["behind"] == 0, "for the copy to have told all")
    with copy.asking() as on_copy:
        assert on_copy.resolve("copied", "node", acquire_lock=False).id == known
        with pytest.raises(HeldError):
            on_copy.resolve("held here", "node")
    entry = fleet.entry("held here")
    assert (entry["lock"]["host"], entry["lock"]["term"]) == (was, token >> 20)
    assert holder.ask("held", "held here") and not holder.ask("losses", 1, 0.0)
    copy.daemon.kill()
    del fleet.hosts["copy"]


# much was queued


def test_queued_changes_arrive_in_order_once(fleet: LabFleet) -> None:
    """Two thousand changes made while the lab was away are all in the lab soon after it is back: each once in effect,
    in the order in which they were made; and a lab that is killed while they come misses none."""
    host, start = fleet["a"], fleet.feed(None)["cursor"]
    a = host.client()
    host.proxy.mode = "refuse"
    changed = QUEUED // 20
    last = a.history()[-1].revision
    made = a.resolve_many([(f"q{n}", "node", {"n": n}) for n in range(QUEUED - 3 * changed)], acquire_lock=False)
    assert not [result for result in made if isinstance(result, RegistryError)]
    for n in range(changed):
        a.set_metadata(f"q{n}", {"again": n})
        a.rename(f"q{n}", f"q renamed {n}")
        a.retire(f"q renamed {n}")
    assert host.lab["behind"] == QUEUED
    done = [(e.kind, e.name, e.id) for e in a.history(after=last)]
    assert len(done) == QUEUED
    host.proxy.mode = "pass"
    until(lambda: host.lab["behind"] < QUEUED, "for the first ones to come")
    fleet.lab.kill()
    fleet.lab.start()
    until(lambda: host.lab["behind"] == 0, "for all to come")
    assert labs(fleet, "q") == identities(a, "q")
    assert changes(fleet, start) == done
