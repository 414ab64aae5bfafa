"""Who may use a registry: real clients of several users, with what the kernel says of each."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ctl import Ctl
from helpers import DaemonProcess, Worker, until
from madsci_registry import RegistryClient
from madsci_registry.errors import PermissionDeniedError, QuotaError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to be several users")

ALICE, BOB, CAROL = "54001:54001", "54002:54002:54100", "54003:54100"
"""BOB has the lab's group as a supplementary one, CAROL as her own."""
LAB = 54100


class Lab:
    """A registry with settings in a file, its daemon, and users who come and go."""

    def __init__(self, registry: Path, stack: ExitStack) -> None:
        self.registry = registry
        self.config = registry.with_name("registryd.toml")
        self._stack = stack
        registry.parent.chmod(0o755)
        os.chown(registry.parent, -1, LAB)

    def serve(self, settings: str) -> DaemonProcess:
        self.config.write_text(settings)
        return self._stack.enter_context(DaemonProcess(self.registry, "--config", str(self.config)))

    def user(self, user: str) -> Worker:
        return self._stack.enter_context(Worker(self.registry, user=user))


@pytest.fixture
def lab(registry_path: Path) -> Iterator[Lab]:
    with ExitStack() as stack:
        yield Lab(registry_path, stack)


def modes(daemon: DaemonProcess) -> list[str]:
    paths = (daemon.socket.parent, daemon.socket, daemon.lifeline)
    return [oct(stat.S_IMODE(path.stat().st_mode)) for path in paths]


def test_owner_alone_and_root_use_a_registry_by_default(lab: Lab) -> None:
    """Without a setting the sockets are closed to other users, and the refusal says so and what would help."""
    daemon = lab.serve("")
    assert modes(daemon) == ["0o700", "0o600", "0o600"]
    with pytest.raises(PermissionDeniedError) as refused:
        lab.user(ALICE).ask("lookup", "arm")
    for part in ("uid 54001", str(daemon.socket.parent), "access", "allow_uids"):
        assert part in str(refused.value)


def test_access_group_lets_in_the_group_of_the_folder(lab: Lab) -> None:
    """`access = group` lets in who has the registry folder's group, as primary or supplementary one, and no others."""
    daemon = lab.serve('access = "group"')
    assert modes(daemon) == ["0o750", "0o660", "0o660"]
    assert {path.stat().st_gid for path in (daemon.socket.parent, daemon.socket, daemon.lifeline)} == {LAB}
    bob, carol = lab.user(BOB), lab.user(CAROL)
    made = bob.ask("resolve", "arm")
    assert carol.ask("lookup", "arm") == made["id"]
    with pytest.raises(PermissionDeniedError):
        lab.user(ALICE).ask("lookup", "arm")


def test_access_everyone_lets_in_everyone_without_making_them_administrators(lab: Lab) -> None:
    """`access = everyone` lets all users read and hold; none of them takes from another what that one holds."""
    daemon = lab.serve('access = "everyone"')
    assert modes(daemon) == ["0o755", "0o666", "0o666"]
    alice, bob = lab.user(ALICE), lab.user(BOB)
    made = alice.ask("resolve", "arm")
    with pytest.raises(PermissionDeniedError) as refused:
        bob.ask("break_lock", "arm", fencing_token=made["fencing_token"])
    assert "54002" in str(refused.value)
    assert alice.ask("held", "arm")


def test_admin_group_makes_administrators_of_its_members(lab: Lab) -> None:
    """A member of `admin_group` breaks another user's lock, whose holder is told."""
    lab.serve(f'access = "everyone"\nadmin_group = {LAB}')
    alice, bob = lab.user(ALICE), lab.user(BOB)
    made = alice.ask("resolve", "arm")
    bob.ask("break_lock", "arm", fencing_token=made["fencing_token"])
    assert alice.ask("losses", 1) == [["arm", made["fencing_token"]]]


def test_allowed_uids_are_let_in_and_their_neighbours_are_not(lab: Lab) -> None:
    """`allow_uids` lets in users who share no group with the daemon, as containers have them; for others the socket
    is open as a file, but neither of the two sockets answers them."""
    daemon = lab.serve("allow_uids = [54001]")
    assert modes(daemon) == ["0o755", "0o666", "0o666"]
    assert lab.user(ALICE).ask("resolve", "arm")["held"]
    bob = lab.user(BOB)
    with pytest.raises(PermissionDeniedError) as refused:
        bob.ask("lookup", "arm")
    assert lab.user(ALICE).ask("knock", str(daemon.socket), 30.0)
    assert not bob.ask("knock", str(daemon.socket), 0.5)
    for part in ("you are uid 54002", "54100", str(daemon.lifeline), "allow_uids = [54002]", str(lab.config)):
        assert part in str(refused.value)
    assert "refused a line" in daemon.log


def test_reload_changes_roles_and_quotas_and_loses_no_request(lab: Lab) -> None:
    """SIGHUP takes over roles and quotas from the file, for those who are connected too; holders notice nothing, who
    waits is granted, and not one request under way is lost."""
    everyone = 'access = "everyone"\n'
    daemon = lab.serve(f"{everyone}admin_group = {LAB}")
    alice, bob, waiter = lab.user(ALICE), lab.user(BOB), lab.user(ALICE)
    made = alice.ask("resolve", "arm")
    waiter.tell("resolve", "arm", wait=300)
    asker = lab.user(ALICE)
    asker.tell("flood", "arm", 2.0)
    for n in range(20):
        lab.config.write_text(f'{everyone}locks_per_uid = 1\nallow_uids = [{n}]\nlog_level = "debug"')
        daemon.signal(signal.SIGHUP)
        until(lambda n=n: daemon.log.count("settings reloaded") > n)  # type: ignore[misc]
    assert "changed, but only with a restart: allow_uids" in daemon.log
    assert asker.answer() > 0  # each was answered
    with pytest.raises(PermissionDeniedError):
        bob.ask("break_lock", "arm", fencing_token=made["fencing_token"])
    with pytest.raises(QuotaError):
        alice.ask("resolve", "leg")
    assert not waiter.answered() and alice.ask("held", "arm")
    alice.ask("release_all")
    assert waiter.answer()["fencing_token"] > made["fencing_token"]


def test_reload_of_a_faulty_file_changes_nothing(lab: Lab) -> None:
    """A file that cannot be taken is refused with its fault in the log, and the daemon serves on as before."""
    daemon = lab.serve("allow_uids = [54001]")
    alice = lab.user(ALICE)
    alice.ask("resolve", "arm")
    for wrong in ("alow_uids = []", 'admin_group = "no-such-group-here"', "allow_uids = 5", "\0"):
        lab.config.write_text(wrong)
        before = daemon.log.count("not reloaded")
        daemon.signal(signal.SIGHUP)
        until(lambda before=before: daemon.log.count("not reloaded") > before)  # type: ignore[misc]
    assert lab.user(ALICE).ask("lookup", "arm")
    assert alice.ask("held", "arm")


def test_connections_of_one_user_are_limited(lab: Lab) -> None:
    """A user with as many connections as it may have gets `quota` for one more; other users come in."""
    lab.serve('access = "everyone"\nconnections_per_uid = 2')
    first, second, third = (lab.user(ALICE) for _ in range(3))
    first.ask("resolve", "arm")
    second.ask("lookup", "arm")
    with pytest.raises(QuotaError) as refused:
        third.ask("lookup", "arm")
    assert (refused.value.what, refused.value.limit) == ("connections", 2)
    assert lab.user(BOB).ask("lookup", "arm")
    second.kill()
    until(lambda: comes_in(lab.user(ALICE)))


def comes_in(worker: Worker) -> bool:
    try:
        worker.ask("lookup", "arm")
    except QuotaError:
        return False
    return True


def test_one_users_storm_of_lines_leaves_others_served(lab: Lab) -> None:
    """While one user says lines on twenty lifelines as fast as it can, another user's requests are answered, a new
    client of that user comes in, and a holder whose connection was cut comes back and has its lock."""
    daemon = lab.serve('access = "everyone"')
    bob, alice = lab.user(BOB), lab.user(ALICE)
    held = bob.ask("resolve", "arm")
    alice.tell("storm", str(daemon.lifeline), 20, 6.0)
    with RegistryClient(lab.registry, timeout=30) as client:
        until(lambda: any(session.client == "storm" for session in client.sessions()))
    deadline, count = time.monotonic() + 2.0, 0
    while time.monotonic() < deadline:
        bob.ask("lookup", "arm")
        count += 1
    assert count > 40
    assert lab.user(BOB).ask("get", "arm")["fencing_token"] == held["fencing_token"]
    daemon.kill()
    daemon.start()
    assert bob.ask("get", "arm")["fencing_token"] == held["fencing_token"] and bob.ask("held", "arm")
    assert alice.answer() > 0


def test_one_users_flood_leaves_anothers_requests_their_turn(lab: Lab) -> None:
    """While one user's processes send lookups as fast as they can, another user's are answered: each within the time
    of a turn, not after all that is waiting. (How soon: `make chaos`.)"""
    lab.serve('access = "everyone"')
    bob = lab.user(BOB)
    bob.ask("resolve", "arm")
    flood = [lab.user(ALICE) for _ in range(3)]
    for worker in flood:
        worker.tell("flood", "arm", 3.0)
    deadline, count = time.monotonic() + 2.0, 0
    while time.monotonic() < deadline:
        bob.ask("lookup", "arm")
        count += 1
    assert count > 20
    assert all(worker.answer() > 0 for worker in flood)


def test_doctor_takes_what_the_settings_open_for_no_fault(lab: Lab) -> None:
    """Where the settings let in others, `doctor` finds no fault in open sockets; where they do not, it does."""
    ctl = Ctl(lab.registry)
    daemon = lab.serve('access = "everyone"')
    found = {finding["check"]: finding for finding in ctl.json("doctor")["findings"]}
    assert found["sockets"]["level"] == "ok" and "everyone" in found["sockets"]["found"]
    assert found["socket folder"]["level"] == "ok"
    daemon.terminate()
    closed = lab.serve("")
    closed.socket.chmod(0o666)
    found = {finding["check"]: finding for finding in ctl.json("doctor", status=11)["findings"]}
    assert found["sockets"]["level"] == "error"
