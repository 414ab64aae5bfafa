"""What the lab is told anew: by its mark, or all at once where it is another lab, was set back or does not know us."""

from __future__ import annotations

import json
from pathlib import Path

from forwarding import Forwarding, InnerLab
from helpers import FakeClock
from madsci_registry_lab.store import Change, State
from madsci_registryd.forwarder import PACE_S

AT = "2026-01-01T00:00:00.000000Z"


def test_lab_that_was_set_back_is_told_again_from_its_mark(here: Forwarding, tmp_path: Path) -> None:
    """A lab that was restored from a backup gets what it has lost, by the next keepalive, though nothing changes."""
    here.make("first")
    here.run()
    mark = here.lab.mark("here")
    assert mark is not None
    ids = {name: here.make(name) for name in ("second", "third")}
    here.run()
    older = InnerLab(tmp_path / "older", FakeClock())
    here.lanes.lab, newer, here.lab = older, here.lab, older
    older.registry.store.apply("here", mark[0], None, mark[1], [])
    here.keepalive()
    here.keepalive()
    assert older.names() == ids
    assert len(here.sent("/registry/sync")) == 0
    older.close()
    here.lab = newer


def test_lab_that_was_set_back_is_noticed_by_its_refusal(here: Forwarding, tmp_path: Path) -> None:
    """Changes that do not follow on what a restored lab has are answered with its mark, and sent from there."""
    here.make("first")
    here.run()
    mark = here.lab.mark("here")
    assert mark is not None
    here.make("second")
    here.run()
    older = InnerLab(tmp_path / "older", FakeClock())
    here.lanes.lab, newer, here.lab = older, here.lab, older
    older.registry.store.apply("here", mark[0], None, mark[1], [])
    here.make("third")
    here.run()
    here.wait(1)
    assert [*older.names()] == ["second", "third"]
    older.close()
    here.lab = newer


def test_new_lab_gets_all_by_a_sync(here: Forwarding, tmp_path: Path) -> None:
    """A lab that has nothing of a host is told all that there is now: retired names too, none of the past ones."""
    arm, leg = here.make("arm", rack=1), here.make("leg")
    here.rename("arm", "left arm")
    here.retire("leg")
    here.run()
    new = InnerLab(tmp_path / "new", FakeClock())
    here.lanes.lab, before, here.lab = new, here.lab, new
    here.keepalive()
    here.keepalive()
    assert new.names() == {"left arm": arm, "leg": leg}
    assert new.find("leg").retired and json.loads(new.find("left arm").metadata) == {"rack": 1}
    assert here.sent() == []
    here.make("hand")
    here.run()
    assert "hand" in new.names()
    new.close()
    here.lab = before


def test_other_numbering_is_told_all_anew(here: Forwarding) -> None:
    """A registry that was copied numbers its changes anew: it syncs, and goes on from there."""
    here.make("arm")
    here.run()
    here.host.epoch += 1
    asked = len(here.lab.asked)
    here.make("leg")
    here.run()
    assert here.forwarder.revision == 0
    assert len(here.lab.asked) == asked, "nothing is sent until the lab was told of it"
    here.keepalive()
    mark = here.lab.mark("here")
    assert mark is not None and mark[0] == here.host.epoch
    assert [*here.lab.names()] == ["arm", "leg"]
    assert here.forwarder.revision == mark[1]


def test_answer_to_the_last_numbering_is_not_noted_for_the_next(here: Forwarding) -> None:
    """What the lab had of a numbering that has just ended is no word about the next one."""
    here.make("arm")
    here.turn()
    here.lanes.work()
    with here.pair.core.db:
        here.host.epoch += 1
        here.pair.core.store.drop_meta("lab_revision")
    here.turn()
    assert here.pair.core.store.meta("lab_revision") is None


def test_mark_that_is_none_of_our_changes_leads_to_a_sync(here: Forwarding) -> None:
    """A mark that no change of this database has is of another history (it was set back to a backup): all is told."""
    here.make("arm")
    here.run()
    epoch, revision = here.lab.mark("here") or (0, 0)
    here.lab.registry.store.apply("here", epoch, revision, revision + 7, [])
    here.keepalive()
    here.keepalive()
    assert len(here.sent("/registry/sync")) == 2
    assert here.lab.mark("here") == (epoch, revision + 7), "which never goes back"


def test_change_during_a_sync_is_told_after_it(tmp_path: Path) -> None:
    """What changes while all is being told is told afterwards, as it went: swapped names too."""
    with Forwarding(tmp_path) as here:
        ids = {f"n{n:03}": here.make(f"n{n:03}") for n in range(200)}
        here.forwarder.begin(None)
        for _ in range(4):
            here.turn()  # some names are read
        here.rename("n000", "away")
        here.rename("n199", "n000")
        here.rename("away", "n199")
        here.rename("n150", "z")
        here.rename("z", "n200")
        here.rename("n160", "z")
        late = here.make("a late one")
        here.run()
        expected = ids | {"n000": ids["n199"], "n199": ids["n000"], "a late one": late}
        expected |= {"n200": expected.pop("n150"), "z": expected.pop("n160")}
        assert here.lab.names() == dict(sorted(expected.items()))
        assert here.lab.registry.store.about().conflicts == 0
        assert here.forwarder.behind() == 0


def test_keepalive_during_a_sync_leaves_it_alone(tmp_path: Path) -> None:
    """A sync of many names goes on, though the lab says with each keepalive meanwhile that it has no mark."""
    with Forwarding(tmp_path) as here:
        for n in range(200):
            here.make(f"n{n}", text="x" * 500)
        here.forwarder.begin(None)
        while here.forwarder.behind():
            here.turn()
            if here.lanes.work():
                here.clock.advance(PACE_S)
                here.forwarder.begin(here.lab.mark("here"))
        states = [state["name"] for body in here.sent("/registry/sync") for state in body["components"]]
        assert len(states) == 200


def test_sync_that_is_interrupted_begins_anew(tmp_path: Path) -> None:
    """A lab that went away in the middle of a sync is told all of it again: it may be another one."""
    with Forwarding(tmp_path) as here:
        made = {f"n{n:04}": here.make(f"n{n:04}", text="x" * 1000) for n in range(200)}
        here.forwarder.begin(None)
        while not here.lanes.waiting:
            here.turn()
        here.lanes.work()
        here.clock.advance(PACE_S)
        while not here.lanes.waiting:
            here.turn()
        here.lanes.fault = "away"
        here.lanes.work()
        new = InnerLab(tmp_path / "new", FakeClock())
        here.lanes.lab, before, here.lab = new, here.lab, new
        here.lanes.fault = ""
        here.keepalive()
        here.wait(1)
        assert new.names() == made
        new.close()
        here.lab = before


def test_mark_of_a_sync_is_a_change_that_is_never_lost(tmp_path: Path) -> None:
    """A sync ends with a revision that outlasts a power loss, which those of locks do not."""
    with Forwarding(tmp_path) as here:
        here.client.resolve("arm").ok()
        here.keepalive()
        last = here.pair.core.store.events(0, 100)
        assert [event["kind"] for event in last] == ["started", "created", "granted"]
        assert here.lab.mark("here") == (1, last[1]["revision"])


def test_sync_whose_last_answer_was_lost_is_not_made_again(tmp_path: Path) -> None:
    """Where the lab has noted the end of a sync, the next keepalive says so, and it is done."""
    with Forwarding(tmp_path) as here:
        here.make("arm")
        here.lanes.fault = "lost"
        here.keepalive()
        here.lanes.fault = ""
        here.keepalive()
        here.wait(1)
        assert len(here.sent("/registry/sync")) == 1
        assert here.forwarder.behind() == 0


def test_empty_registry_syncs_once(here: Forwarding) -> None:
    """A host without a name has a mark in the lab after the first contact, and asks no more."""
    assert here.lab.mark("here") is not None
    asked = len(here.lab.asked)
    here.keepalive()
    here.wait(100)
    assert len(here.lab.asked) == asked


def test_answer_from_before_a_new_beginning_does_not_count(here: Forwarding) -> None:
    """What comes of a request that was under way when all began anew is no delivery of what is sent since."""
    here.make("arm")
    here.turn()
    assert here.lanes.waiting
    here.host.epoch += 1
    here.forwarder.begin(None)
    here.lanes.work()
    assert here.forwarder.revision == 0
    here.run()
    assert here.lab.mark("here") == (here.host.epoch, here.forwarder.revision)


def test_two_hosts_keep_their_own_marks(tmp_path: Path) -> None:
    """Each host is told of by itself, in order per host."""
    lab = InnerLab(tmp_path, FakeClock())
    with Forwarding(tmp_path, lab, name="a") as a, Forwarding(tmp_path, lab, name="b") as b:
        a.keepalive()
        b.keepalive()
        a.make("arm")
        b.make("leg")
        a.run()
        b.run()
        assert [*lab.names()] == ["arm", "leg"]
        assert lab.mark("a") == (1, a.forwarder.revision)
        assert lab.mark("b") == (1, b.forwarder.revision)
    lab.close()


def test_lab_has_a_later_word_in_a_sync_that_stays(tmp_path: Path) -> None:
    """A sync changes nothing of which the lab has a later word; that is counted, and nothing changes here."""
    with Forwarding(tmp_path) as here:
        id = here.make("arm", n=1)
        later = State(
            id=id, name="arm", component_type="node", metadata='{"n":9}', created_at=AT, changed_at="2999" + AT[4:]
        )
        here.lab.registry.store.apply("there", 1, 0, 1, [Change(1, later)])
        here.keepalive()
        assert here.lab.find("arm").metadata == '{"n":9}'
        assert here.client.get("arm")["metadata"] == {"n": 1}
        assert here.forwarder.objections.counts == {"newer": 1}
        assert here.forwarder.behind() == 0
