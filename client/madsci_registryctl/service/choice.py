"""Which service a command line means, and whether this user may have it."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import sys
from pathlib import Path

import click

from madsci_registry._endpoint import SYSTEM_REGISTRY
from madsci_registry.errors import InvalidError, PermissionDeniedError, UnsupportedError
from madsci_registryctl.invocation import Invocation
from madsci_registryctl.service.plan import SYSTEM_UNITS, Scope, Service

# Names that User= of a unit takes without a warning (systemd's valid_user_group_name); any other user is named by uid.
_USER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,30}")


def chosen(invocation: Invocation, scope: Scope | None, folder: Path | None) -> Service:
    """Return the service that the options name; nothing of it needs to exist.

    Raises:
        click.UsageError: they name none. UnsupportedError: this user has no home.
    """
    scope = scope or default_scope()
    if folder is not None:
        return Service(scope, home(), Path(os.path.realpath(folder)))
    if scope == "system":
        if invocation.registry is not None or invocation.socket is not None:
            raise click.UsageError("--system without --folder is the system's registry; --folder DIR names another.")
        return Service(scope, home())
    endpoint = invocation.endpoint()
    if endpoint.is_system:
        raise click.UsageError(f"{endpoint.reason}; --system is its service, --folder DIR one of your own.")
    if endpoint.registry is None or endpoint.registry.name != "registry.json":
        raise click.UsageError(f"{endpoint} is no registry.json in a folder: --folder DIR names one.")
    return Service(scope, home(), endpoint.registry.parent)


def to_read(invocation: Invocation, scope: Scope | None, folder: Path | None) -> Service:
    """Return the service whose log is meant: without a scope, of the system where that serves the registry."""
    if scope is not None:
        return chosen(invocation, scope, folder)
    if folder is None and invocation.endpoint().is_system:
        return Service("system", home())
    own = chosen(invocation, "user", folder)
    of_system = Service("system", own.home, own.folder)
    is_of_system = (SYSTEM_UNITS / "multi-user.target.wants" / of_system.unit).is_symlink()
    return of_system if is_of_system else own


def default_scope() -> Scope:
    """Return `user`. Raises click.UsageError: for root, who mostly means the system."""
    if os.geteuid() == 0:
        raise click.UsageError("As root, say which: --system, the service of this host; --user, root's own.")
    return "user"


def home() -> Path:
    """Return the home folder that this user's systemd knows: the one of the password database, not of HOME.

    Raises: UnsupportedError.
    """
    try:
        return Path(pwd.getpwuid(os.geteuid()).pw_dir)
    except KeyError:
        reason = f"uid {os.geteuid()} has no home folder: it is in no password database"
        raise UnsupportedError(reason, reason=reason) from None


def check_folder(folder: Path) -> None:
    """Raise InvalidError where this can be no `.madsci` folder."""
    reason = None
    if folder == SYSTEM_REGISTRY.parent:
        reason = "has the system's registry in it: say --system without --folder"
    elif folder == Path("/"):
        reason = "is no folder for a registry"
    elif not str(folder).isprintable():
        reason = "has characters in its path that cannot be shown"
    elif folder.exists() and not folder.is_dir():
        reason = "is no folder"
    elif not folder.parent.is_dir():
        reason = f"cannot be made: there is no {folder.parent}"
    elif (folder / ".madsci").is_dir() and not (folder / "registry.db").exists():
        reason = f"has a .madsci folder in it: did you mean {folder / '.madsci'}?"
    if reason:
        raise InvalidError(f"--folder: {folder} {reason}", field="folder", reason=reason)


def owner_of(folder: Path) -> str:
    """Return who owns a folder, by name or by uid. Raises InvalidError: no such folder, or no such user."""
    try:
        uid = folder.stat().st_uid
    except FileNotFoundError:
        reason = "does not exist; the service runs as its owner, so make it as that user first"
        raise InvalidError(f"--folder: {folder} {reason}", field="folder", reason=reason) from None
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        reason = f"belongs to uid {uid}, which is in no password database: systemd runs nothing as that user"
        raise InvalidError(f"--folder: {folder} {reason}", field="folder", reason=reason) from None
    return name if _USER_NAME.fullmatch(name) else str(uid)


def as_typed(program: Path) -> str:
    """Return what a person types for a program: its name where PATH leads to it, else its path."""
    found = shutil.which(program.name)
    return program.name if found and os.path.realpath(found) == os.path.realpath(program) else str(program)


def require_rights(service: Service) -> None:
    """Raise PermissionDeniedError where this user may not change the service."""
    if service.scope == "system" and os.geteuid() != 0:
        # By its full path: sudo looks along another PATH.
        words = shlex.join([str(Path(shutil.which(sys.argv[0]) or sys.argv[0]).absolute()), *sys.argv[1:]])
        raise PermissionDeniedError(f"--system needs root: sudo {words}", uid=os.geteuid())
    if service.scope == "user" and service.folder is not None and service.folder.exists():
        owner = service.folder.stat().st_uid
        if owner != os.geteuid():
            message = f"{service.folder} belongs to uid {owner}: with --system it is served as that user"
            raise PermissionDeniedError(message, uid=os.geteuid(), path=str(service.folder))
