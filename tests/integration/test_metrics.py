"""Metrics of a real daemon: by registryctl, over HTTP, and as a file."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import Workers
from ctl import Ctl
from helpers import PATIENCE_S, DaemonProcess, environment, until
from madsci_registry import RegistryClient


def value(text: str, name: str, **labels: str) -> float:
    """Return the value of a sample of a text of metrics."""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"madsci_registryd_{name}" and sample.labels == labels:
                return float(sample.value)
    raise AssertionError(f"no {name}{labels} in:\n{text}")


def configured(registry: Path, text: str) -> DaemonProcess:
    """Return a daemon whose configuration file holds `text`; it is not started."""
    config = registry.parent / "registryd.toml"
    config.write_text(text)
    return DaemonProcess(registry, "--config", str(config))


def test_metrics_follow_what_happens(daemon: DaemonProcess, plain: RegistryClient, workers: Workers) -> None:
    """After a holder was killed and its waiter has the name: a hand-over, a lock ended by death, a session less."""
    holder, waiter = workers(), workers()
    holder.ask("resolve", "arm")
    waiter.tell("resolve", "arm", wait=PATIENCE_S)
    until(lambda: value(plain.metrics(), "waiting") == 1, "for the waiter")
    before = plain.metrics()
    assert value(before, "names", state="held") == 1
    assert value(before, "sessions", proof="pidfd", presence="attached") == 3
    assert value(before, "export_claims") == 1
    holder.kill()
    waiter.answer()
    after = plain.metrics()
    assert value(after, "hand_overs_total") == 1
    assert value(after, "locks_ended_total", how="process_died") == 1
    assert value(after, "sessions", proof="pidfd", presence="attached") == 2
    assert value(after, "waiting") == 0
    assert value(after, "export_passes_total") >= 1
    assert value(after, "commit_seconds_count", synced="no") >= 1
    assert value(after, "loop_turn_seconds_count") > value(before, "loop_turn_seconds_count")
    plain.lookup("arm")
    assert value(plain.metrics(), "requests_total", verb="lookup", code="ok") == 1


def test_registryctl_metrics_prints_the_text(daemon: DaemonProcess) -> None:
    """`registryctl metrics` prints what Prometheus reads, with --json as the value of `text`."""
    ctl = Ctl(daemon.registry)
    text = ctl("metrics")
    assert value(text, "epoch") > 0
    assert text.startswith("# HELP madsci_registryd_build_info ") and text.endswith("\n")
    assert value(ctl.json("metrics")["text"], "epoch") == value(text, "epoch")


def test_registryctl_metrics_starts_no_daemon(registry_path: Path) -> None:
    """Where no daemon serves, `registryctl metrics` ends with 6, and none serves afterwards."""
    Ctl(registry_path).run("metrics", status=6)
    assert not registry_path.with_suffix(".db").exists()


def test_metrics_are_given_out_as_configured(registry_path: Path) -> None:
    """With `metrics_listen` and `metrics_file` both have the metrics from the start; the file goes with the daemon."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    file = registry_path.parent / "madsci.prom"
    with configured(registry_path, f'metrics_listen = "127.0.0.1:{port}"\nmetrics_file = "{file}"\n') as daemon:
        with RegistryClient(registry_path) as client:
            epoch = client.status()["epoch"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert value(answer.read().decode(), "epoch") == epoch
        assert value(file.read_text(), "epoch") == epoch
        assert file.stat().st_mode & 0o777 == 0o644
        daemon.kill()
        assert file.exists()
        daemon.start()
        until(lambda: value(file.read_text(), "epoch") > epoch, "for the file of the next daemon")
        assert daemon.terminate() == 0
        assert not file.exists()


def is_accepted(port: int) -> bool:
    """Tell whether a program has accepted a connection to this port of 127.0.0.1: one that waits has no inode yet."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = [fields for fields in lines if fields[1] == f"0100007F:{port:04X}" and fields[3] == "01"]
    return any(fields[9] != "0" for fields in established)


def test_stop_waits_for_nobody_who_asks_for_metrics(registry_path: Path) -> None:
    """A daemon that is told to stop ends in order, whatever a client of its metrics does meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with configured(registry_path, f'metrics_listen = "127.0.0.1:{port}"\n') as daemon:
        with RegistryClient(registry_path) as client:
            client.status()  # it turns: the listener is there, too
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(b"GET")
            until(lambda: is_accepted(port), "for the connection to be accepted")
            daemon.signal(signal.SIGTERM)
            stopped = threading.Event()

            def drip() -> None:
                with suppress(OSError):
                    while not stopped.wait(0.1):
                        slow.sendall(b"G")

            thread = threading.Thread(target=drip)
            thread.start()
            try:
                assert daemon.wait() == 0
            finally:
                stopped.set()
                thread.join()


@pytest.mark.parametrize("address", ["0.0.0.0:9847", "[::]:9847", "198.51.100.7:9847", "localhost:9847"])
def test_metrics_for_other_hosts_are_refused_at_the_start(registry_path: Path, address: str) -> None:
    """A daemon that should serve metrics on another address than loopback ends with 78, says why, and makes nothing."""
    daemon = configured(registry_path, f'metrics_listen = "{address}"\n')
    done = subprocess.run(
        daemon.command(), env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 78
    assert "metrics_listen: " in done.stderr and address in done.stderr
    assert not registry_path.with_suffix(".db").exists()


def test_daemon_loads_what_makes_metrics_for_those_only_who_ask() -> None:
    """The daemon's program, as it serves, has not imported prometheus_client."""
    program = "import sys, madsci_registryd.app; print('prometheus_client' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"
