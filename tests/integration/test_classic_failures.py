"""Failing loudly: a node as MADSci writes it, in a process of its own, ends where it cannot have its identity.

MADSci goes on with a random ULID after any error that is no RegistryLockError.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from classic import node
from conftest import Workers
from helpers import PATIENCE_S, DaemonProcess
from madsci_registry import RegistryClient

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (setuid)")
BOUND_S = 5.0
"""What a program may take beyond its registry_lock_timeout."""


def refused(process: subprocess.Popen[str], retry_timeout_s: float) -> str:
    """Wait for a node to end as it should and return the code of its error."""
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, (output, errors)
    assert "RegistryLockError" in errors or "RegistryLockTimeoutError" in errors
    code, took_s = output.split()
    assert float(took_s) < retry_timeout_s + BOUND_S
    return code


@pytest.mark.parametrize("retry_timeout_s", [0.0, 2.0])
def test_absent_daemon_ends_a_node(registry_path: Path, retry_timeout_s: float) -> None:
    """Where no daemon is there and none may be started, a node ends within its timeout and five seconds."""
    with node(str(retry_timeout_s), registry=registry_path) as process:
        assert refused(process, retry_timeout_s) == "unavailable"


@pytest.mark.parametrize("retry_timeout_s", [0.0, 2.0])
def test_hung_daemon_ends_a_node(daemon: DaemonProcess, retry_timeout_s: float) -> None:
    """Where the daemon does not answer, a node ends within its timeout and five seconds, with a lab and without."""
    daemon.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        with (
            node(str(retry_timeout_s), registry=daemon.registry) as alone,
            node(str(retry_timeout_s), "http://127.0.0.1:1", registry=daemon.registry) as with_a_lab,
        ):
            assert refused(alone, retry_timeout_s) == "timeout"
            assert refused(with_a_lab, retry_timeout_s) == "timeout"
        assert time.monotonic() - began >= retry_timeout_s
    finally:
        daemon.signal(signal.SIGCONT)


def test_daemon_that_hangs_while_a_node_waits_ends_it(daemon: DaemonProcess, workers: Workers) -> None:
    """Where the daemon stops answering while a node stands in its queue, the node ends in time, too."""
    workers().ask("resolve", "arm")
    with node("3", registry=daemon.registry) as process, RegistryClient(daemon.registry) as client:
        while not client.get("arm").waiting:
            time.sleep(0.01)
        daemon.signal(signal.SIGSTOP)
        try:
            assert refused(process, 3.0) in ("timeout", "unknown_outcome")
        finally:
            daemon.signal(signal.SIGCONT)


def test_held_name_ends_a_node(daemon: DaemonProcess, workers: Workers) -> None:
    """A name that another process holds for all of the timeout ends a node, with who holds it."""
    worker = workers()
    worker.ask("resolve", "arm")
    with node("0.5", registry=daemon.registry) as process:
        assert refused(process, 0.5) == "held"


def test_damaged_database_ends_a_node(registry_path: Path) -> None:
    """Where the registry's database is damaged the daemon does not start, and a node ends with `corrupt`."""
    registry_path.with_suffix(".db").write_bytes(b"not a database, long enough to be looked at" * 100)
    with node("1", registry=registry_path, MADSCI_REGISTRY_AUTOSTART="1") as process:
        assert refused(process, 1.0) == "corrupt"


def test_folder_that_cannot_be_made_ends_a_node(tmp_path: Path) -> None:
    """Where a file stands in the place of the registry's folder, a node ends."""
    (tmp_path / "file").write_text("")
    with node("1", registry=tmp_path / "file" / "registry.json", MADSCI_REGISTRY_AUTOSTART="1") as process:
        assert refused(process, 1.0) in ("unavailable", "permission_denied")


@AS_ROOT
@pytest.mark.parametrize("mode", [0o700, 0o711])
def test_socket_that_may_not_be_used_ends_a_node(daemon: DaemonProcess, mode: int) -> None:
    """A node of another user, who may not reach the registry's folder, or the sockets in it, ends."""
    # Python itself may be where that user may not read.
    before = (
        "import os; import madsci_registry.local_registry, madsci_registry.classic_types, madsci_registry._autostart\n"
        "os.setgroups([]); os.setgid(65533); os.setuid(65533)"
    )
    for folder in (daemon.registry.parent, daemon.registry.parent.parent):
        folder.chmod(mode)
    with node("1", registry=daemon.registry, before=before) as process:
        assert refused(process, 1.0) == "permission_denied"


@pytest.mark.parametrize(
    "before",
    [
        # Python 3.13.0 cannot import everything where there is no working directory.
        "import os, tempfile, madsci_registry.local_registry, madsci_registry.identity_resolver\n"
        "d = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d); del os.environ['MADSCI_REGISTRY_PATH']",
        "import os, tempfile; os.environ['MADSCI_REGISTRY_PATH'] = tempfile.gettempdir()",
        "import sys; sys.platform = 'darwin'",
    ],
)
def test_registry_that_there_cannot_be_ends_a_node(registry_path: Path, before: str) -> None:
    """A working directory that is gone, a folder instead of a file, another platform: a node ends at once."""
    with node("1", registry=registry_path, before=before) as process:
        assert refused(process, 1.0) in ("internal", "invalid", "unsupported")


@pytest.mark.parametrize(
    "before",
    [
        "import madsci_registry.client; madsci_registry.client.Registration = None",
        "import sys; sys.modules['ulid'] = None",
        "import sys; sys.modules['pydantic'] = None",
    ],
)
def test_fault_ends_a_node(daemon: DaemonProcess, before: str) -> None:
    """Even an error that nobody has thought of, or a library that is missing, ends a node."""
    with node("1", registry=daemon.registry, before=before) as process:
        assert refused(process, 1.0) == "internal"


def test_node_that_gets_its_name_runs(daemon: DaemonProcess) -> None:
    """The same node with its name free runs, with the ULID that the registry knows."""
    with node("1", registry=daemon.registry) as process, RegistryClient(daemon.registry) as client:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == client.lookup("arm")
        output, errors = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, output, errors) == (0, "", "")


def test_node_starts_the_daemon_where_it_may(registry_path: Path) -> None:
    """Where a daemon may be started, the first node starts it and runs."""
    with node("1", registry=registry_path, MADSCI_REGISTRY_AUTOSTART="1") as process:
        assert process.stdout is not None
        assert len(process.stdout.readline().strip()) == 26
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, errors) == (0, "")
