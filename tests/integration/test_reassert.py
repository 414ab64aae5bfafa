"""A holder that goes while it says, after an I/O error, what it held. A real daemon, raw lifelines."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from helpers import DaemonProcess, until
from madsci_registry import RegistryClient
from madsci_registryd import holders


@pytest.fixture
def after_error(registry_path: Path) -> DaemonProcess:
    """A registry whose last daemon noted an I/O error of this boot, with a free component `arm`; not served yet."""
    daemon = DaemonProcess(registry_path)
    with daemon, RegistryClient(registry_path, autostart=False) as client:
        client.resolve("arm", "node").release()
        token = client.resolve("arm", "node").fencing_token
        assert token is not None
        client.release("arm")
    Path(f"{registry_path.with_suffix('.db')}.lock").write_text(json.dumps({"io_error": holders.boot_id()}))
    return daemon


HELLO = {"op": "hello"}


@pytest.mark.parametrize("also", [[], [HELLO], "itself"])
def test_holder_that_goes_while_it_takes_its_lock_back_does_not_keep_it(
    after_error: DaemonProcess, also: list[dict[str, str]] | str
) -> None:
    """Who says what it held and closes the connection, or begins another session on it, before that is written has no
    lifeline: what it took back ends as after any lost connection, not never."""
    with RegistryClient(after_error.registry, autostart=False) as client:
        with after_error:
            token = client.history("arm")[-1].why["fencing_token"]
            hold = {"name": "arm", "instance": "i", "fencing_token": token + 1}
            resume = {"op": "resume", "token": "ab" * 32, "holds": [hold]}
            lines = [resume, *([resume] if also == "itself" else also)]
            with socket.socket(socket.AF_UNIX) as lifeline:
                lifeline.connect(str(after_error.lifeline))
                lifeline.sendall(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            until(lambda: client.history("arm")[-1].kind == "ended", "for the lock to end")
            granted, ended = client.history("arm")[-2:]
            assert granted.why == {"fencing_token": token + 1, "reasserted": True}
            assert ended.why["reason"] == "its connection ended and it did not resume"
            until(lambda: len(client.sessions()) == 1, "for its sessions to end")
