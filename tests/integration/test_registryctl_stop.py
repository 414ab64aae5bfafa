"""registryctl stop: the daemon ends by SIGTERM to the pid that the kernel names."""

from __future__ import annotations

from pathlib import Path

from conftest import Workers
from ctl import Ctl
from helpers import DaemonProcess, daemons_under
from madsci_registryctl import exits


def test_stop_idle_daemon_ends_it(daemon: DaemonProcess) -> None:
    """Stop ends a daemon that nobody needs, without a question, and returns when it is gone."""
    ctl = Ctl(daemon.registry)
    pid = daemon.pid
    assert ctl.json("stop") == {"stopped": True, "pid": pid}
    assert daemon.wait() == 0
    ctl("stop", status=exits.UNREACHABLE)


def test_stop_held_names_asks_first(daemon: DaemonProcess, workers: Workers) -> None:
    """Stop asks where names are held; the holder keeps its lock over the stop and the next start."""
    worker = workers()
    held = worker.ask("resolve", "a")
    ctl = Ctl(daemon.registry)
    done = ctl.run("stop", status=exits.USAGE)
    assert "1 names are held" in done.stderr
    assert "-y" in done.stderr
    ctl("stop", "-y")
    assert daemon.wait() == 0
    daemon.start()
    shown = ctl.json("show", "a")
    assert (shown["holder"]["pid"], shown["fencing_token"]) == (worker.pid, held["fencing_token"])


def test_stop_autostarted_daemon(registry_path: Path) -> None:
    """Stop ends a daemon that a client started; the next command that needs one starts another."""
    ctl = Ctl(registry_path)
    ulid = ctl("resolve", "a", "--type", "node").strip()
    ctl("stop")
    assert not daemons_under(registry_path.parent)
    assert ctl("lookup", "a").strip() == ulid


def test_stop_long_path(base_folder: Path) -> None:
    """A registry whose socket's path is longer than a socket address is stopped like any other."""
    folder = base_folder / ("long-" * 30)
    folder.mkdir()
    with DaemonProcess(folder / "registry.json") as daemon:
        Ctl(daemon.registry)("stop")
        assert daemon.wait() == 0
