"""IdentityResolver with a lab of its own: local first, then the lab, never fatal, in bounded time, nowhere else.

The lab is a stub with the documented routes (tests/lab_stub.py), and further down the real service; the registry's
daemon is a real one.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from classic import OTHER_ULID, ULID, Classic, node, warned
from helpers import PATIENCE_S, DaemonProcess, until
from lab_stub import LabStub
from labs import LabProcess, client
from madsci_registry import RegistryLockError
from madsci_registry._lab import Lab
from madsci_registry.names import is_ulid

ODD_NAMES = ["a/b c", "..", ".", "100%25 é?#[x]", "a\\b;c=d&e+f"]


# the documented steps


def test_name_that_nobody_knows_is_made_here_and_told(lab: LabStub, classic: Classic) -> None:
    """A name that neither knows gets a ULID here; then the lab is told of it and of who holds it."""
    resolver = classic.resolver(lab.url)
    result = resolver.resolve_with_info("arm", "node", {"rack": 3})
    mine = resolver.local_registry.lock_manager
    assert is_ulid(result.id) and (result.is_new, result.source) == (True, "new")
    assert lab.requests == [("GET", "/registry/resolve/arm"), ("POST", "/registry/entries/arm")]
    body = {"id": result.id, "component_type": "node", "metadata": {"rack": 3}, "acquire_lock": True}
    body |= {"lock_holder_host": socket.gethostname(), "lock_holder_pid": os.getpid()}
    assert lab.entries == [("arm", body | {"lock_holder_instance": mine.instance_id})]


def test_name_that_the_lab_knows_keeps_its_ulid(lab: LabStub, classic: Classic) -> None:
    """A name that is new here and known to the lab gets the lab's ULID, its lock and its metadata here, and says so."""
    lab.known["arm"] = {"id": ULID, "component_type": "node"}
    resolver = classic.resolver(lab.url)
    result = resolver.resolve_with_info("arm", "node", {"rack": 3})
    assert (result.id, result.is_new, result.source) == (ULID, False, "lab")
    entry = resolver.local_registry.get_entry("arm")
    assert entry is not None and entry.id == ULID and entry.metadata == {"rack": 3} and entry.is_locked()
    assert [body["id"] for _, body in lab.entries] == [ULID]


def test_name_that_is_known_here_is_not_asked_for(lab: LabStub, classic: Classic) -> None:
    """The local registry comes first: a name that it knows, a retired one too, is not looked up in the lab."""
    manager = classic.manager()
    id = manager.resolve("arm", "node", acquire_lock=False)
    manager.clean_stale(0)
    lab.known["arm"] = {"id": id, "component_type": "node"}
    result = classic.resolver(lab.url, manager).resolve_with_info("arm", "node")
    assert (result.id, result.is_new, result.source) == (id, False, "local")
    assert [method for method, _ in lab.requests] == ["POST"]


def test_lab_is_asked_before_the_registry_exists(lab: LabStub, registry_path: Any) -> None:
    """In a registry that does not exist yet, whose daemon is to be started, the first name has the lab's ULID, too."""
    lab.known["arm"] = {"id": ULID}
    with Classic(registry_path) as classic:
        assert classic.resolver(lab.url).resolve("arm", "node") == ULID


def test_type_of_the_lab_is_kept_with_a_warning(
    lab: LabStub, classic: Classic, caplog: pytest.LogCaptureFixture
) -> None:
    """A name that the lab knows with another type is what the lab says it is, with a warning; a type that there is not
    counts for nothing."""
    lab.known |= {"arm": {"id": ULID, "component_type": "module"}, "leg": {"id": OTHER_ULID, "component_type": "limb"}}
    resolver = classic.resolver(lab.url)
    arm, leg = (resolver.resolve_with_info(name, "node") for name in ("arm", "leg"))
    assert (arm.id, arm.component_type) == (ULID, "module") and "is a module, not a node" in warned(caplog)
    assert (leg.id, leg.component_type) == (OTHER_ULID, "node")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_name_of_any_characters_is_one_segment_of_the_path(lab: LabStub, classic: Classic, name: str) -> None:
    """Slashes, dots, per cent and what else a name may hold reach the lab as that name."""
    lab.known[name] = {"id": ULID}
    resolver = classic.resolver(f"{lab.url}/")
    assert resolver.resolve(name, "node") == ULID
    resolver.release(name)
    until(lambda: lab.unlocks)
    assert [n for n, _ in lab.entries] == [n for n, _ in lab.unlocks] == [name]
    assert all(path.count("/") == 3 + path.endswith("/unlock") for _, path in lab.requests)


def test_lab_url_may_have_a_path_and_be_a_pydantic_one(lab: LabStub, classic: Classic) -> None:
    """MADSci's settings give a pydantic URL; the routes are asked for under its path."""
    from pydantic import AnyUrl

    resolver = classic.resolver()
    resolver.lab_url = AnyUrl(f"{lab.url}/lab")
    resolver.resolve("arm", "node")
    assert lab.requests[0] == ("GET", "/lab/registry/resolve/arm")


def test_held_name_is_not_told_to_the_lab(lab: LabStub, classic: Classic) -> None:
    """Where the local lock is refused the lab hears nothing of it; it has no say in local locks."""
    classic.manager().resolve("arm", "node")
    with pytest.raises(RegistryLockError) as refused:
        classic.resolver(lab.url).resolve("arm", "node")
    assert refused.value.code == "held" and lab.requests == []


def test_bad_input_does_not_reach_the_lab(lab: LabStub, classic: Classic) -> None:
    """A name, type or metadata that cannot be is refused before anybody is asked."""
    bad: list[Any] = [(5, "node", None), ("arm", "robot", None), ("arm", "node", {"x": object()})]
    for arguments in bad:
        with pytest.raises(RegistryLockError) as refused:
            classic.resolver(lab.url).resolve(*arguments)
        assert refused.value.code == "invalid"
    assert lab.requests == []


# races: the local registry has the last word


def test_name_made_here_meanwhile_keeps_its_ulid(
    lab: LabStub, classic: Classic, caplog: pytest.LogCaptureFixture
) -> None:
    """Where another program makes the name while the lab is asked, its ULID stays; that the lab has another is told."""
    made: list[str] = []
    lab.known["arm"] = {"id": ULID}
    lab.before_answer = lambda: made.append(classic.manager().resolve("arm", "node", acquire_lock=False))
    result = classic.resolver(lab.url).resolve_with_info("arm", "node")
    assert (result.id, result.is_new, result.source) == (made[0], False, "local")
    assert f"the lab knows 'arm' as {ULID}, which is not taken over: known here as {made[0]}" in warned(caplog)
    assert "answered 409" in warned(caplog) and lab.entries == []


def test_ulid_that_is_another_name_here_is_not_taken_over(
    lab: LabStub, classic: Classic, caplog: pytest.LogCaptureFixture
) -> None:
    """A ULID that belongs to another name here is given to no second one: the name gets a new one, with a warning."""
    manager = classic.manager()
    id = manager.resolve("leg", "node")
    lab.known["arm"] = {"id": id}
    result = classic.resolver(lab.url, manager).resolve_with_info("arm", "node")
    assert result.id != id and (result.is_new, result.source) == (True, "new")
    assert "is called 'leg' here" in warned(caplog) and manager.lookup("leg") == id


def test_two_that_adopt_at_once_have_the_same(lab: LabStub, classic: Classic) -> None:
    """Two programs that learn the lab's ULID at the same time both take it in; one of them holds the name."""
    others: list[str] = []
    lab.known["arm"] = {"id": ULID}
    resolver, other = classic.resolver(lab.url), classic.resolver(lab.url)

    def meanwhile() -> None:
        lab.before_answer = lambda: None
        others.append(other.resolve("arm", "node"))

    lab.before_answer = meanwhile
    with pytest.raises(RegistryLockError):
        resolver.resolve("arm", "node")
    other.release("arm")
    assert resolver.resolve("arm", "node") == others[0] == ULID


# lookup and release


def test_lookup_asks_the_lab_for_what_is_not_here(lab: LabStub, classic: Classic) -> None:
    """Lookup answers from the local registry, else from the lab, else None; it makes nothing anywhere."""
    lab.known["arm"] = {"id": ULID}
    resolver = classic.resolver(lab.url)
    id = resolver.local_registry.resolve("leg", "node")
    assert [resolver.lookup(name) for name in ("leg", "arm", "nobody")] == [id, ULID, None]
    assert lab.requests == [("GET", "/registry/resolve/arm"), ("GET", "/registry/resolve/nobody")]
    assert resolver.local_registry.lookup("arm") is None


def test_release_unlocks_what_the_lab_was_told(lab: LabStub, classic: Classic) -> None:
    """A released name is unlocked in the lab, once, for this instance; one that the lab was not told of is not."""
    resolver = classic.resolver(lab.url)
    for name in ("arm", "leg"):
        resolver.resolve(name, "node")
    instance = {"holder_instance": resolver.local_registry.lock_manager.instance_id}
    resolver.release("nobody")
    resolver.release("arm")
    resolver.release("arm")
    until(lambda: lab.unlocks)
    assert lab.unlocks == [("arm", instance)]
    resolver.release_all()
    until(lambda: len(lab.unlocks) == 2)
    assert lab.unlocks == [("arm", instance), ("leg", instance)]


def test_release_of_an_older_resolver_unlocks_nothing_in_the_lab(lab: LabStub, classic: Classic) -> None:
    """Where a newer resolver of the same holder has the name, the older one's release leaves the lab's lock, too."""
    manager = classic.manager()
    old, new = (classic.resolver(lab.url, manager) for _ in range(2))
    old.resolve("arm", "node")
    new.resolve("arm", "node")
    old.release("arm")
    assert lab.unlocks == []
    new.release("arm")
    until(lambda: lab.unlocks)


def test_interrupted_word_to_the_lab_leaves_nothing_held(
    lab: LabStub, classic: Classic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the lab is told leaves the name as it was: free where this resolve took it, else held."""
    resolver: Any = classic.resolver(lab.url)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Lab, "tell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolver.resolve("arm", "node")
    assert not classic.manager().get_entry("arm").is_locked()  # type: ignore[union-attr]
    resolver.local_registry.resolve("arm", "node")
    with pytest.raises(KeyboardInterrupt):
        resolver.resolve("arm", "node")
    resolver.local_registry.refresh_lock("arm")


def test_release_does_not_wait_for_a_lab_that_is_silent(lab: LabStub, classic: Classic) -> None:
    """A release takes its half a second at most, whatever the lab does, and frees the name here."""
    resolver = classic.resolver(lab.url)
    resolver.resolve("arm", "node")
    lab.behaviour = "silent"
    began = time.monotonic()
    resolver.release("arm")
    assert time.monotonic() - began < 3
    assert classic.manager().resolve("arm", "node")


def test_node_that_ends_unlocks_in_the_lab(lab: LabStub, daemon: DaemonProcess) -> None:
    """A node that ends by itself releases in atexit, quietly, and the lab hears of it."""
    with node("1", lab.url, registry=daemon.registry) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")
    assert [name for name, _ in lab.unlocks] == ["arm"]


def test_forked_child_tells_the_lab_nothing_of_its_parents(lab: LabStub, classic: Classic) -> None:
    """A forked child that releases what its parent holds unlocks nothing in the lab; it may ask the lab on its own."""
    resolver = classic.resolver(lab.url)
    resolver.resolve("arm", "node")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        with suppress(BaseException):
            resolver.release("arm")
            resolver.release_all()
            assert resolver.lookup("nobody") is None
            resolver.release("arm")
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ("GET", "/registry/resolve/nobody") in lab.requests
    assert lab.unlocks == []


# against the real service


@pytest.fixture
def elsewhere(registry_path: Path) -> Iterator[Classic]:
    """Managers of a registry on what could be another host."""
    with DaemonProcess(registry_path.with_name("elsewhere.json")) as daemon, Classic(daemon.registry) as made:
        yield made


def found(http: httpx.Client, name: str) -> dict[str, Any] | None:
    """Return what a lab has under a name."""
    answer = http.post("/registry/lookup", json={"name": name})
    return dict(answer.json()) if answer.status_code == 200 else None


def test_name_is_known_and_held_in_the_real_lab(classic: Classic, served: LabProcess, http: httpx.Client) -> None:
    """A name that neither knows is made here and then known to the lab, with its metadata, held by this process; a
    release gives it back there, and the lab keeps the ULID."""
    resolver = classic.resolver(served.url)
    result = resolver.resolve_with_info("real/arm", "node", {"rack": 3})
    mine = resolver.local_registry.lock_manager
    entry = found(http, "real/arm")
    assert entry is not None and (entry["id"], entry["metadata"]) == (result.id, {"rack": 3})
    assert (result.is_new, result.source) == (True, "new")
    assert entry["lock"]["holder"] == {
        "holder_host": socket.gethostname(), "holder_pid": os.getpid(), "holder_instance": mine.instance_id,
    }  # fmt: skip
    resolver.release("real/arm")
    entry = until(lambda: (e := found(http, "real/arm")) and not e["lock"] and e, "for the lab to hear of the release")
    assert entry["id"] == result.id


def test_component_that_moves_keeps_its_ulid(classic: Classic, elsewhere: Classic, served: LabProcess) -> None:
    """A component that was resolved on one host has the same ULID on another one, which asks the lab before it makes
    one; and so has one that is only looked up there."""
    here, there = classic.resolver(served.url), elsewhere.resolver(served.url)
    ids = [here.resolve(name, "module", {"rack": 3}) for name in ("moves", "stays")]
    here.release_all()
    result = there.resolve_with_info("moves", "module")
    assert (result.id, result.is_new, result.source) == (ids[0], False, "lab")
    assert there.lookup("stays") == ids[1] and there.lookup("no such name") is None
    assert there.local_registry.lookup("stays") is None


@pytest.mark.parametrize("name", ODD_NAMES)
def test_name_of_any_characters_is_one_to_the_real_lab(
    classic: Classic, elsewhere: Classic, served: LabProcess, http: httpx.Client, name: str
) -> None:
    """Whatever a name may hold, the real lab knows it by that name, and the next host finds it there."""
    resolver = classic.resolver(f"{served.url}/")
    id = resolver.resolve(name, "node")
    entry = found(http, name)
    assert entry is not None and (entry["id"], entry["lock"]["name"]) == (id, name)
    resolver.release(name)
    until(lambda: not (found(http, name) or {})["lock"], "for the lab to hear of the release")
    assert elsewhere.resolver(served.url).resolve(name, "node") == id


def test_lab_has_no_say_in_local_locks(
    classic: Classic, elsewhere: Classic, served: LabProcess, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Two registries without a lab of their own may both hold a name: the second is warned that the lab has a holder,
    and the lab goes on naming the first."""
    here, there = classic.resolver(served.url), elsewhere.resolver(served.url)
    id = here.resolve("twice", "node")
    assert there.resolve("twice", "node") == id
    assert "the lab was not told of 'twice'" in warned(caplog) and "answered 409" in warned(caplog)
    there.release("twice")
    entry = found(http, "twice")
    mine = here.local_registry.lock_manager.instance_id
    assert entry is not None and entry["lock"]["holder"]["holder_instance"] == mine


def test_name_made_while_the_lab_was_away_keeps_its_ulid(
    classic: Classic, elsewhere: Classic, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A name that was made here while the lab was away is told to it at the next resolve; where another host has made
    it meanwhile the local ULID stays, with a warning, and the lab records what it was told."""
    with LabProcess(tmp_path) as lab, client(lab.url) as http:
        resolver = classic.resolver(lab.url)
        lab.kill()
        ids = {name: resolver.resolve(name, "node") for name in ("alone", "both")}
        assert warned(caplog).count("is resolved without the lab") == 2
        resolver.release_all()
        lab.start()
        other = elsewhere.resolver(lab.url).resolve("both", "node")
        caplog.clear()
        assert {name: resolver.resolve(name, "node") for name in ids} == ids
        assert {name: (found(http, name) or {})["id"] for name in ids} == {**ids, "both": other}
        assert "the lab was not told of 'both'" in warned(caplog) and "'alone'" not in warned(caplog)
        (conflict,) = http.post("/registry/conflicts", json={}).json()["conflicts"]
        assert (conflict["name"], conflict["id"], conflict["reason"]) == ("both", ids["both"], "two_ids")
        assert (found(http, "both") or {})["other_ids"] == [ids["both"]]


def test_token_in_the_lab_url_is_used_and_not_told(
    classic: Classic, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A lab that wants tokens takes the password of the URL for one; it stands in no log, of ours or of the lab; a
    wrong one is a warning."""
    caplog.set_level("DEBUG")
    token = "a-token-of-this-host-0123"
    (tmp_path / "tokens").write_text(f"here {token}\n")
    with LabProcess(tmp_path, "--token-file", str(tmp_path / "tokens")) as lab, client(lab.url, token) as http:
        id = classic.resolver(lab.url.replace("//", f"//here:{token}@")).resolve("arm", "node")
        entry = found(http, "arm")
        assert entry is not None and (entry["id"], entry["host"]) == (id, "here")
        classic.resolver(lab.url.replace("//", "//here:no-token-at-all@")).resolve("leg", "node")
        assert "'leg' is resolved without the lab" in warned(caplog) and found(http, "leg") is None
        logged = caplog.text + lab.log
    assert token not in logged and "no-token-at-all" not in logged


def test_node_that_ends_unlocks_in_the_real_lab(daemon: DaemonProcess, served: LabProcess, http: httpx.Client) -> None:
    """A node as MADSci writes it is known to the lab while it runs, and gives its name back there when it ends."""
    with node("1", served.url, registry=daemon.registry) as process:
        assert process.stdout is not None
        id = process.stdout.readline().strip()
        entry = found(http, "arm")
        assert entry is not None and entry["id"] == id
        assert entry["lock"]["holder"]["holder_pid"] == process.pid
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")
    assert (found(http, "arm") or {})["lock"] is None
