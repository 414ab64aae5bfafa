"""A registry whose daemon a unit or container starts again is left to that: clients wait for it, and start none."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from helpers import PATIENCE_S, DaemonProcess, Worker, daemons_under, end_daemons_under
from madsci_registry import RegistryClient, UnavailableError
from madsci_registry._autostart import refusal
from madsci_registry._endpoint import choose
from manager import Manager


@pytest.fixture
def manager(registry_path: Path) -> Iterator[Manager]:
    with ExitStack() as stack:
        yield Manager(registry_path, stack)


def note_of(registry: Path) -> Path:
    return registry.parent / "run" / f"{registry.stem}.kept"


def why_not(registry: Path) -> str | None:
    """Say why a client would not start a daemon there, with nothing in its environment."""
    return refusal(choose(registry, None, {}, Path("/")), {})


def started(manager: Manager) -> subprocess.Popen[bytes]:
    daemon = manager.start()
    manager.hears("READY=1")
    return daemon


def test_holders_leave_the_start_to_the_manager_that_kept_the_daemon(manager: Manager) -> None:
    """When a daemon that a service manager started is killed, a holder that may start daemons starts none: the manager
    does, and the holder has its lock. A new client waits, and is told who starts it."""
    first = started(manager)
    with Worker(manager.registry, MADSCI_REGISTRY_AUTOSTART="") as holder:
        held = holder.ask("resolve", "arm")
        first.kill()
        first.wait(PATIENCE_S)
        with RegistryClient(manager.registry, timeout=1.0) as client, pytest.MonkeyPatch.context() as patch:
            patch.delenv("MADSCI_REGISTRY_AUTOSTART")
            with pytest.raises(UnavailableError) as waited:
                client.lookup("arm")
        assert "service" in str(waited.value) and str(note_of(manager.registry)) in str(waited.value)
        assert daemons_under(manager.registry.parent) == []
        second = started(manager)
        assert daemons_under(manager.registry.parent) == [second.pid]
        assert holder.ask("get", "arm")["fencing_token"] == held["fencing_token"]
        assert holder.ask("held", "arm")


def test_daemon_that_a_person_starts_is_nobodys_to_start_again(manager: Manager) -> None:
    """A daemon without a manager takes the note away: afterwards a client may start one as before. One that a client
    started, where it was told to, takes none away."""
    daemon = started(manager)
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(PATIENCE_S) == 0
    assert "starts it" in str(why_not(manager.registry))
    with RegistryClient(manager.registry) as client:  # MADSCI_REGISTRY_AUTOSTART=1 here
        client.resolve("arm", "node")
    assert note_of(manager.registry).exists()
    end_daemons_under(manager.registry.parent)
    with DaemonProcess(manager.registry):
        assert not note_of(manager.registry).exists()
    assert why_not(manager.registry) is None


def test_note_is_shown_as_it_is_but_for_what_a_terminal_would_obey(registry_path: Path) -> None:
    """Who wrote rubbish into the note gets a refusal without control characters, and no traceback."""
    note = note_of(registry_path)
    note.parent.mkdir()
    for content in (b"", b"\xff\xfe\n\x1b[31mred\n", b"x" * 100_000, b"the systemd unit a.service\nsystemctl start a"):
        note.write_bytes(content)
        refused = str(why_not(registry_path))
        assert "starts it" in refused and refused.isprintable() and len(refused) < 2000
