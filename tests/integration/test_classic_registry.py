"""LocalRegistryManager against a real daemon, method by method, and where it differs from MADSci's on purpose."""

from __future__ import annotations

import gc
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from classic import Classic
from conftest import Workers
from helpers import PATIENCE_S, DaemonProcess, until
from madsci_registry import (
    LocalRegistryManager,
    LockManager,
    RegistryClient,
    RegistryLockError,
    WrongTypeError,
)
from madsci_registry.names import is_ulid

# resolve


def test_resolve_makes_a_name_and_holds_it(classic: Classic, plain: RegistryClient) -> None:
    """A new name gets a ULID, with its metadata, and is held by the manager's instance."""
    manager = classic.manager()
    id = manager.resolve("arm", "node", {"rack": 3})
    component = plain.get("arm")
    assert is_ulid(id) and component.id == id and component.metadata == {"rack": 3}
    assert component.holder is not None and component.holder.instance == manager.lock_manager.instance_id


def test_resolve_again_gives_the_same_and_merges_metadata(classic: Classic, plain: RegistryClient) -> None:
    """The same manager resolving a name again has the same ULID and lock; metadata is merged, None leaves it."""
    manager = classic.manager()
    id, token = manager.resolve("arm", "node", {"rack": 3}), plain.get("arm").fencing_token
    assert manager.resolve("arm", "node", {"row": 1}) == manager.resolve("arm", "node") == id
    assert (plain.get("arm").metadata, plain.get("arm").fencing_token) == ({"rack": 3, "row": 1}, token)


def test_resolve_without_a_lock_holds_nothing(classic: Classic, plain: RegistryClient) -> None:
    """acquire_lock=False gives the identity alone, of a name that another one holds too."""
    id = classic.manager().resolve("arm", "node", acquire_lock=False)
    assert plain.get("arm").state == "free"
    assert classic.manager().resolve("arm", "node") == id
    assert classic.manager().resolve("arm", "node", acquire_lock=False) == id


def test_two_managers_of_a_process_are_two_holders(classic: Classic) -> None:
    """What one manager holds is refused to another one with a LockManager of its own, at once, with who holds it."""
    classic.manager().resolve("arm", "node")
    with pytest.raises(RegistryLockError, match="another instance in this process") as refused:
        classic.manager().resolve("arm", "node")
    assert (refused.value.code, refused.value.is_me, refused.value.name) == ("held", True, "arm")
    assert refused.value.holder is not None


def test_one_instance_id_is_one_holder_in_a_process(classic: Classic) -> None:
    """Managers that share a LockManager, or whose LockManagers have one instance_id, are one holder."""
    shared = LockManager("bench-1")
    id = classic.manager(shared).resolve("arm", "node")
    assert classic.manager(shared).resolve("arm", "node") == id
    assert classic.manager(LockManager("bench-1")).resolve("arm", "node") == id
    classic.manager(LockManager("bench-1")).release("arm")
    assert classic.manager().resolve("arm", "node") == id


def test_one_instance_id_in_two_processes_is_two_holders(
    classic: Classic, plain: RegistryClient, workers: Workers
) -> None:
    """An instance_id is a holder within its process: another process that uses it too is refused."""
    worker = workers()
    worker.ask("resolve", "arm")
    holder = plain.get("arm").holder
    assert holder is not None
    with pytest.raises(RegistryLockError) as refused:
        classic.manager(LockManager(holder.instance)).resolve("arm", "node")
    assert not refused.value.is_me and refused.value.holder is not None
    assert refused.value.holder.pid == worker.pid
    with pytest.raises(RegistryLockError, match=f"pid {worker.pid}"):
        classic.manager(LockManager(holder.instance)).refresh_lock("arm")


def test_retry_timeout_waits_in_the_queue(classic: Classic, plain: RegistryClient) -> None:
    """With a retry_timeout the name is had as soon as it is free, not at the next of some tries 2 s apart."""
    holder, waiter = classic.manager(), classic.manager()
    id = holder.resolve("arm", "node")
    got: list[Any] = []
    thread = threading.Thread(
        target=lambda: got.append((waiter.resolve("arm", "node", retry_timeout=PATIENCE_S), time.monotonic()))
    )
    thread.start()
    until(lambda: plain.get("arm").waiting == 1, "for the waiter to stand in the queue")
    released_at = time.monotonic()
    holder.release("arm")
    thread.join(PATIENCE_S)
    assert got[0][0] == id and got[0][1] - released_at < 1.5


@pytest.mark.parametrize(("retry_timeout", "least_s"), [(None, 0), (0, 0), (-1, 0), (0.4, 0.4)])
def test_retry_timeout_that_is_over_is_a_lock_error(
    classic: Classic, retry_timeout: float | None, least_s: float
) -> None:
    """A name that stays held is refused when retry_timeout is over; None, 0 and less do not wait."""
    classic.manager().resolve("arm", "node")
    began = time.monotonic()
    with pytest.raises(RegistryLockError) as refused:
        classic.manager().resolve("arm", "node", retry_timeout=retry_timeout)
    assert refused.value.code == "held"
    assert least_s <= time.monotonic() - began < least_s + 4


def test_another_type_is_a_warning(classic: Classic, caplog: pytest.LogCaptureFixture) -> None:
    """A name that is known with another component_type keeps its ULID and its type, and a warning says so; a
    RegistryClient is refused."""
    manager = classic.manager()
    id = manager.resolve("arm", "node")
    with caplog.at_level(logging.WARNING):
        assert manager.resolve("arm", "module") == id
        assert manager.resolve("arm", "manager", acquire_lock=False) == id
    assert [r.message for r in caplog.records if "is a node, not a module" in r.message]
    entry = manager.get_entry("arm")
    assert entry is not None and entry.component_type == "node" and entry.is_locked_by(manager.lock_manager.instance_id)
    with RegistryClient(classic.registry) as client, pytest.raises(WrongTypeError):
        client.resolve("arm", "module")


@pytest.mark.parametrize(
    ("name", "component_type", "metadata", "retry_timeout"),
    [
        ("", "node", None, None),
        (5, "node", None, None),
        ("a\nb", "node", None, None),
        ("arm", "robot", None, None),
        ("arm", "node", {"x": object()}, None),
        ("arm", "node", [1], None),
        ("arm", "node", None, "soon"),
        ("arm", "node", None, float("nan")),
    ],
)
def test_bad_input_to_resolve_is_a_lock_error(
    classic: Classic, name: Any, component_type: Any, metadata: Any, retry_timeout: Any
) -> None:
    """What cannot be resolved is a RegistryLockError too, code `invalid`: MADSci would go on with a random ULID."""
    with pytest.raises(RegistryLockError) as refused:
        classic.manager().resolve(name, component_type, metadata, retry_timeout=retry_timeout)
    assert refused.value.code == "invalid"


# release, refresh_lock


def test_release_frees_the_name(classic: Classic) -> None:
    """A released name is anybody's; releasing it again, a name that is not held or that there is not, does nothing."""
    manager, other = classic.manager(), classic.manager()
    manager.resolve("arm", "node")
    for _ in range(2):
        manager.release("arm")
    manager.release("nobody")
    other.resolve("arm", "node")
    manager.release("arm")
    with pytest.raises(RegistryLockError):
        manager.resolve("arm", "node")


def test_release_does_not_free_a_lock_that_was_taken_since(classic: Classic) -> None:
    """Where another manager of the same holder has resolved the name since, the older one's release frees nothing."""
    shared = LockManager()
    old, new = classic.manager(shared), classic.manager(shared)
    old.resolve("arm", "node")
    new.resolve("arm", "node")
    for _ in range(2):
        old.release("arm")
    new.refresh_lock("arm")
    new.release("arm")
    assert classic.manager().resolve("arm", "node")


@pytest.mark.parametrize("by", ["arm", "leg"])
def test_release_goes_with_a_renamed_component(classic: Classic, plain: RegistryClient, by: str) -> None:
    """A holder whose component was renamed with force releases it by the name that it resolved, or by the new one."""
    manager = classic.manager()
    manager.resolve("arm", "node")
    plain.rename("arm", "leg", force=True)
    until(lambda: manager._taken.all("arm")[0].name == "leg", "for the holder to be told")
    manager.refresh_lock("arm")
    manager.refresh_lock("leg")
    manager.release(by)
    assert plain.get("leg").state == "free"


def test_refresh_lock_of_what_is_held_is_quiet(classic: Classic) -> None:
    """refresh_lock does nothing while the lock is this instance's, whichever manager of it took it."""
    shared = LockManager()
    manager = classic.manager(shared)
    manager.resolve("arm", "node")
    manager.refresh_lock("arm")
    classic.manager(shared).refresh_lock("arm")


def test_refresh_lock_of_what_is_not_held_is_a_lock_error(classic: Classic, plain: RegistryClient) -> None:
    """refresh_lock raises RegistryLockError where there is no such name, nobody holds it, somebody else does, or an
    operator broke the lock."""
    manager = classic.manager()
    with pytest.raises(RegistryLockError, match="no component is called 'arm'"):
        manager.refresh_lock("arm")
    manager.resolve("arm", "node", acquire_lock=False)
    with pytest.raises(RegistryLockError, match="nor by anybody"):
        manager.refresh_lock("arm")
    manager.resolve("arm", "node")
    with pytest.raises(RegistryLockError, match="but by pid"):
        classic.manager().refresh_lock("arm")
    assert plain.break_lock("arm", reason="for a test")
    until(lambda: manager._taken.all("arm")[-1]._has_ended, "for the holder to be told")
    with pytest.raises(RegistryLockError, match="for a test") as lost:
        manager.refresh_lock("arm")
    assert lost.value.code == "lock_lost"


def test_heartbeats_have_nothing_to_do(classic: Classic) -> None:
    """start_heartbeat and its like are accepted: no thread is made, and the lock stays when heartbeats are stopped."""
    manager = classic.manager()
    manager.resolve("arm", "node")
    threads = threading.active_count()
    manager.lock_manager.start_heartbeat("arm", manager)
    assert threading.active_count() == threads
    manager.lock_manager.stop_heartbeat("arm")
    manager.lock_manager.stop_all_heartbeats()
    manager.refresh_lock("arm")


def test_renamed_lock_is_kept_apart_from_a_new_one_of_the_old_name(classic: Classic, plain: RegistryClient) -> None:
    """Where a held component was renamed and its old name resolved anew, release frees what is called so now, and the
    resolver's release_all frees both."""
    resolver = classic.resolver()
    resolver.resolve("arm", "node")
    plain.rename("arm", "leg", force=True)
    until(lambda: resolver._taken.all("arm")[0].name == "leg", "for the holder to be told")
    resolver.resolve("arm", "node")
    resolver.release("arm")
    assert (plain.get("arm").state, plain.get("leg").state) == ("free", "held")
    resolver.resolve("arm", "node")
    resolver.release_all()
    assert (plain.get("arm").state, plain.get("leg").state) == ("free", "free")


def test_release_frees_what_threads_resolved_in_any_order(classic: Classic, plain: RegistryClient) -> None:
    """Where two threads of a manager resolve a name at once, its release frees the lock, whoever came last."""
    manager = classic.manager()
    first, second = (manager._client.resolve("arm", "node") for _ in range(2))
    manager._taken.add("arm", second)
    manager._taken.add("arm", first)
    manager.release("arm")
    assert plain.get("arm").state == "free"


# the place in the session


def users(manager: LocalRegistryManager) -> dict[str, bool]:
    return manager._client._shared().users


def open_files_and_threads() -> list[int]:
    return [len(list(Path(f"/proc/self/{what}").iterdir())) for what in ("fd", "task")]


def test_collected_managers_leave_nothing(daemon: DaemonProcess) -> None:
    """A manager that is collected leaves its place in the session; with the last one the session ends, and neither
    threads nor descriptors grow in number."""

    def make_many() -> None:
        for n in range(20):
            manager = LocalRegistryManager(daemon.registry)
            manager.resolve(f"arm-{n}", "node")
            manager.release(f"arm-{n}")
        assert len(users(manager)) == 1

    make_many()
    with RegistryClient(daemon.registry) as client:
        until(lambda: len(client.sessions()) == 1, "for the session of the managers to end")
    before = open_files_and_threads()
    make_many()
    gc.collect()
    until(lambda: all(now <= then for now, then in zip(open_files_and_threads(), before, strict=True)))


def test_collected_manager_that_holds_keeps_its_lock(classic: Classic, plain: RegistryClient) -> None:
    """A lock outlives the manager that took it, and the session outlives all managers of it."""
    shared, looks_on = LockManager(), classic.manager()
    LocalRegistryManager(classic.registry, shared).resolve("arm", "node")
    gc.collect()
    assert plain.get("arm").state == "held" and shared.instance_id in users(looks_on)
    again = LocalRegistryManager(classic.registry, shared)
    again.release("arm")
    del again
    gc.collect()
    assert plain.get("arm").state == "free" and shared.instance_id not in users(looks_on)


def test_collected_manager_leaves_the_place_of_its_instance_to_others(classic: Classic) -> None:
    """Of two managers of one instance the first that is collected takes nothing from the other."""
    shared = LockManager()
    manager = classic.manager(shared)
    other = LocalRegistryManager(classic.registry, shared)
    session = manager._client._session
    del other
    gc.collect()
    assert session is not None and not session.closed and shared.instance_id in session.users


# which registry


def test_manager_of_a_path_has_a_daemon_started(registry_path: Path) -> None:
    """LocalRegistryManager(path) uses the registry of that path, also by text, and has its daemon started by the first
    resolve, its folder made."""
    path = registry_path.parent / "deep" / "down" / "lab.json"
    with Classic(path) as classic:
        manager = classic.manager()
        id = manager.resolve("arm", "node")
        assert manager.registry_path == path and path.with_suffix(".db").exists()
        assert classic.manager(registry=str(path)).lookup("arm") == id  # type: ignore[arg-type]


def test_manager_without_a_path_goes_by_environment_and_folders(
    classic: Classic, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a path it is MADSCI_REGISTRY_PATH, else the first .madsci folder upwards from MADSCI_SETTINGS_DIR; an
    argument goes before both."""
    (tmp_path / ".madsci").mkdir()
    monkeypatch.setenv("MADSCI_SETTINGS_DIR", str(tmp_path))
    assert LocalRegistryManager().registry_path == tmp_path.resolve() / ".madsci" / "registry.json"
    monkeypatch.setenv("MADSCI_REGISTRY_PATH", str(tmp_path / "lab.json"))
    assert LocalRegistryManager().registry_path == tmp_path.resolve() / "lab.json"
    assert LocalRegistryManager(classic.registry).registry_path == classic.registry


def test_empty_path_is_none(classic: Classic, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty path is no path, as in MADSci: environment and folders say which registry it is."""
    monkeypatch.setenv("MADSCI_REGISTRY_PATH", str(classic.registry))
    assert LocalRegistryManager("").registry_path == classic.registry  # type: ignore[arg-type]


def test_path_that_cannot_be_one_is_a_lock_error(tmp_path: Path) -> None:
    """A folder in the place of the registry's file is refused when the manager is made, by a RegistryLockError."""
    with pytest.raises(RegistryLockError, match="is a folder") as refused:
        LocalRegistryManager(tmp_path)
    assert refused.value.code == "invalid"
