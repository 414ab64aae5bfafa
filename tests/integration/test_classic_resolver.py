"""IdentityResolver on the local registry alone, against a real daemon."""

from __future__ import annotations

import signal
import time

import pytest

from classic import Classic
from helpers import PATIENCE_S, DaemonProcess
from madsci_registry import IdentityResolver, RegistryClient, RegistryLockError, RegistryResolveResult
from madsci_registry.names import is_ulid


def test_resolver_makes_its_registry_where_it_is_given_none(classic: Classic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a local_registry the resolver has one of its own, by environment and folders, and no lab."""
    monkeypatch.setenv("MADSCI_REGISTRY_PATH", str(classic.registry))
    resolver = IdentityResolver()
    assert resolver.local_registry.registry_path == classic.registry
    assert (resolver.lab_url, resolver.lab_client) == (None, None)


def test_resolve_gives_the_ulid_and_holds_the_name(classic: Classic, plain: RegistryClient) -> None:
    """Resolve makes a ULID once for all, with metadata, and holds the name for the resolver's instance."""
    resolver = classic.resolver()
    id = resolver.resolve(name="arm", component_type="node", metadata={"module_name": "arm"})
    assert is_ulid(id) and resolver.resolve("arm", "node") == id
    component = plain.get("arm")
    assert component.holder is not None and component.metadata == {"module_name": "arm"}
    assert component.holder.instance == resolver.local_registry.lock_manager.instance_id


def test_resolve_with_info_says_what_is_so(classic: Classic) -> None:
    """Is_new and source are of this very call: new once, local ever after; type is the registry's own."""
    resolver = classic.resolver()
    first = resolver.resolve_with_info("arm", "node")
    assert isinstance(first, RegistryResolveResult)
    assert (first.name, first.component_type, first.is_new, first.source) == ("arm", "node", True, "new")
    again = resolver.resolve_with_info("arm", "module")
    assert (again.id, again.component_type, again.is_new, again.source) == (first.id, "node", False, "local")


def test_held_name_is_a_lock_error(classic: Classic) -> None:
    """Both resolve and resolve_with_info refuse a name that another resolver holds, at once or after retry_timeout."""
    classic.resolver().resolve("arm", "node")
    other = classic.resolver()
    for resolve in (other.resolve, other.resolve_with_info):
        for retry_timeout in (None, 0.2):
            with pytest.raises(RegistryLockError) as refused:
                resolve("arm", "node", None, retry_timeout)
            assert refused.value.code == "held"


def test_lookup_takes_no_lock(classic: Classic, plain: RegistryClient) -> None:
    """Lookup gives the ULID, None for a name that nobody has, and holds and makes nothing."""
    id = plain.resolve("arm", "node", acquire_lock=False).id
    resolver = classic.resolver()
    assert (resolver.lookup("arm"), resolver.lookup("nobody")) == (id, None)
    assert plain.get("arm").state == "free" and plain.lookup("nobody") is None


def test_release_frees_one_name(classic: Classic, plain: RegistryClient) -> None:
    """Release gives back the one name; one that is not held, or that there is not, does nothing."""
    resolver = classic.resolver()
    for name in ("arm", "leg"):
        resolver.resolve(name, "node")
    for _ in range(2):
        resolver.release("arm")
    resolver.release("nobody")
    assert (plain.get("arm").state, plain.get("leg").state) == ("free", "held")


def test_release_all_really_releases(classic: Classic, plain: RegistryClient) -> None:
    """release_all gives back all that was resolved through this resolver, at once, and nothing of another one."""
    manager = classic.manager()
    one, other = classic.resolver(manager=manager), classic.resolver(manager=manager)
    for name in ("a", "b", "c"):
        one.resolve(name, "node")
    other.resolve("d", "node")
    one.release_all()
    assert [c.name for c in plain.list(state="held")] == ["d"]
    one.release_all()
    assert classic.resolver().resolve("b", "node")


def test_release_all_of_many_is_quick_where_the_daemon_is_frozen(classic: Classic, daemon: DaemonProcess) -> None:
    """release_all takes half a second for all names together where the daemon does not answer, which hears of it when
    it goes on."""
    resolver = classic.resolver()
    names = [f"arm-{n}" for n in range(20)]
    for name in names:
        resolver.resolve(name, "node")
    daemon.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        resolver.release_all()
        assert time.monotonic() - began < 5
    finally:
        daemon.signal(signal.SIGCONT)
    other = classic.resolver()
    assert all(other.resolve(name, "node", retry_timeout=PATIENCE_S) for name in names)


@pytest.mark.parametrize("end", ["release", "release_all"])
def test_older_resolver_frees_nothing_of_a_newer_one(classic: Classic, plain: RegistryClient, end: str) -> None:
    """Where a newer resolver of the same holder has the name, the older one's release and release_all free nothing."""
    manager = classic.manager()
    old, new = classic.resolver(manager=manager), classic.resolver(manager=manager)
    old.resolve("arm", "node")
    new.resolve("arm", "node")
    for _ in range(2):
        old.release("arm") if end == "release" else old.release_all()
    assert plain.get("arm").state == "held"
    new.release("arm")
    assert plain.get("arm").state == "free"
