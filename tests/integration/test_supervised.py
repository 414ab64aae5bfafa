"""What a service manager gives and hears, with this test in its place; on a real systemd: test_systemd*.py."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from helpers import PATIENCE_S, DaemonProcess, Worker, until
from madsci_registryd.settings import supervision
from manager import Manager


@pytest.fixture
def manager(registry_path: Path) -> Iterator[Manager]:
    with ExitStack() as stack:
        yield Manager(registry_path, stack)


@pytest.fixture
def worker(manager: Manager) -> Iterator[Worker]:
    with Worker(manager.registry) as worker:
        yield worker


def test_ready_is_said_when_both_sockets_listen_and_stopping_at_the_end(manager: Manager, worker: Worker) -> None:
    """READY comes when a client is served at once, with the daemon's pid; STOPPING when it is told to end."""
    daemon = manager.start()
    ready = manager.hears("READY=1")
    assert f"MAINPID={daemon.pid}" in ready and f"STATUS=serving {manager.registry}" in ready
    assert worker.ask("lookup", "arm") is None
    daemon.send_signal(signal.SIGTERM)
    manager.hears("STOPPING=1")
    assert daemon.wait(PATIENCE_S) == 0


def test_watchdog_is_fed_by_the_loop_and_by_nothing_else(manager: Manager) -> None:
    """The manager hears of the daemon again and again, in less than half of the time that it gave, and no more once
    the loop stands still."""
    daemon = manager.start(watchdog_s=1.0)
    for _ in range(3):
        manager.hears("WATCHDOG=1")
    daemon.send_signal(signal.SIGSTOP)
    manager.socket.settimeout(1.0)
    with pytest.raises(TimeoutError):
        manager.hears("nothing that it says")


def test_no_word_of_the_manager_is_left_for_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """The manager's variables are taken out of the environment, so no child can speak for the daemon; what was meant
    for another process is not taken for ours."""
    given = {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "2000000", "LISTEN_FDS": "2", "LISTEN_PID": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert supervision() == ("/n", 2.0, 0)  # the sockets were another process's
    assert not given.keys() & os.environ.keys()
    monkeypatch.setenv("WATCHDOG_PID", "1")
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    assert supervision() == (None, 0.0, 0)


def test_passed_sockets_are_served_and_stay_when_the_daemon_ends(manager: Manager, worker: Worker) -> None:
    """With sockets of the manager, who connects while no daemon runs waits and is served by the next one; the socket
    files are the same after a stop and after a kill, and a holder keeps its lock."""
    manager.listen("registry.sock", "registry.life")
    files = [manager.registry.parent / "run" / name for name in ("registry.sock", "registry.life")]
    inodes = [path.stat().st_ino for path in files]
    worker.tell("resolve", "arm")  # before any daemon
    daemon = manager.start()
    made = worker.answer()
    assert [oct(stat.S_IMODE(path.stat().st_mode)) for path in files] == ["0o600", "0o600"]
    for number in (signal.SIGTERM, signal.SIGKILL):
        daemon.send_signal(number)
        daemon.wait(PATIENCE_S)
        with Worker(manager.registry) as late:
            late.tell("get", "arm")
            daemon = manager.start()
            assert late.answer()["fencing_token"] == made["fencing_token"]
        assert worker.ask("held", "arm")
    assert [path.stat().st_ino for path in files] == inodes


def test_sockets_that_are_not_this_registrys_are_refused(manager: Manager) -> None:
    """A daemon that is passed another registry's sockets, or what is no listening socket, does not start: 78."""
    manager.listen("other.sock")
    assert manager.start().wait(PATIENCE_S) == 78
    assert "the service manager passed" in manager.registry.with_name("test.log").read_text()
    manager.passed = []
    manager.listen("registry.sock")
    assert manager.start().wait(PATIENCE_S) == 78
    assert "has to pass both" in manager.registry.with_name("test.log").read_text()
    manager.passed = [manager.socket]
    assert manager.start().wait(PATIENCE_S) == 78
    assert "no listening Unix stream socket" in manager.registry.with_name("test.log").read_text()


def test_passed_sockets_whose_files_are_gone_before_the_start_are_made_anew(manager: Manager, worker: Worker) -> None:
    """A daemon that is passed sockets to whose files nobody can connect any more makes its own."""
    manager.listen("registry.sock", "registry.life")
    for name in ("registry.sock", "registry.life"):
        (manager.registry.parent / "run" / name).unlink()
    manager.start()
    manager.hears("READY=1")
    assert worker.ask("resolve", "arm")["held"]


def test_passed_socket_whose_file_was_removed_is_made_again(manager: Manager, worker: Worker) -> None:
    """Where somebody removes the manager's socket files, the daemon listens at their paths again by itself."""
    manager.listen("registry.sock", "registry.life")
    manager.start()
    worker.ask("resolve", "arm")
    for name in ("registry.sock", "registry.life"):
        (manager.registry.parent / "run" / name).unlink()
    until(lambda: all((manager.registry.parent / "run" / name).exists() for name in ("registry.sock", "registry.life")))
    with Worker(manager.registry) as late:
        assert late.ask("lookup", "arm")


def test_reload_is_told_from_beginning_to_end(manager: Manager) -> None:
    """SIGHUP is answered RELOADING, then READY, also where the file has a fault; without a file, SIGHUP ends it."""
    config = manager.registry.with_name("registryd.toml")
    config.write_text("")
    daemon = manager.start("--config", str(config))
    manager.hears("READY=1")
    for text in ('log_level = "debug"', "nonsense"):
        config.write_text(text)
        daemon.send_signal(signal.SIGHUP)
        assert "MONOTONIC_USEC=" in manager.hears("RELOADING=1")
        manager.hears("READY=1")
    daemon.terminate()
    assert daemon.wait(PATIENCE_S) == 0
    bare = manager.start()
    manager.hears("READY=1")
    bare.send_signal(signal.SIGHUP)
    assert bare.wait(PATIENCE_S) == -signal.SIGHUP


def test_manager_that_cannot_be_told_does_not_keep_the_daemon_from_serving(
    registry_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notify socket that is not there is a warning in the log, nothing else."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(registry_path.with_name("nobody")))
    with DaemonProcess(registry_path) as daemon, Worker(registry_path) as worker:
        assert worker.ask("resolve", "arm")["held"]
        assert "the service manager cannot be told READY=1" in daemon.log
