"""Which files and commands make a service, and which end it. Pure: nothing here looks at the disk or runs anything.

    what                    unit                                   its files are in
    the system's registry   madsci-registryd.service               /etc/systemd/system, /etc/madsci, ...
    a folder, by the system madsci-registryd@FOLDER.service        /etc/systemd/system; runs as the folder's owner
    a folder, by its user   madsci-registryd@FOLDER.service        ~/.config/systemd/user

Every command may be run again: it then does nothing that is done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from madsci_registry._endpoint import SYSTEM_CONFIG, SYSTEM_REGISTRY, SYSTEM_RUN
from madsci_registryctl.service import units
from madsci_registryctl.service.files import File

Scope = Literal["user", "system"]

SERVICE = "madsci-registryd.service"
SOCKET = "madsci-registryd.socket"
TEMPLATE = "madsci-registryd@.service"
BACKUP = "madsci-registryd-backup.service"
BACKUP_TIMER = "madsci-registryd-backup.timer"
SYSTEM_FILES = (SOCKET, BACKUP_TIMER, BACKUP, SERVICE)
"""The units of the system's registry; what starts another one comes first."""
SYSUSERS = Path("/etc/sysusers.d/madsci-registryd.conf")
TMPFILES = Path("/etc/tmpfiles.d/madsci-registryd.conf")
SYSTEM_UNITS = Path("/etc/systemd/system")
USER_UNITS = Path(".config/systemd/user")
"""Below the home folder."""

Command = tuple[str, ...]


@dataclass(frozen=True)
class Service:
    """A service that is or may be installed."""

    scope: Scope
    home: Path
    """Of the user whose service it is; not looked at for the system."""
    folder: Path | None = None
    """The `.madsci` folder that it serves, resolved; None: the system's registry."""

    @property
    def unit(self) -> str:
        """The unit that runs it. Raises InvalidError: the folder's path is too long."""
        return SERVICE if self.folder is None else units.unit_of(TEMPLATE, self.folder)

    @property
    def registry(self) -> Path:
        """The registry that it serves."""
        return SYSTEM_REGISTRY if self.folder is None else self.folder / "registry.json"

    @property
    def run(self) -> Path:
        """The folder of its sockets."""
        return SYSTEM_RUN if self.folder is None else self.folder / "run"

    @property
    def kept(self) -> Path:
        """The note of its daemon that keeps clients from starting another one."""
        return self.run / "registry.kept"

    @property
    def unit_folder(self) -> Path:
        """Where its units are."""
        return SYSTEM_UNITS if self.scope == "system" else self.home / USER_UNITS

    def systemctl(self, *words: str) -> Command:
        """Return a command line for the systemd that runs it."""
        return systemctl(self.scope, *words)


@dataclass(frozen=True)
class Plan:
    """What installs a service."""

    files: tuple[File, ...]
    prepare: tuple[Command, ...]
    """What has to be done between the files and the start."""
    units: tuple[str, ...]
    """Which units are enabled and started, sockets first."""


def systemctl(scope: Scope, *words: str) -> Command:
    """Return a command line for the system's systemd, or a user's own."""
    return ("systemctl", *(["--user"] if scope == "user" else []), *words)


def installation(service: Service, programs: Path, *, owner: str | None, socket_activation: bool) -> Plan:
    """Return what installs a service.

    Args:
        service: what is to be served.
        programs: the folder of the programs, as the units shall name it.
        owner: who runs a folder's service of the system, a user's name or uid.
        socket_activation: systemd holds the sockets; for the system's registry alone.

    Raises:
        InvalidError: a path that no unit file can hold.
    """
    if service.folder is None:
        return _of_system(service, programs, socket_activation=socket_activation)
    return _of_folder(service, programs, owner)


def _of_system(service: Service, programs: Path, *, socket_activation: bool) -> Plan:
    unit_files = [File(SYSTEM_UNITS / name, units.read(name, programs)) for name in SYSTEM_FILES]
    others = [
        File(SYSUSERS, units.read("sysusers.d/madsci-registryd.conf", programs)),
        File(TMPFILES, units.read("tmpfiles.d/madsci-registryd.conf", programs)),
        File(SYSTEM_CONFIG, units.read_configuration()),
    ]
    prepare = (
        ("systemd-sysusers", str(SYSUSERS)),
        ("systemd-tmpfiles", "--create", str(TMPFILES)),
        service.systemctl("daemon-reload"),
    )
    sockets = (SOCKET,) if socket_activation else ()
    return Plan((*unit_files, *others), prepare, (*sockets, SERVICE, BACKUP_TIMER))


def _of_folder(service: Service, programs: Path, owner: str | None) -> Plan:
    assert service.folder is not None
    source = TEMPLATE if service.scope == "system" else f"user/{TEMPLATE}"
    files = [File(service.unit_folder / TEMPLATE, units.read(source, programs))]
    if owner is not None:
        files.append(File(_owner_file(service.unit_folder, service.unit), owner_text(owner)))
    return Plan(tuple(files), (service.systemctl("daemon-reload"),), (service.unit,))


def owner_text(owner: str) -> str:
    """Return the drop-in that has a folder's service run as the folder's owner."""
    return units.marked(f"[Service]\nUser={owner}\n")


def _owner_file(folder: Path, unit: str) -> Path:
    return folder / f"{unit}.d" / "owner.conf"


@dataclass(frozen=True)
class Removal:
    """What takes services away again; what is not there is passed over."""

    units: tuple[str, ...] = ()
    """Which are stopped and disabled, in this order: sockets first, that nobody starts the service again."""
    files: tuple[Path, ...] = ()
    notes: tuple[Path, ...] = ()
    """What the daemons have noted beside their sockets, see `Service.kept`."""

    def __add__(self, other: Removal) -> Removal:
        return Removal(self.units + other.units, self.files + other.files, self.notes + other.notes)


def removal(service: Service, present: Collection[str], *, foreign: Collection[str] = ()) -> Removal:
    """Return what takes the service of a folder away, or without a folder all of the system's or of one user's.

    Args:
        service: which one, or any of theirs.
        present: names of what is in the folder of the units, and in the folders `*.wants` below it.
        foreign: the unit files, `SERVICE` or `TEMPLATE`, that run another program; they stay with all that is theirs.
    """
    found = Removal()
    if service.folder is None and service.scope == "system" and SERVICE not in foreign:
        files = (*(service.unit_folder / name for name in SYSTEM_FILES), SYSUSERS, TMPFILES, SYSTEM_CONFIG)
        found += Removal(SYSTEM_FILES, files, (service.kept,))
    if TEMPLATE in foreign:
        return found
    instances = instances_in(present)
    folders = [service.folder] if service.folder else [units.folder_of(unit) for unit in instances]
    for one in (Service(service.scope, service.home, folder) for folder in folders):
        found += Removal((one.unit,), (_owner_file(one.unit_folder, one.unit),), (one.kept,))
    if set(instances) <= set(found.units):
        found += Removal(files=(service.unit_folder / TEMPLATE,))
    return found


def instances_in(names: Iterable[str]) -> list[str]:
    """Pick the units of folders out of names of files, each once."""
    prefix, suffix = TEMPLATE.split("@")
    found = (name.removesuffix(".d") for name in names)
    return sorted({n for n in found if n.startswith(f"{prefix}@") and n.endswith(suffix) and n != TEMPLATE})


def journal(service: Service, options: Sequence[str]) -> Command:
    """Return the command line that shows a service's log."""
    unit = f"--user-unit={service.unit}" if service.scope == "user" else f"--unit={service.unit}"
    return ("journalctl", unit, *options)
