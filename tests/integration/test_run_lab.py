"""`make run-lab`: the two tiers on one machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from helpers import PATIENCE_S, PROJECT, accepts, environment, until
from madsci_registry import HeldError, RegistryClient


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.skipif(not (PROJECT / ".venv" / ".installed").exists(), reason="needs the environment that make made")
def test_make_run_lab_starts_a_lab_with_two_hosts_and_ends_them(tmp_path: Path) -> None:
    """`make run-lab` starts a lab and two daemons, which know of each other's names; Ctrl-C ends all three."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (tmp_path / "make.log").open("wb") as log:
        made = subprocess.Popen(
            ["make", "run-lab", f"LAB=127.0.0.1:{port}", f"LAB_DIR={tmp_path / 'lab'}"],
            cwd=PROJECT, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    registries = [tmp_path / "lab" / host / "registry.json" for host in ("host1", "host2")]
    lifelines = [path.parent / "run" / "registry.life" for path in registries]
    try:
        until(lambda: all(accepts(path) for path in lifelines), "for two daemons")
        first, second = [RegistryClient(registry=path, autostart=False) for path in registries]
        with first, second:
            for client in (first, second):
                until(lambda client=client: client.status()["lab"]["state"] == "up", "for the lab")  # type: ignore[misc]
            held = first.resolve("arm", "node")
            with pytest.raises(HeldError):
                second.resolve("arm", "node")
            assert second.resolve("arm", "node", acquire_lock=False).id == held.id
    finally:
        os.killpg(made.pid, signal.SIGINT)
        made.wait(PATIENCE_S)
    assert not any(accepts(path) for path in lifelines)
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S):
        pass
