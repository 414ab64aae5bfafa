"""What registryctl says of programs that use registry.json themselves, and of that file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ctl import Ctl
from helpers import DaemonProcess, until
from madsci_registryctl import exits
from old_program import OldProgram


@pytest.fixture
def ctl(daemon: DaemonProcess) -> Ctl:
    return Ctl(daemon.registry)


@pytest.fixture
def old(daemon: DaemonProcess) -> OldProgram:
    return OldProgram(daemon.registry, pid=4711)


def findings(ctl: Ctl, status: int = 0) -> list[dict[str, str]]:
    """Return what doctor finds of registry.json."""
    found = json.loads(ctl.run("--json", "doctor", status=status).stdout)["findings"]
    return [finding for finding in found if finding["check"] == "registry.json"]


def test_old_holder_is_shown_and_refuses_and_cannot_be_broken(ctl: Ctl, old: OldProgram) -> None:
    """`list`, `show`, `resolve` and `release --force` name the old program that holds a name; none of them frees it."""
    id = old.resolve("arm")
    until(lambda: ctl.json("status")["held"], "for the daemon to see the old program")
    assert "old program[4711]@old-host" in ctl("list")
    shown = ctl("show", "arm")
    assert id in shown and "an old program (pid 4711 on old-host, by registry.json)" in shown and old.instance in shown
    refused = ctl.run("release", "arm", "--force", "-y", status=exits.HELD)
    assert "cannot be broken: end that program" in refused.stderr
    assert "kill 4711 on old-host would end it" in refused.stderr
    for command in (("rename", "arm", "leg", "--force"), ("retire", "arm")):
        ctl(*command, status=exits.HELD)
    assert old.heartbeat("arm")


def test_status_and_doctor_say_who_still_writes_and_what_was_refused(ctl: Ctl, old: OldProgram) -> None:
    """`status` and `doctor` name old programs that were seen, and count what of theirs was refused."""
    assert [f["level"] for f in findings(ctl)] == ["ok"]
    old.resolve("arm")
    until(lambda: ctl.json("status")["export"]["old_programs"], "for the daemon to see the old program")
    old.edit(lambda entries: entries.pop("arm"))
    until(lambda: ctl.json("status")["export"]["refused"], "for the deletion to be refused")
    assert "pid 4711 on old-host" in ctl("status")
    found = {finding["level"]: finding for finding in findings(ctl)}
    assert "pid 4711 on old-host" in found["note"]["found"] and "dropin" in found["note"]["fix"]
    assert "1 change by old programs refused" in found["warning"]["found"]
    assert "refused" in ctl("history", "arm")


@pytest.mark.parametrize("kind", ["symlink", "fifo"])
def test_doctor_names_what_is_no_file(ctl: Ctl, daemon: DaemonProcess, kind: str) -> None:
    """A link or FIFO at the file's path is an error of `doctor`, and `status` is degraded; names are served."""
    path = daemon.registry
    path.unlink(missing_ok=True)
    if kind == "symlink":
        path.symlink_to(path.with_name("elsewhere.json"))
    else:
        os.mkfifo(path)
    until(lambda: ctl.json("status")["export"]["state"] == "stopped", "for the daemon to see it")
    assert ctl.json("status")["degraded"]
    (finding,) = findings(ctl, exits.ERRORS_FOUND)
    assert finding["level"] == "error" and str(path) in finding["found"]
    ctl("resolve", "arm", "--type", "node")
    assert not path.with_name("elsewhere.json").exists()


def test_doctor_says_that_the_file_is_not_kept(registry_path: Path) -> None:
    """With export off nothing is written, and `status` and `doctor` say so."""
    with DaemonProcess(registry_path, "--no-export"):
        ctl = Ctl(registry_path)
        ctl("resolve", "arm", "--type", "node")
        assert ctl.json("status")["export"] == {"state": "off"}
        assert "registry.json: off" in ctl("status").replace("  ", "")
        (finding,) = findings(ctl)
        assert finding["level"] == "note" and "export is off" in finding["found"]
    assert not registry_path.exists()
