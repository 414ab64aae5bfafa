"""What has to be right around a daemon before it writes anything: its own user, and where its folder is."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from madsci_registry import containers
from madsci_registryd.faults import BadConfiguration, NoPermission

# No POSIX locks, or locks that two hosts do not share: a second daemon would not be noticed.
SHARED_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "glusterfs", "lustre", "afs")

_UID_MAP = Path("/proc/self/uid_map")


def check_user(uid: int, uid_map: Path = _UID_MAP) -> None:
    """Refuse a user that its user namespace does not know: nobody could be told apart from it, and all be refused.

    Raises: NoPermission.
    """
    with suppress(OSError):
        ranges = [line.split() for line in uid_map.read_text().splitlines()]
        if not any(int(first) <= uid < int(first) + int(count) for first, _, count in ranges):
            raise NoPermission(
                f"the daemon's own user is not mapped in its user namespace (the kernel shows uid {uid}), and no "
                "client could be let in: run it as a uid that is mapped there (user: of a compose file, --uidmap)"
            )


def check_file_system(folder: Path, *, lasting: bool = False) -> None:
    """Refuse a folder whose file system is shared over a network or foreign, where locks do not hold.

    With `lasting`, refuse also one that goes with this container: no other container would see the registry, and the
    next one of the same name would have no identity of it left.

    Raises: BadConfiguration, with the way out in its message.
    """
    kind = containers.mount_of(folder).kind
    is_fuse = kind.startswith("fuse")
    if lasting and kind in containers.PASSING_KINDS:
        unless = "" if is_fuse else ". Where the registry may go with the container (tests): --ephemeral"
        raise BadConfiguration(
            f"{folder} is on {kind} in this container alone, and would go with it: mount the lab's folder, under "
            f"volumes: of this service and of every other one of the lab: `{containers.compose_line(folder)}`{unless}",
            path=str(folder),
        )
    if kind in SHARED_FILE_SYSTEMS or is_fuse:
        raise BadConfiguration(
            f"{folder} is on {kind}, where SQLite's locks do not hold; keep the database on a local disk: "
            f"madsci-registryd --registry {folder}/NAME.json --state-dir /var/tmp/madsci-registry, and set "
            f"MADSCI_REGISTRY_SOCKET=/var/tmp/madsci-registry/run/NAME.sock for the clients",
            path=str(folder),
        )
