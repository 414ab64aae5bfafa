"""The routes that MADSci's IdentityResolver was written against: by hand, and by our own classic API on two hosts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from ulid import ULID

from classic import Classic, warned
from helpers import DaemonProcess
from labs import MARK, LabProcess, client
from madsci_registry._lab import Known, Lab

ODD_NAMES = ["a/b c", "a/lock", "a/unlock", "lock", "..", ".", "100%25 é?#[x]", "a\\b;c=d&e+f", "//", "%2F"]


@pytest.fixture
def two_hosts(registry_path: Path) -> Iterator[list[Classic]]:
    """The classic API on two registries, as of two hosts, each with its daemon."""
    with ExitStack() as stack:
        made = []
        for name in ("one", "two"):
            folder = registry_path.parent / name
            folder.mkdir()
            daemon = stack.enter_context(DaemonProcess(folder / "registry.json"))
            made.append(stack.enter_context(Classic(daemon.registry)))
        yield made


def held_by(instance: str, id: str, **more: Any) -> dict[str, Any]:
    """Return an entry as the documented client sends it."""
    holder = {"lock_holder_host": "lab1", "lock_holder_pid": 7, "lock_holder_instance": instance}
    return {"id": id, "component_type": "node", "metadata": {"a": 1}, "acquire_lock": True, **holder, **more}


def test_documented_steps_are_answered_as_documented(http: httpx.Client) -> None:
    """Absent is 404; an entry is taken in, and is 200 from then on, with its ULID; the same once more changes nothing;
    another ULID is 409 and a conflict that both sides are known of."""
    assert http.get("/registry/resolve/doc").status_code == 404
    cursor = http.get("/registry/changes").json()["cursor"]
    entry = {"id": (id := str(ULID())), "component_type": "node", "metadata": {"a": 1}}
    for _ in range(2):
        assert http.post("/registry/entries/doc", json=entry).json() == {"id": id}
    assert http.get("/registry/resolve/doc").json() == {"id": id, "name": "doc", "component_type": "node"}
    other = http.post("/registry/entries/doc", json={**entry, "id": (other_id := str(ULID()))})
    assert (other.status_code, other.json()["code"], other.json()["id"]) == (409, "conflict", id)
    events = http.get("/registry/changes", params={"cursor": cursor}).json()["events"]
    assert [(e["kind"], e["id"]) for e in events] == [("created", id), ("conflict", other_id)]
    elsewhere = http.post("/registry/entries/doc 2", json=entry)
    assert (elsewhere.status_code, elsewhere.json()["name"]) == (409, "doc")


def test_lock_and_unlock_are_answered_as_documented(http: httpx.Client) -> None:
    """A lock is the instance's until it unlocks; another one is 409 with the holder; an unlock of who holds nothing is
    200 and does nothing."""
    id = str(ULID())
    taken = http.post("/registry/entries/held", json=held_by("i1", id))
    assert (taken.status_code, taken.json()["holder_instance"]) == (200, "i1")
    other = {"holder_host": "lab2", "holder_pid": 9, "holder_instance": "i2"}
    held = http.post("/registry/entries/held/lock", json=other)
    assert (held.status_code, held.json()["code"]) == (409, "held")
    assert held.json()["lab_holder"] == {"holder_host": "lab1", "holder_pid": 7, "holder_instance": "i1"}
    assert http.post("/registry/entries/held", json=held_by("i2", id)).status_code == 409
    unlock = "/registry/entries/held/unlock"
    assert http.post(unlock, json={"holder_instance": "i2"}).json() == {"released": False}
    assert http.post("/registry/entries/held/lock", json={**other, "holder_instance": "i1"}).status_code == 200
    assert http.post(unlock, json={"holder_instance": "i1"}).json() == {"released": True}
    assert "unknown i1" not in http.get("/registry/hosts").text
    again = http.post("/registry/entries/held/lock", json=other)
    assert (again.status_code, again.json()["id"], again.json()["holder_host"]) == (200, id, "lab2")
    assert http.post("/registry/entries/none/lock", json=other).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("bad", {"component_type": "node"}, "id"),
        ("bad", {"id": "", "component_type": "node"}, "id"),
        ("bad", {"id": "x", "component_type": "robot"}, "component_type"),
        ("bad", {"id": "x", "component_type": "node", "acquire_lock": True}, "lock_holder_instance"),
        ("bad", {"id": "x", "component_type": "node", "metadata": {"a": "y" * 20_000}}, "metadata"),
        ("%20", {"id": "x", "component_type": "node"}, "name"),
        ("%FF", {"id": "x", "component_type": "node"}, "name"),
        ("bad/x", {"id": "x", "component_type": "node"}, "name"),
        ("bad/lock/x", {}, "name"),
        ("bad/lock", {}, "holder_instance"),
        ("bad/unlock", {"holder_instance": 5}, "holder_instance"),
    ],
)
def test_bad_input_is_named(http: httpx.Client, path: str, body: dict[str, Any], field: str) -> None:
    """A path or body that is not as documented is refused, with the field's name and the lab's mark."""
    answer = http.post(f"/registry/entries/{path}", json=body)
    assert answer.status_code in (413, 422)
    assert (answer.json()["field"], answer.headers[MARK]) == (field, "1")
    assert http.get("/registry/resolve/bad").status_code == 404


def test_refused_lock_leaves_no_session(http: httpx.Client) -> None:
    """Who is refused a lock, of a held name or of one that is none, is no host that is heard."""
    http.post("/registry/entries/taken", json=held_by("first", str(ULID())))
    for name, status in (("taken", 409), ("nothing", 404)):
        refused = http.post(f"/registry/entries/{name}/lock", json={"holder_instance": "refused"})
        assert refused.status_code == status
    hosts = http.get("/registry/hosts").text
    assert "unknown first" in hosts
    assert "refused" not in hosts


def test_locks_of_one_instance_do_not_disturb_each_other(served: LabProcess) -> None:
    """An instance that gives back its only lock while it takes another one has the other one."""

    def lock_and_unlock(n: int) -> list[int]:
        path, me = f"/registry/entries/one-of-{n}", {"holder_instance": "busy"}
        with client(served.url) as http:
            http.post(path, json={"id": str(ULID()), "component_type": "node"})
            return [http.post(f"{path}/{verb}", json=me).status_code for _ in range(60) for verb in ("lock", "unlock")]

    with ThreadPoolExecutor(4) as pool:
        assert {status for statuses in pool.map(lock_and_unlock, range(4)) for status in statuses} == {200}


def test_route_that_is_encoded_is_refused(http: httpx.Client) -> None:
    """A path whose route itself is percent-encoded is refused, and is no fault of the lab."""
    for path in ("/registry/%72esolve/arm", "/registry%2Fresolve/arm"):
        assert http.get(path).json()["field"] == "name"
    for path in ("/registry/%65ntries/arm", "/registry/entries%2Farm/lock"):
        assert http.post(path, json={}).json()["field"] == "name"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_go_through_our_client(served: LabProcess, name: str) -> None:
    """Names with slashes, dots, percent signs and the words of other routes are taken in, found and unlocked by the
    client's lab."""
    lab, id = Lab(served.url), str(ULID())
    assert lab.find(name) is None
    lab.tell(name, held_by("odd", id))
    assert lab.find(name) == Known(id, "node")
    lab.unlock(name, "odd", 5.0)
    with client(served.url) as http:
        assert http.post("/registry/lookup", json={"name": name}).json()["lock"] is None


def test_component_that_moves_to_another_host_keeps_its_ulid(
    served: LabProcess, two_hosts: list[Classic], caplog: pytest.LogCaptureFixture
) -> None:
    """An IdentityResolver on another host has the ULID that the first one made, without a warning if it is released."""
    first, second = (made.resolver(served.url) for made in two_hosts)
    made = first.resolve_with_info("mover", "node", {"rack": 3})
    assert made.is_new
    with client(served.url) as http:
        entry = http.post("/registry/lookup", json={"name": "mover"}).json()
        assert entry["lock"]["holder"]["holder_instance"] == first.local_registry.lock_manager.instance_id
        first.release("mover")
        assert http.post("/registry/lookup", json={"name": "mover"}).json()["lock"] is None
    moved = second.resolve_with_info("mover", "node")
    assert (moved.id, moved.source, moved.is_new) == (made.id, "lab", False)
    assert warned(caplog) == ""


def test_holder_on_another_host_is_a_warning(
    served: LabProcess, two_hosts: list[Classic], caplog: pytest.LogCaptureFixture
) -> None:
    """An IdentityResolver that resolves what another host holds is warned, by the lab's words; nothing fails."""
    first, second = (made.resolver(served.url) for made in two_hosts)
    id = first.resolve("busy arm", "node")
    with caplog.at_level(logging.WARNING):
        assert second.resolve("busy arm", "node") == id
    assert "answered 409" in warned(caplog)
    assert "is held by" in warned(caplog)
