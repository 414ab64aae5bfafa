"""Promises 1, 2, 4 and 6: identities, one holder, tokens, durability; on a real daemon and real processes."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest

from conftest import Workers
from helpers import PATIENCE_S, DaemonProcess, environment
from madsci_registry import RegistryClient, errors
from rounds import check, fresh_seed, hammer_and_kill


@pytest.mark.timeout(300)
def test_hammer_with_killed_clients_and_daemon_breaks_no_promise(daemon: DaemonProcess) -> None:
    """At no time do two of 16 processes hold one name, tokens only grow, and no acknowledged identity is lost, while
    clients and the daemon get SIGKILL."""
    verdict = hammer_and_kill(daemon, clients=16, client_kills=20, daemon_kills=20, seed=fresh_seed())
    check(daemon, verdict, least_grants=200)


def test_identity_answered_survives_all_that_may_happen_to_it(daemon: DaemonProcess) -> None:
    """Once answered, a name gives its ULID through SIGKILL of the daemon, retire and revive; rename moves the ULID."""
    with RegistryClient(daemon.registry) as client:
        first = client.resolve("pump", "node", acquire_lock=False).id
        daemon.restart()
        assert client.lookup("pump") == first
        client.retire("pump")
        daemon.restart()
        assert client.resolve("pump", "node", acquire_lock=False).id == first
        client.rename("pump", "pump_2")
        daemon.restart()
        assert client.lookup("pump") is None
        assert client.lookup("pump_2") == first
        with pytest.raises(errors.NotFoundError) as gone:
            client.get("pump")
        assert gone.value.renamed_to == "pump_2"
        again = client.resolve("pump", "node", acquire_lock=False)
        assert again.is_new
        assert again.id != first


def test_restore_gives_the_backup_and_what_is_known_beyond_it(daemon: DaemonProcess, tmp_path: Path) -> None:
    """A restore forgets no identity that was answered after the backup was made."""
    copy = tmp_path / "copy.db"
    with RegistryClient(daemon.registry) as client:
        before = client.resolve("before", "node", acquire_lock=False).id
        token = client.resolve("before", "node").fencing_token
        client.backup(copy)
        after = client.resolve("after", "node", acquire_lock=False).id
    assert daemon.terminate() == 0
    restored = subprocess.run(
        daemon.command("restore", str(copy)), env=environment(), capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert restored.returncode == 0, restored.stderr
    daemon.start()
    with RegistryClient(daemon.registry) as client:
        assert client.lookup("before") == before
        assert client.lookup("after") == after
        later = client.resolve("before", "node").fencing_token
        assert token is not None
        assert later is not None
        assert later > token


def test_backup_made_while_serving_is_a_whole_database(daemon: DaemonProcess, tmp_path: Path) -> None:
    """A backup made while the daemon serves is a consistent SQLite database with every identity in it."""
    copy = tmp_path / "copy.db"
    with RegistryClient(daemon.registry) as client:
        known = {name: client.resolve(name, "module", acquire_lock=False).id for name in map(str, range(50))}
        client.backup(copy)
    db = sqlite3.connect(copy)
    try:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert dict(db.execute("SELECT name, id FROM components")) == known
    finally:
        db.close()


def test_token_grows_over_takeover_restart_and_rename(daemon: DaemonProcess, workers: Workers) -> None:
    """Every grant of a name has a higher fencing token below 2^53: over release, takeover, restart, and over being
    renamed away and made anew."""
    tokens: dict[str, list[int]] = {"arm": [], "left_arm": []}
    with RegistryClient(daemon.registry) as client:

        def grant(name: str) -> None:
            registration = client.resolve(name, "node", wait=PATIENCE_S)
            assert registration.fencing_token is not None
            tokens[name].append(registration.fencing_token)
            registration.release()

        grant("arm")
        grant("arm")
        victim = workers()
        tokens["arm"].append(victim.ask("resolve", "arm")["fencing_token"])
        victim.kill()
        grant("arm")
        daemon.restart()
        grant("arm")
        client.rename("arm", "left_arm")
        grant("arm")
        grant("left_arm")
        client.rename("left_arm", "right_arm")
        grant("left_arm")
        daemon.terminate()
        daemon.start()
        grant("arm")
        grant("left_arm")
    for name, given in tokens.items():
        assert given == sorted(set(given)), name
        assert given[-1] < 2**53


def test_revisions_never_repeat_over_restarts(daemon: DaemonProcess) -> None:
    """Revisions only grow: what was told before SIGKILL has its place in history after it."""
    with RegistryClient(daemon.registry) as client:
        client.resolve("a", "node", acquire_lock=False)
        before = client.history()
        daemon.restart()
        client.resolve("b", "node", acquire_lock=False)
        after = client.history()
    revisions = [event.revision for event in after]
    assert after[: len(before)] == before
    assert revisions == sorted(set(revisions))
    assert revisions[-1] > before[-1].revision


def test_lock_survives_the_death_of_the_daemon(daemon: DaemonProcess, workers: Workers) -> None:
    """A lock survives SIGKILL of the daemon: the same holder with the same token, and nobody else is granted it."""
    holder, other = workers(), workers()
    token = holder.ask("resolve", "arm")["fencing_token"]
    daemon.restart()
    with pytest.raises(errors.HeldError) as held:
        other.ask("resolve", "arm")
    assert held.value.holder is not None
    assert held.value.holder.pid == holder.pid
    holder.ask("ensure", "arm")
    assert holder.ask("get", "arm")["fencing_token"] == token
    assert holder.ask("losses", 0) == []


def test_terminate_keeps_the_locks_and_ends_cleanly(daemon: DaemonProcess, workers: Workers) -> None:
    """SIGTERM and SIGINT end the daemon with status 0, and its locks stay for the next one."""
    holder = workers()
    holder.ask("resolve", "arm")
    for number in (signal.SIGTERM, signal.SIGINT):
        daemon.signal(number)
        assert daemon.wait() == 0
        daemon.start()
        with pytest.raises(errors.HeldError):
            workers().ask("resolve", "arm")
    holder.ask("ensure", "arm")
