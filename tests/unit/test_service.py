"""What the verbs do, asked through the real handlers on a real database, without sockets."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from helpers import FakeClock
from madsci_registry import errors
from madsci_registry.names import is_ulid
from pair import Pair

TERM = 1 << 20


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path / "registry.db")
    yield pair
    pair.close()


def test_resolve_new_name_makes_a_ulid_and_a_lock(pair: Pair) -> None:
    """A new name gets a ULID, is_new and a fencing token of this epoch."""
    answer = pair.session("a").resolve("arm", metadata={"x": 1}).ok()
    assert is_ulid(answer["id"]) and answer["is_new"] and answer["source"] == "local"
    assert answer["fencing_token"] // TERM == pair.core.epoch


def test_resolve_again_by_the_owner_is_the_same_grant(pair: Pair) -> None:
    """The same instance resolving again has the same grant; only the making request is new, repeated or not."""
    a = pair.session("a")
    first = a.resolve("arm", seq=50).ok()
    repeat, again = a.resolve("arm", seq=50).ok(), a.resolve("arm", seq=51).ok()
    assert repeat == first
    assert again == first | {"is_new": False}


def test_resolve_held_by_another_instance_of_the_process_is_me(pair: Pair) -> None:
    """Another instance of the same process is another holder, and is told that it is the same process."""
    a = pair.session("a")
    a.resolve("arm", instance="one")
    error = a.resolve("arm", instance="two").error()
    assert isinstance(error, errors.HeldError) and error.is_me
    assert error.holder is not None and error.holder.instance == "one"


def test_resolve_other_type_is_wrong_type_and_changes_nothing(pair: Pair) -> None:
    """A name is of one component type."""
    a = pair.session("a")
    a.resolve("arm", metadata={"x": 1})
    error = a.resolve("arm", "manager", metadata={"x": 2}).error()
    assert isinstance(error, errors.WrongTypeError) and (error.component_type, error.given) == ("node", "manager")
    assert a.get("arm")["metadata"] == {"x": 1}


def test_resolve_metadata_is_merged_and_refused_resolves_merge_nothing(pair: Pair) -> None:
    """Resolve merges metadata key by key; a held name's metadata does not change."""
    a, b = pair.session("a"), pair.session("b")
    a.resolve("arm", metadata={"x": 1, "y": 1})
    a.resolve("arm", metadata={"y": 2, "z": 3})
    assert b.resolve("arm", metadata={"x": 9}).code == "held"
    assert a.get("arm")["metadata"] == {"x": 1, "y": 2, "z": 3}


def test_resolve_without_lock_takes_none(pair: Pair) -> None:
    """acquire_lock=False gives the ULID, of a held name too, and holds nothing."""
    a, b = pair.session("a"), pair.session("b")
    id = a.resolve("arm").ok()["id"]
    answer = b.resolve("arm", acquire_lock=False).ok()
    assert (answer["id"], answer["fencing_token"]) == (id, None)
    assert b.resolve("new", acquire_lock=False).ok()["is_new"]
    assert not a.get("new")["locked"]


def test_wait_is_first_in_first_out_with_places(pair: Pair) -> None:
    """Waiters are granted in the order in which they came, and say at which place they stand."""
    a, b, c = (pair.session(name) for name in "abc")
    token = a.resolve("arm").ok()["fencing_token"]
    second, third = b.resolve("arm", wait_s=5.0, renew=True), c.resolve("arm", wait_s=5.0)
    assert second.reply is None and third.reply is None
    a.release("arm", token)
    granted = second.ok()["fencing_token"]
    assert granted > token and third.reply is None
    assert a.resolve("arm").error().place is None  # type: ignore[attr-defined]
    b.release("arm", granted)
    assert third.ok()["fencing_token"] > granted


def test_wait_over_is_waiting_with_renew_else_held(pair: Pair) -> None:
    """A chain's request is answered `waiting` with the place, the last one `held` with place and holder."""
    a, b = pair.session("a"), pair.session("b")
    a.resolve("arm")
    first = b.resolve("arm", wait_s=3.0, renew=True, seq=7)
    pair.wait(3.0)
    assert first.error().place == 1 and first.code == "waiting"  # type: ignore[attr-defined]
    last = b.resolve("arm", wait_s=1.0, seq=7)
    pair.wait(1.0)
    error = last.error()
    assert isinstance(error, errors.HeldError) and error.place == 1 and error.holder is not None
    assert len(pair.core.queues) == 0


def test_wait_not_renewed_loses_its_place_after_2_s(pair: Pair) -> None:
    """A waiter that does not ask again within 2 s is dropped, the next one moves up."""
    a, b, c = (pair.session(name) for name in "abc")
    a.resolve("arm")
    b.resolve("arm", wait_s=1.0, renew=True)
    waits = c.resolve("arm", wait_s=9.0, renew=True)
    pair.wait(1.0)
    pair.wait(1.9)
    assert pair.core.queues.count("arm") == 2
    pair.wait(0.2)
    assert pair.core.queues.count("arm") == 1
    a.ended()
    assert waits.code == "ok"


def test_wait_renewed_between_keeps_place_and_is_granted_between_requests(pair: Pair) -> None:
    """A name that becomes free between two requests of a waiter is granted to it by the next one."""
    a, b = pair.session("a"), pair.session("b")
    token = a.resolve("arm").ok()["fencing_token"]
    b.resolve("arm", wait_s=1.0, renew=True, seq=7)
    pair.wait(1.0)
    a.release("arm", token)
    assert b.resolve("arm", wait_s=1.0, renew=True, seq=7).ok()["fencing_token"] > token


def test_cancel_removes_the_waiter_or_frees_exactly_its_grant(pair: Pair) -> None:
    """Cancel of a sequence takes its waiter out, or ends the lock that it was granted, and no other."""
    a, b = pair.session("a"), pair.session("b")
    a.resolve("arm", seq=1)
    a.resolve("arm", seq=2)  # the same grant: request 1 was granted it
    b.resolve("arm", wait_s=9.0, seq=3)
    pair.core.registrar.cancel(b.record, 3)
    pair.turn()
    assert len(pair.core.queues) == 0
    pair.core.registrar.cancel(a.record, 2)
    pair.turn()
    assert a.get("arm")["locked"]
    pair.core.registrar.cancel(a.record, 1)
    pair.turn()
    assert not a.get("arm")["locked"]


def test_cancel_that_overtakes_its_request_withdraws_it(pair: Pair) -> None:
    """A request that was cancelled before it was read is not run: nobody would hear of the grant."""
    a = pair.session("a")
    pair.core.registrar.cancel(a.record, 9)
    pair.turn()
    assert a.resolve("arm", seq=9).code == "timeout"
    assert a.send("lookup", name="arm").ok() == {"id": None}


def test_cancel_of_the_first_waiter_lets_the_next_one_have_a_free_name(pair: Pair) -> None:
    """A name that is free but reserved for a waiter that could not hear goes on when that one gives up."""
    a, b, c = (pair.session(name) for name in "abc")
    a.resolve("arm")
    b.resolve("arm", wait_s=9.0, seq=3)
    b.drop()
    a.ended()
    assert c.resolve("arm").code == "held"  # b's place is kept for 2 s
    waits = c.resolve("arm", wait_s=9.0)
    pair.turn()
    pair.wait(2.0)
    assert waits.code == "ok"


def test_no_grant_to_the_dead(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """After no commit does a dead session hold a name that it was granted in it: a waiter that died unnoticed is
    passed over, and one that dies while it is granted loses it in the same transaction."""
    registrar = pair.core.registrar
    run = registrar._batch.run

    def checked(writes: Any) -> Any:
        before = {s for (s,) in pair.core.db.execute("SELECT session_id FROM locks")}
        tx = run(writes)
        after = {s for (s,) in pair.core.db.execute("SELECT session_id FROM locks")}
        assert not (after - before) & pair.dead
        return tx

    monkeypatch.setattr(registrar._batch, "run", checked)
    a, b, c = (pair.session(name) for name in "abc")
    a.resolve("arm")
    b.resolve("arm", wait_s=9.0)
    waits = c.resolve("arm", wait_s=9.0)
    b.die()
    a.ended()
    assert waits.code == "ok"
    assert "b" not in {e["session"] for e in c.send("history").ok()["events"] if e["kind"] == "granted"}
    dying = pair.session("dying")
    dying.die()
    dying.resolve("other")
    assert not a_component(pair, "other")["locked"]


def a_component(pair: Pair, name: str) -> dict[str, Any]:
    return pair.session(f"looks at {name}").get(name)


def test_two_threads_of_one_owner_waiting_are_both_granted(pair: Pair) -> None:
    """Two requests of one owner that wait for one name have the same grant."""
    a, b = pair.session("a"), pair.session("b")
    a.resolve("arm")
    one, two = b.resolve("arm", wait_s=9.0), b.resolve("arm", wait_s=9.0)
    a.ended()
    assert one.ok()["fencing_token"] == two.ok()["fencing_token"]


def test_connection_lost_ends_locks_after_2_s_unless_resumed(pair: Pair) -> None:
    """A living process whose connection ended keeps its locks for 2 s; resumed in time it keeps them for good."""
    a, b = pair.session("a"), pair.session("b")
    a.resolve("arm")
    b.resolve("leg")
    a.drop()
    b.drop()
    pair.wait(1.5)
    b.resume()
    pair.wait(1.0)
    assert not a_component(pair, "arm")["locked"]
    assert a_component(pair, "leg")["locked"]
    assert "a" not in pair.core.registrar.sessions


def test_release_needs_the_token_and_the_instance(pair: Pair) -> None:
    """A release with another token, instance or session changes nothing."""
    a, b = pair.session("a"), pair.session("b")
    token = a.resolve("arm").ok()["fencing_token"]
    assert not a.release("arm", token + 1)
    assert not a.release("arm", token, instance="other")
    assert not b.release("arm", token)
    assert not a.release("unknown", token)
    assert a.get("arm")["locked"]
    assert a.release("arm", token)
    assert not a.release("arm", token)


def test_fencing_tokens_grow_over_restart_clock_and_retire(pair: Pair) -> None:
    """A name's tokens grow over releases, retire and revive, restarts, and a clock that went back by a year."""
    seen: list[int] = []
    for _ in range(4):
        a = pair.session(f"a{len(seen)}")
        answer = a.resolve("arm").ok()
        seen.append(answer["fencing_token"])
        a.release("arm", answer["fencing_token"])
        a.send("retire", name="arm", id=answer["id"]).ok()
        pair.clock.jump(-365 * 86400)
        pair.restart()
    assert seen == sorted(set(seen))


def test_fencing_token_overflow_raises_that_names_term_and_the_next_epoch(pair: Pair) -> None:
    """Where a name's counter overflows, its term runs ahead, and the next start's epoch is above it."""
    a = pair.session("a")
    a.resolve("arm")
    top = (pair.core.epoch + 3) * TERM - 1
    with pair.core.db:
        pair.core.db.execute("UPDATE names SET last_token = ? WHERE name = 'arm'", (top,))
    a.ended()
    b = pair.session("b")
    token = b.resolve("arm").ok()["fencing_token"]
    assert token == top + 1
    b.ended()
    pair.restart()
    assert pair.session("c").resolve("arm").ok()["fencing_token"] > token
    assert pair.core.epoch > top // TERM


def test_revisions_never_repeat_over_a_restart(pair: Pair) -> None:
    """A start begins above every revision that could have been given."""
    before = pair.core.store.revision
    pair.clock.jump(-365 * 86400)
    pair.restart()
    assert pair.core.store.revision > before + TERM


def test_restart_keeps_locks_of_the_living_and_frees_those_of_the_dead(pair: Pair) -> None:
    """Over a restart a living holder keeps lock and token, a dead one's name is free."""
    a, b = pair.session("a"), pair.session("b")
    token = a.resolve("arm").ok()["fencing_token"]
    b.resolve("leg")
    b.die()
    pair.restart()
    looked = a_component(pair, "arm")
    assert looked["locked"] and looked["fencing_token"] == token
    assert not a_component(pair, "leg")["locked"]
    pair.wait(86400.0)
    assert a_component(pair, "arm ".strip())["locked"]


def test_stale_epoch_is_refused(pair: Pair) -> None:
    """A request meant for an earlier run of the daemon is not run."""
    a = pair.session("a")
    error = a.resolve("arm", epoch=pair.core.epoch - 1).error()
    assert isinstance(error, errors.StaleEpochError) and error.epoch == pair.core.epoch
    assert a.send("lookup", name="arm").ok() == {"id": None}


def test_rename_moves_the_ulid_and_says_where_it_went(pair: Pair) -> None:
    """After a rename the new name has the ULID, the old one is absent, and resolving it makes another one."""
    a = pair.session("a")
    id = a.resolve("old", acquire_lock=False).ok()["id"]
    for _ in range(2):  # the second is a repeat
        a.send("rename", old="old", new="new", id=id).ok()
    assert a.send("lookup", name="new").ok() == {"id": id}
    assert a.send("lookup", name="old").ok() == {"id": None}
    error = a.send("get", name="old").error()
    assert isinstance(error, errors.NotFoundError) and error.renamed_to == "new"
    fresh = a.resolve("old").ok()
    assert fresh["id"] != id and "new" in fresh["warnings"][0]


def test_rename_refuses_held_taken_and_unexpected(pair: Pair) -> None:
    """A held name is not renamed without force, never to a known name, and only the component that was meant."""
    a, b = pair.session("a"), pair.session("b")
    id = a.resolve("arm").ok()["id"]
    other = b.resolve("leg").ok()["id"]
    assert b.send("rename", old="arm", new="n", id=id).code == "held"
    assert b.send("rename", old="arm", new="leg", id=id, force=True).code == "name_taken"
    assert b.send("rename", old="arm", new="n", id=other, force=True).code == "conflict"
    assert b.send("rename", old="none", new="n", id=other).code == "not_found"
    assert b.send("rename", old="arm", new="\x00", id=id, force=True).error().field == "new"  # type: ignore[attr-defined]
    assert a.get("arm")["id"] == id


def test_rename_by_force_tells_the_holder_and_keeps_tokens_growing(pair: Pair) -> None:
    """The holder keeps its lock under the new name, with its token unless the new name gave a higher one before."""
    a, b = pair.session("a"), pair.session("b")
    first = a.resolve("arm").ok()
    a.send("rename", old="arm", new="hand", id=first["id"], force=True).ok()
    assert pair.told[-1] == (
        "a",
        {
            "op": "renamed",
            "name": "arm",
            "to": "hand",
            "instance": "i",
            "old_token": first["fencing_token"],
            "fencing_token": first["fencing_token"],
        },
    )
    # the old name lives on with tokens above; coming back, its old holder needs a new one
    for _ in range(3):
        answer = b.resolve("arm").ok()
        b.release("arm", answer["fencing_token"])
    b.send("rename", old="arm", new="spare", id=answer["id"]).ok()
    moved = a.send("rename", old="hand", new="arm", id=first["id"], force=True).ok()["component"]
    assert moved["fencing_token"] > answer["fencing_token"]
    assert pair.told[-1][1]["fencing_token"] == moved["fencing_token"]


def test_retire_keeps_the_ulid_and_refuses_held_names(pair: Pair) -> None:
    """Retire refuses a held name; resolving a retired name revives the same ULID."""
    a = pair.session("a")
    answer = a.resolve("arm").ok()
    assert a.send("retire", name="arm", id=answer["id"]).code == "held"
    a.release("arm", answer["fencing_token"])
    seen = a.get("arm")["last_seen"]
    assert a.send("retire", name="arm", id=answer["id"], unseen_since=seen).code == "conflict"
    assert a.send("retire", name="arm", id=answer["id"]).ok()["changed"]
    assert not a.send("retire", name="arm", id=answer["id"]).ok()["changed"]
    assert a.get("arm")["state"] == "retired"
    again = a.resolve("arm").ok()
    assert (again["id"], again["is_new"]) == (answer["id"], False)


def test_break_lock_tells_the_holder_and_needs_the_token(pair: Pair) -> None:
    """Breaking names the token that it breaks, tells the holder, and hands the name on."""
    a, b = pair.session("a"), pair.session("b")
    token = a.resolve("arm").ok()["fencing_token"]
    waits = b.resolve("arm", wait_s=9.0)
    assert b.send("break_lock", name="arm", fencing_token=token - 1).ok() == {"broken": False}
    assert b.send("break_lock", name="arm", fencing_token=token, reason="stuck").ok() == {"broken": True}
    session, line = pair.told[-1]
    assert (session, line["op"], line["fencing_token"], line["reason"]) == ("a", "lost", token, "stuck")
    assert waits.ok()["fencing_token"] > token


def test_set_metadata_replaces_and_unsets(pair: Pair) -> None:
    """Set replaces keys, unset drops them, nothing else changes; limits are checked on the whole."""
    a = pair.session("a")
    id = a.resolve("arm", metadata={"x": {"deep": 1}, "y": 2}).ok()["id"]
    after = a.send("set_metadata", name="arm", id=id, set={"x": 5}, unset=["y", "none"]).ok()
    assert after["changed"] and after["component"]["metadata"] == {"x": 5}
    assert not a.send("set_metadata", name="arm", id=id, set={"x": 5}).ok()["changed"]
    assert a.send("set_metadata", name="arm", id=id, set={"big": "x" * 17000}).code == "too_large"
    assert a.send("set_metadata", name="arm", id=id, set={"a": "x" * 9000}).code == "ok"
    assert a.send("set_metadata", name="arm", id=id, set={"b": "x" * 9000}).code == "too_large"


def test_a_refused_request_spoils_no_neighbour_of_its_batch(pair: Pair) -> None:
    """In one batch a refused, a broken and a good request each get their own answer."""
    a = pair.session("a")
    good = a.resolve("one", turn=False)
    bad = a.resolve("\x07", turn=False)
    other = a.resolve("two", turn=False)
    pair.core.registrar.commit()
    assert (good.code, bad.code, other.code) == ("ok", "invalid", "ok")


def test_a_fault_of_ours_is_internal_and_undone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb that breaks after it wrote is undone, answered `internal`, and its neighbours are committed."""
    a = pair.session("a")
    original = pair.core.store.add_event

    def breaks(kind: str, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("name") == "bad":
            raise ZeroDivisionError
        original(kind, *args, **kwargs)

    monkeypatch.setattr(pair.core.store, "add_event", breaks)
    good, bad = a.resolve("good", turn=False), a.resolve("bad", turn=False)
    pair.core.registrar.commit()
    assert (good.code, bad.code) == ("ok", "internal")
    assert a.send("lookup", name="bad").ok() == {"id": None}
    assert a.resolve("later").code == "ok"


def test_import_merges_reports_and_never_rebinds(pair: Pair) -> None:
    """Each entry is added, same, conflict or invalid; what is here wins; replace retires what the file lacks."""
    a = pair.session("a")
    id = a.resolve("here", acquire_lock=False).ok()["id"]
    held = a.resolve("held").ok()["id"]
    ulid = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
    entries = [
        ["here", {"id": id, "component_type": "node"}],
        [
            "new",
            {"id": ulid, "component_type": "module", "metadata": {"k": 1}, "last_seen": "2024-01-01T00:00:00+00:00"},
        ],
        ["here2", {"id": id, "component_type": "node"}],
        ["bad", {"id": "x\n", "component_type": "node"}],
        ["new", {"id": ulid, "component_type": "module"}],
    ]
    want = ["same", "added", "conflict", "invalid", "invalid"]
    dry = a.send("import", upload="u0", entries=entries, last=True, dry_run=True).ok()["report"]
    assert [outcome for _, outcome, _ in dry] == want
    assert a.send("lookup", name="new").ok() == {"id": None}
    a.send("import", upload="u", entries=entries[:2]).ok()
    assert a.send("lookup", name="new").ok() == {"id": None}, "applied whole with its last piece"
    report = a.send("import", upload="u", entries=entries[2:], last=True).ok()["report"]
    assert [outcome for _, outcome, _ in report] == want
    assert a.get("new")["last_seen"] == "2024-01-01T00:00:00.000000Z"
    replaced = a.send("import", upload="r", entries=entries[:1], last=True, mode="replace").ok()["report"]
    assert sorted(map(tuple, replaced)) == [
        ("held", "conflict", "not in the file, but held: not retired"),
        ("here", "same", ""),
        ("new", "retired", ""),
    ]
    assert a.get("held")["id"] == held


def test_import_id_that_is_no_ulid_is_kept_and_flagged(pair: Pair) -> None:
    """An id that is no ULID is adopted as it is, told in report and history, and works in every verb that takes one."""
    a = pair.session("a")
    entries = [["arm", {"id": "node-7", "component_type": "node"}]]
    report = a.send("import", upload="u", entries=entries, last=True).ok()["report"]
    assert [tuple(line) for line in report] == [("arm", "added", "id is no ULID: kept as it is")]
    (created,) = [e for e in a.send("history", name="arm").ok()["events"] if e["kind"] == "created"]
    assert created["why"]["foreign_id"] is True
    assert a.send("whois", id="node-7").ok()["component"]["name"] == "arm"
    assert a.send("rename", old="arm", new="arm2", id="node-7").ok()["changed"]
    assert a.send("set_metadata", name="arm2", id="node-7", set={"k": 1}).ok()["changed"]
    assert a.send("retire", name="arm2", id="node-7").ok()["changed"]
    assert a.resolve("arm2").ok()["id"] == "node-7"
    assert a.send("export").ok()["entries"]["arm2"]["id"] == "node-7"


def test_pages_fit_a_frame_and_lose_nothing(pair: Pair) -> None:
    """A list of more than a frame's worth comes in pages that fit, with every name once."""
    a = pair.session("a")
    for n in range(120):
        a.resolve(f"n{n:03}", metadata={"fill": "x" * 15_000}, acquire_lock=False, turn=False)
    pair.core.registrar.commit()
    for op, key in (("list", "components"), ("export", "entries"), ("history", "events")):
        got: list[Any] = []
        cursor: Any = None
        while True:
            given = {} if cursor is None else {"after" if op == "history" else "cursor": cursor}
            reply = a.send(op, **given)
            assert len(json.dumps(reply.reply)) < 1 << 20
            page = reply.ok()
            got += page[key]
            cursor = page["cursor"]
            if cursor is None:
                break
        assert len(got) == (121 if op == "history" else 120)


def test_watch_answers_when_something_changes(pair: Pair) -> None:
    """A watch waits for the next change, and ends empty when its time is over."""
    a, b = pair.session("a"), pair.session("b")
    now = a.send("watch", after=0).ok()["revision"]
    waits = a.send("watch", after=now, wait_s=5.0)
    assert waits.reply is None
    b.resolve("arm")
    assert [e["kind"] for e in waits.ok()["events"]] == ["created", "granted"]
    empty = a.send("watch", after=waits.ok()["revision"], wait_s=5.0)
    pair.wait(5.0)
    assert empty.ok()["events"] == []


def test_watch_of_trimmed_history_is_compacted(pair: Pair) -> None:
    """After lock events were trimmed, a watch from before says so; identity events stay for ever."""
    a = pair.session("a")
    for _ in range(5):
        token = a.resolve("arm").ok()["fencing_token"]
        a.release("arm", token)
    with pair.core.db:
        pair.core.store.trim_lock_events("2000", keep=4, limit=100)
    error = a.send("watch", after=1).error()
    assert isinstance(error, errors.CompactedError)
    kinds = [e["kind"] for e in a.send("history").ok()["events"]]
    assert kinds.count("created") == 1 and len(kinds) <= 4 + 2
    assert a.send("watch", after=error.oldest).code == "ok"


def test_reassert_after_an_io_error_takes_back_only_what_is_not_contradicted(pair: Pair) -> None:
    """A holder whose grant was lost with an I/O error has it again; a newer grant or release in the database wins."""
    from madsci_registry.protocol import Hold

    a, b = pair.session("a"), pair.session("b")
    for name in ("lost", "newer", "released"):
        a.resolve(name, acquire_lock=False)
    newer = b.resolve("newer").ok()["fencing_token"]
    gone = a.resolve("released").ok()["fencing_token"]
    a.release("released", gone)
    old = pair.core.epoch * TERM + 5
    a.ended()
    pair.restart()
    c = pair.session("c")
    holds = [
        Hold(name="lost", instance="i", fencing_token=old),
        Hold(name="newer", instance="i", fencing_token=newer - 1),
        Hold(name="released", instance="i", fencing_token=gone),
        Hold(name="unknown", instance="i", fencing_token=old),
    ]
    from madsci_registryd.batch import Write

    pair.core.registrar.submit(Write(lambda tx: pair.core.service.reassert(tx, c.record, holds), lambda r: None))
    pair.core.registrar.commit()
    assert pair.core.store.locks_of("c") == [("lost", "i", old)]


def test_no_grants_for_10_s_after_an_io_error(pair: Pair) -> None:
    """While holders have time to come back nobody is granted anything; a waiter is, once it is over."""
    a = pair.session("a")
    pair.core.service.no_grants_before = pair.clock.monotonic() + 10
    pair.core.service.why_no_grants = "a backup was restored"
    refused = a.resolve("arm").error()
    assert (refused.code, str(refused)[:22]) == ("busy", "a backup was restored:")
    waits = a.resolve("arm", wait_s=10.0, renew=True)
    pair.wait(10.0)
    pair.core.registrar.reconsider("arm")
    pair.turn()
    assert waits.code in ("ok", "waiting")
    assert a.resolve("arm", instance="j").code == "held"


BAD = [
    (b"", "frame"),
    (b"\xff\xfe", "frame"),
    (b"[]", "op"),
    (b'{"op":"lookup","name":"\\ud800","token":"a","epoch":1,"seq":1}', "name"),
    (b'{"op":"resolve","metadata":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "frame"),
    (b'{"op":"resolve","metadata":' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}", "metadata"),
    (b'{"op":"nothing"}', "op"),
    (b'{"op":"lookup","token":"a","epoch":1,"seq":1}', "name"),
    (b'{"op":"lookup","name":"x","token":"a","epoch":1e999,"seq":1}', "epoch"),
    (b'{"op":"lookup","name":"x","token":"a","epoch":1,"seq":1,"extra":1}', "extra"),
    (b'{"op":"lookup","name":"x","token":"a","epoch":1,"seq":-1}', "seq"),
]


@pytest.mark.parametrize(("frame", "field"), BAD)
def test_rubbish_is_invalid_and_names_the_field(pair: Pair, frame: bytes, field: str) -> None:
    """Bad input gets an error with a stable code that names the field."""
    error = pair.session("a").raw(frame).error()
    assert isinstance(error, errors.InvalidError) and error.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "   "}, "name"),
        ({"name": "x" * 256}, "name"),
        ({"name": "a\x00b"}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "e\u0301"}, "name"),
        ({"name": "ä" * 128}, "name"),
        ({"metadata": {"x": "\x00"}}, "metadata.x"),
        ({"metadata": {"x": {"y": "z" * 17000}}}, "metadata"),
        ({"wait_s": 11.0}, "wait_s"),
        ({"component_type": "robot"}, "component_type"),
    ],
)
def test_resolve_of_what_may_not_be_is_refused_with_the_field(pair: Pair, fields: dict[str, Any], field: str) -> None:
    """A name or metadata over the limits is refused with the field's name, and nothing is made."""
    a = pair.session("a")
    given = {"name": "arm", "component_type": "node", "instance": "i"} | fields
    error = a.send("resolve", **given).error()
    assert isinstance(error, (errors.InvalidError, errors.TooLargeError)) and error.field == field
    assert a.send("list").ok()["components"] == []


@pytest.mark.parametrize("name", ["a/b c", "ä" * 127, "x" * 255, "名前", "🤖"])
def test_resolve_of_odd_but_good_names(pair: Pair, name: str) -> None:
    """Slashes, spaces and any letters are fine."""
    assert pair.session("a").resolve(name).ok()["name"] == name


def test_nan_in_metadata_is_refused(pair: Pair) -> None:
    """NaN and Infinity, which JSON has not, are refused though lenient parsers read them."""
    a = pair.session("a")
    for text in (b"NaN", b"Infinity", b"1e999"):
        head = f'{{"op":"resolve","token":"a","epoch":{pair.core.epoch},"seq":1,"name":"n","component_type":"node",'
        frame = head.encode() + b'"instance":"i","metadata":{"x":' + text + b"}}"
        error = a.raw(frame).error()
        assert isinstance(error, errors.InvalidError) and (error.field or "").startswith("metadata")


def test_other_protocol_version_is_told_before_anything_else(pair: Pair) -> None:
    """A client of another protocol version gets both versions, even where its request is not understood."""
    a = pair.session("a")
    for frame in (
        b'{"op":"lookup","v":99,"name":"x","token":"a","epoch":1,"seq":1}',
        b'{"op":"from the future","v":99,"what":1}',
    ):
        error = a.raw(frame).error()
        assert isinstance(error, errors.ProtocolVersionError) and error.client == 99


def test_missing_session_is_session_required(pair: Pair) -> None:
    """A request with an unknown token is refused."""
    a = pair.session("a")
    assert a.raw(b'{"op":"lookup","name":"x","token":"stranger","epoch":1,"seq":1}').code == "session_required"
    a.drop()
    assert a.send("lookup", name="x").code == "session_required"


def test_full_disk_is_no_space_for_writes_only_and_heals(pair: Pair) -> None:
    """On a full disk writes get no_space, reads go on, deaths are written later, and it heals without a restart."""
    a, b = pair.session("a"), pair.session("b")
    a.resolve("arm")
    pages = pair.core.db.pragma("page_count")
    pair.core.db.pragma("max_page_count", pages)
    filled = False
    for n in range(2000):
        if a.resolve(f"n{n}", metadata={"x": "y" * 3000}, acquire_lock=False).code == "no_space":
            filled = True
            break
    assert filled
    assert b.get("arm")["locked"]
    pair.core.registrar.end_session(a.record, "its process died")
    pair.core.registrar.commit()
    pair.core.db.pragma("max_page_count", 1 << 30)
    pair.wait(1.0)
    assert not b.get("arm")["locked"]
    assert b.resolve("arm").code == "ok"


def test_identities_are_synced_and_locks_need_not_be(pair: Pair) -> None:
    """What changes an identity is committed with synchronous=FULL, grants and releases of known names with NORMAL."""
    full, normal = 2, 1

    def synchronous() -> Any:
        return pair.core.db.pragma("synchronous")

    a = pair.session("a")
    token = a.resolve("arm").ok()["fencing_token"]
    assert synchronous() == full, "a new name"
    a.release("arm", token)
    assert synchronous() == normal, "a release"
    id = a.resolve("arm").ok()["id"]
    assert synchronous() == normal, "a grant of a known name"
    a.resolve("arm", metadata={"x": 1})
    assert synchronous() == full, "new metadata"
    a.ended()
    assert synchronous() == normal, "a death"
    b = pair.session("b")
    b.send("retire", name="arm", id=id).ok()
    assert synchronous() == full, "a retirement"
    b.resolve("arm").ok()
    assert synchronous() == full, "a revival, although the name is known"


def test_sessions_that_only_read_leave_no_row(pair: Pair) -> None:
    """A session is written down with its first write, and its row goes with its end."""
    reader, writer = pair.session("r"), pair.session("w")
    reader.send("lookup", name="x")
    writer.resolve("arm")
    rows = list(pair.core.db.execute("SELECT id FROM sessions"))
    assert rows == [("w",)]
    writer.ended()
    assert list(pair.core.db.execute("SELECT id FROM sessions")) == []


def test_no_clock_step_ends_or_keeps_a_lock(tmp_path: Path) -> None:
    """The wall clock may jump by a day either way: locks and waits go by monotonic time."""
    clock = FakeClock()
    pair = Pair(tmp_path / "registry.db", clock)
    a, b = pair.session("a"), pair.session("b")
    a.resolve("arm")
    waits = b.resolve("arm", wait_s=5.0)
    for step in (86400.0, -2 * 86400.0):
        clock.jump(step)
        pair.turn()
    assert waits.reply is None and b.get("arm")["locked"]
    pair.wait(5.0)
    assert waits.code == "held"
    pair.close()


def test_infinite_times_are_not_json() -> None:
    """math.inf never goes over the wire: the client's chain of finite waits stands for it."""
    from madsci_registry.protocol import encode

    with pytest.raises(ValueError):
        encode({"wait_s": math.inf})


def test_database_errors_are_not_answers(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error at commit leaves the outcome unknown: nobody is answered, the batch raises StorageFault."""
    from madsci_registryd.faults import StorageFault

    a = pair.session("a")

    def fails(tx: Any) -> None:
        raise apsw.IOError("disk I/O error")

    from madsci_registryd.batch import Write

    asked = a.resolve("arm", turn=False)
    pair.core.registrar.submit(Write(fails, lambda r: None))
    with pytest.raises(StorageFault):
        pair.core.registrar.commit()
    assert asked.reply is None
