"""Who is let in and who administers, as pure rules."""

from __future__ import annotations

import dataclasses

import pytest

from madsci_registryd.admission import OVERFLOW_ID, Access, Admission, Credentials

OWNER = Admission("owner", frozenset(), own_uid=990, group=80)
STRANGER = Credentials(1001, 1001, frozenset({50}))
MEMBER = Credentials(1002, 1002, frozenset({80}))
PRIMARY = Credentials(1003, 80, frozenset())


def test_root_and_the_daemons_own_user_are_always_let_in_as_administrators() -> None:
    """Whatever the settings say, root and the daemon's own user use and administer the registry."""
    accesses: tuple[Access, ...] = ("owner", "group", "everyone")
    for access in accesses:
        rules = dataclasses.replace(OWNER, access=access)
        for uid in (0, 990):
            peer = Credentials(uid, uid, frozenset())
            assert rules.admits(peer) and rules.is_admin(peer)


@pytest.mark.parametrize(
    ("access", "let_in"), [("owner", set()), ("group", {1002, 1003}), ("everyone", {1001, 1002, 1003})]
)
def test_access_lets_in_whom_it_names_and_nobody_else(access: Access, let_in: set[int]) -> None:
    """`owner` lets in nobody else, `group` who has the group as its primary or a supplementary one, `everyone` all."""
    rules = dataclasses.replace(OWNER, access=access)
    peers = (STRANGER, MEMBER, PRIMARY)
    assert {peer.uid for peer in peers if rules.admits(peer)} == let_in
    assert not any(rules.is_admin(peer) for peer in peers)


def test_allowed_uids_are_let_in_whatever_access_says() -> None:
    """`allow_uids` lets in who is in no group; it makes nobody an administrator."""
    rules = dataclasses.replace(OWNER, allow_uids=frozenset({1001}))
    assert rules.admits(STRANGER) and not rules.admits(MEMBER)
    assert not rules.is_admin(STRANGER)


def test_members_of_the_admin_group_administer() -> None:
    """`admin_group` makes administrators of its members; to be let in they need `access` or `allow_uids`."""
    rules = dataclasses.replace(OWNER, admin_group=50)
    assert rules.is_admin(STRANGER) and not rules.is_admin(MEMBER)
    assert not rules.admits(STRANGER)


def test_user_that_the_namespace_does_not_know_is_nobody() -> None:
    """The overflow uid stands for every unmapped user, and the overflow group for every unmapped group: they never
    count, not even where everyone is let in or the settings name them."""
    rules = Admission("everyone", frozenset({OVERFLOW_ID}), own_uid=990, group=OVERFLOW_ID, admin_group=OVERFLOW_ID)
    unmapped = Credentials(OVERFLOW_ID, OVERFLOW_ID, frozenset({OVERFLOW_ID}))
    assert not rules.admits(unmapped) and not rules.is_admin(unmapped)
    assert not rules.is_admin(Credentials(1001, OVERFLOW_ID, frozenset()))
    assert not dataclasses.replace(rules, access="group").admits(Credentials(1001, OVERFLOW_ID, frozenset()))


def test_modes_open_the_sockets_as_far_as_the_hello_needs_it() -> None:
    """The folder and the sockets are closed to whom the hello would refuse, as far as file modes can say it."""
    assert OWNER.modes == (0o700, 0o600, None)
    assert dataclasses.replace(OWNER, access="group").modes == (0o750, 0o660, 80)
    assert dataclasses.replace(OWNER, access="everyone").modes == (0o755, 0o666, None)
    assert dataclasses.replace(OWNER, allow_uids=frozenset({5})).modes == (0o755, 0o666, None)


def test_refusal_says_who_you_are_what_it_is_and_what_would_help() -> None:
    """A refusal names the user with its groups, the socket, the rule and the setting that would let it in."""
    error = OWNER.refusal(STRANGER, "/run/madsci/registry.life", "/etc/madsci/registryd.toml")
    for part in (
        "uid 1001",
        "50, 1001",
        "/run/madsci/registry.life",
        "access = owner",
        "allow_uids = [1001]",
        "/etc/madsci/registryd.toml",
    ):
        assert part in str(error)
    assert (error.code, error.uid, error.path) == ("permission_denied", 1001, "/run/madsci/registry.life")
    by_group = str(dataclasses.replace(OWNER, access="group").refusal(STRANGER, "/s.life", "the settings"))
    assert "being in that group" in by_group and "allow_uids" not in by_group  # which cannot be with access = group
    unmapped = OWNER.refusal(Credentials(OVERFLOW_ID, 1, frozenset()), "/s.life", "the settings")
    assert "user namespace" in str(unmapped)
