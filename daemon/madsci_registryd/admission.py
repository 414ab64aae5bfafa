"""Who may use a registry and who may administer it: judged by what the kernel says of the peer, nothing else. Pure.

Everyone who is admitted reads, resolves and holds. What takes something from somebody else (breaking a lock, renaming
or retiring what another user holds or held last, an import that retires) is an administrator's: root, the daemon's own
user, and the members of `admin_group`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from madsci_registry.errors import PermissionDeniedError

Access = Literal["owner", "group", "everyone"]

OVERFLOW_ID = 65534
"""What the kernel shows for a user or group that the daemon's user namespace does not know (overflowuid)."""


class Modes(NamedTuple):
    """What the sockets' folder and the sockets are made with."""

    folder: int
    socket: int
    group: int | None
    """The group that gets them; None: whichever they have."""


class Credentials(NamedTuple):
    """What the kernel says of a peer."""

    uid: int
    gid: int
    groups: frozenset[int]
    """Its supplementary groups."""

    def is_in(self, group: int | None) -> bool:
        return group not in (None, OVERFLOW_ID) and (group == self.gid or group in self.groups)


@dataclass(frozen=True)
class Admission:
    """The rules, as the settings have them. Immutable."""

    access: Access
    allow_uids: frozenset[int]
    own_uid: int
    group: int
    """Whom `access = group` means: the group of the registry's folder."""
    admin_group: int | None = None

    @property
    def modes(self) -> Modes:
        """Who else is allowed has to get as far as the hello; there the uid decides."""
        if self.access == "everyone" or self.allow_uids:
            return Modes(0o755, 0o666, None)
        return Modes(0o750, 0o660, self.group) if self.access == "group" else Modes(0o700, 0o600, None)

    @property
    def uids(self) -> frozenset[int] | None:
        """The only users that are let in, None where groups count or everyone is."""
        return frozenset({0, self.own_uid}) | self.allow_uids if self.access == "owner" else None

    @property
    def is_shared(self) -> bool:
        """Others than root and the daemon's own user may come."""
        return self.access != "owner" or bool(self.allow_uids)

    def admits(self, peer: Credentials) -> bool:
        if peer.uid == OVERFLOW_ID:
            return False
        return (
            peer.uid in (0, self.own_uid)
            or peer.uid in self.allow_uids
            or self.access == "everyone"
            or (self.access == "group" and peer.is_in(self.group))
        )

    def is_admin(self, peer: Credentials) -> bool:
        return peer.uid in (0, self.own_uid) or (peer.uid != OVERFLOW_ID and peer.is_in(self.admin_group))

    def refusal(self, peer: Credentials, socket: str, config: str) -> PermissionDeniedError:
        """Say to whom it was refused, what the socket is, and which setting would help."""
        if peer.uid == OVERFLOW_ID:
            message = (
                f"your user is not known in the daemon's user namespace (the kernel shows uid {OVERFLOW_ID}), so "
                f"{socket} is closed to you: run with a uid that is mapped there"
            )
            return PermissionDeniedError(message, uid=peer.uid, path=socket)
        who = {"group": f"the group {self.group}, ", "owner": "", "everyone": ""}[self.access]
        way = "being in that group, or " if self.access == "group" else f"allow_uids = [{peer.uid}], or "
        message = (
            f"you are uid {peer.uid} (groups {_listed({peer.gid} | peer.groups)}), and {socket} lets in {who}"
            f"uids {_listed({0, self.own_uid} | self.allow_uids)} (access = {self.access}); {way}another access, "
            f"in {config} would let you in"
        )
        return PermissionDeniedError(message, uid=peer.uid, path=socket)

    def admin_refusal(self, uid: int, what: str) -> PermissionDeniedError:
        """Refuse what only an administrator may do; `what` completes "you may not"."""
        group = "admin_group (not set)" if self.admin_group is None else f"admin_group ({self.admin_group})"
        message = f"you are uid {uid} and may not {what}: root, uid {self.own_uid} and the members of {group} may"
        return PermissionDeniedError(message, uid=uid)


def _listed(numbers: set[int] | frozenset[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))
