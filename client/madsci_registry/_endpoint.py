"""Which registry a client uses and where its sockets are; the only reader of the client's environment.

The choice is made by arguments, environment and what lies on disk, never by who happens to answer. In this order:

    1. the argument: a socket, or a registry's JSON path
    2. MADSCI_REGISTRY_SOCKET
    3. MADSCI_REGISTRY_PATH, a JSON path
    4. the first `.madsci/` from MADSCI_SETTINGS_DIR (or the working directory) upwards, if it holds a registry
    5. the system's registry, if /etc/madsci/registryd.toml exists
    6. the `.madsci/` found in 4, though empty
    7. `.madsci/` beside the first `.git` found on the way up (made at the first resolve)
    8. `~/.madsci/` (made at the first resolve)

The walk goes up at most ten levels and not above the home folder, as MADSci 0.8 does (madsci.common.sentry).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from madsci_registry.errors import InvalidError

SYSTEM_REGISTRY = Path("/var/lib/madsci/registry.json")
SYSTEM_RUN = Path("/run/madsci")
SYSTEM_CONFIG = Path("/etc/madsci/registryd.toml")
FOLDER = ".madsci"
DEFAULT_FILE = "registry.json"

# madsci.common.sentry._MAX_LEVELS
WALK_UP_LEVELS = 10


@dataclass(frozen=True)
class Endpoint:
    """One registry and the two sockets of its daemon. Immutable; nothing is opened."""

    registry: Path | None
    """Its JSON file, DIR/NAME.json; None where only a socket was named."""
    socket: Path
    """Where requests go: DIR/run/NAME.sock."""
    lifeline: Path
    """Where the session is: DIR/run/NAME.life."""
    reason: str
    """Why this one, for people."""
    is_system: bool = False
    socket_is_given: bool = False
    """True: the socket is not where the registry's path puts it, so an own daemon has to be told."""

    @property
    def database(self) -> Path | None:
        """The registry's database, None where only a socket was named."""
        return self.registry.with_name(stem(self.registry) + ".db") if self.registry else None

    def exists(self) -> bool:
        """Tell whether there is something to read: a database or a JSON file (False where only a socket is known)."""
        return bool(self.registry and self.database and (self.database.exists() or self.registry.exists()))

    def __str__(self) -> str:
        return str(self.registry or self.socket)


def choose(
    registry: str | os.PathLike[str] | None,
    socket: str | os.PathLike[str] | None,
    env: Mapping[str, str],
    cwd: Path,
    *,
    system_config: Path = SYSTEM_CONFIG,
) -> Endpoint:
    """Return the registry that these arguments, environment and folders mean (the module says the order).

    Raises:
        InvalidError: a path that cannot be one (empty, a folder, a NUL); names the argument or variable.
    """
    if registry is not None or socket is not None:
        return _given(registry, "registry", socket, "socket", env, cwd, "given as an argument")
    if value := env.get("MADSCI_REGISTRY_SOCKET"):
        return _given(None, "", value, "MADSCI_REGISTRY_SOCKET", env, cwd, "MADSCI_REGISTRY_SOCKET is set")
    if value := env.get("MADSCI_REGISTRY_PATH"):
        return _given(value, "MADSCI_REGISTRY_PATH", None, "", env, cwd, "MADSCI_REGISTRY_PATH is set")
    return _found(env, cwd, system_config)


def choose_here(
    registry: str | os.PathLike[str] | None = None, socket: str | os.PathLike[str] | None = None
) -> Endpoint:
    """Return the registry that this process means: `choose` with its environment and working directory."""
    return choose(registry, socket, os.environ, Path.cwd())


def environment() -> Mapping[str, str]:
    """Return this process's environment."""
    return os.environ


def stem(registry: Path) -> str:
    """Return NAME of DIR/NAME.json."""
    return registry.name.removesuffix(".json") or registry.name


def _given(
    registry: str | os.PathLike[str] | None,
    registry_field: str,
    socket: str | os.PathLike[str] | None,
    socket_field: str,
    env: Mapping[str, str],
    cwd: Path,
    reason: str,
) -> Endpoint:
    file = None if registry is None else _registry_file(_path(registry, registry_field, env, cwd), registry_field)
    if socket is None:
        assert file is not None
        return _at(file, reason)
    where = _folder_resolved(_path(socket, socket_field, env, cwd))
    return Endpoint(file, where, lifeline_of(where), reason, socket_is_given=True)


def _found(env: Mapping[str, str], cwd: Path, system_config: Path) -> Endpoint:
    home = _home(env)
    named = env.get("MADSCI_SETTINGS_DIR")
    start = _path(named, "MADSCI_SETTINGS_DIR", env, cwd) if named else cwd
    folder, beside_git = walk_up(Path(os.path.realpath(start)), home)
    if folder and _at(folder / DEFAULT_FILE, "").exists():
        return _at(folder / DEFAULT_FILE, f"the first {FOLDER} folder upwards from {start}, and it holds a registry")
    if system_config.exists():
        return _at(SYSTEM_REGISTRY, f"{system_config} exists: this machine has a system-wide registry")
    if folder:
        return _at(folder / DEFAULT_FILE, f"the first {FOLDER} folder upwards from {start}")
    if beside_git:
        return _at(beside_git / DEFAULT_FILE, f"beside the .git found upwards from {start}; no {FOLDER} folder was")
    return _at(home / FOLDER / DEFAULT_FILE, f"in the home folder: upwards from {start} is neither {FOLDER} nor .git")


def walk_up(start: Path, home: Path) -> tuple[Path | None, Path | None]:
    """Return the first `.madsci` folder from `start` upwards, and the one that would be beside the first `.git`."""
    beside_git: Path | None = None
    for folder in [start, *start.parents][: WALK_UP_LEVELS + 1]:
        if (folder / FOLDER).is_dir():
            return folder / FOLDER, beside_git
        if beside_git is None and (folder / ".git").exists():
            beside_git = folder / FOLDER
        if folder == home:
            break
    return None, beside_git


def lifeline_of(socket: Path) -> Path:
    """Return the lifeline that belongs to a request socket: X.life for X.sock."""
    return socket.with_name(socket.name.removesuffix(".sock") + ".life")


def _at(registry: Path, reason: str) -> Endpoint:
    registry = _folder_resolved(registry)
    is_system = registry == _folder_resolved(SYSTEM_REGISTRY)
    run = SYSTEM_RUN if is_system else registry.parent / "run"
    socket = run / f"{stem(registry)}.sock"
    return Endpoint(registry, socket, lifeline_of(socket), reason, is_system=is_system)


def _path(value: str | os.PathLike[str], field: str, env: Mapping[str, str], cwd: Path) -> Path:
    text = os.fspath(value)
    if not isinstance(text, str):
        raise InvalidError(f"{field}: must be text, not {type(text).__name__}", field=field, reason="must be text")
    if not text or "\0" in text:
        raise InvalidError(f"{field}: {text!r} is no path", field=field, reason="is no path")
    if text == "~" or text.startswith("~/"):
        text = str(_home(env)) + text[1:]
    return cwd / text


def _registry_file(path: Path, field: str) -> Path:
    try:
        is_folder = path.is_dir()
    except PermissionError:  # before Python 3.12; then, and for what is in that folder, the first use says it
        is_folder = False
    if is_folder:
        reason = f"is a folder; a registry is named by its JSON file, such as {path / DEFAULT_FILE}"
        raise InvalidError(f"{field}: {path} {reason}", field=field, reason=reason)
    return path


def _folder_resolved(file: Path) -> Path:
    # Only the folder: registry.json is replaced by rename and may itself be a link that somebody keeps.
    return Path(os.path.realpath(file.parent)) / file.name


def _home(env: Mapping[str, str]) -> Path:
    return Path(os.path.realpath(env.get("HOME") or Path("~").expanduser()))
