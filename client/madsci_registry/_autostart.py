"""Starts a registry's daemon where none is: for one person's machine, like ssh-agent.

A daemon that would die with its starter, or that belongs to another user, is not started: each such case is a function
of its own here, and its text tells the person what to do instead. Of many clients at once one starts the daemon (an
flock on run/NAME.start); the others just try to connect. The instance lock of the daemon itself decides any race.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

from madsci_registry import containers
from madsci_registry._endpoint import Endpoint, environment
from madsci_registry.cgroups import innermost_unit
from madsci_registry.errors import PermissionDeniedError, RegistryError, UnavailableError, from_wire

IDLE_EXIT_S = 600
"""A daemon that a client started ends by itself when no client was there for ten minutes."""

# What a program needs to run at all, and what says that it is in a container, and that the registry may go with that;
# nothing else of the starter's environment may shape a daemon that others use.
_KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV")
_KEPT_OF_CONTAINERS = ("container", "KUBERNETES_SERVICE_HOST", "MADSCI_REGISTRYD_EPHEMERAL")

_starters: list[Popen[bytes]] = []


def refusal(endpoint: Endpoint, env: Mapping[str, str] | None = None) -> str | None:
    """Say why this registry's daemon may not be started by a client, None where it may."""
    env = environment() if env is None else env
    if endpoint.registry is None:
        return "only a socket is named, not the registry behind it"
    if endpoint.is_system:
        return "the system's registry is started by systemd (systemctl start madsci-registryd)"
    if env.get("MADSCI_REGISTRY_AUTOSTART") == "0":
        return "MADSCI_REGISTRY_AUTOSTART=0 forbids to start one"
    if find_spec("madsci_registryd") is None or not sys.executable:
        return "the daemon's package (madsci_registryd) is not installed here"
    if env.get("MADSCI_REGISTRY_AUTOSTART") == "1":
        return None
    return _kept(endpoint) or _foreign_folder(endpoint.registry.parent) or _in_container(endpoint, env) or _in_service()


def lone_folder(endpoint: Endpoint, env: Mapping[str, str] | None = None) -> str | None:
    """Say, in a container, that the registry's folder is in it alone, so that it would have a registry of its own.

    None: not in a container, or the folder is mounted from outside.

    Raises: OSError where the folder may not be looked at.
    """
    if not containers.is_container(environment() if env is None else env):
        return None
    folder = _shared_folder(endpoint)
    mount = containers.mount_of(_nearest(folder))
    return f"{folder} is in this container alone (on {mount.kind})" if containers.is_alone(mount) else None


def mount_hint(endpoint: Endpoint) -> str:
    """Tell a person how a container gets to see the registry that the others of its lab have."""
    line = containers.compose_line(_shared_folder(endpoint))
    return f"mount the lab's folder, under volumes: of this service, of registryd and of all others: `{line}`"


def hint(endpoint: Endpoint) -> str:
    """Tell a person how to start the daemon of a registry."""
    if containers.is_container(environment()):
        return _hint_in_container(endpoint)
    if endpoint.is_system:
        return "systemctl start madsci-registryd"
    if endpoint.registry is None:
        return f"madsci-registryd --socket {endpoint.socket} --registry PATH.json"
    keeper = _keeper(endpoint)
    if keeper is not None and keeper[1]:
        return keeper[1]
    socket = f" --socket {endpoint.socket}" if endpoint.socket_is_given else ""
    return f"madsci-registryd --registry {endpoint.registry}{socket}"


def _hint_in_container(endpoint: Endpoint) -> str:
    with suppress(OSError):
        if lone_folder(endpoint):
            return mount_hint(endpoint)
    if endpoint.is_system:
        return "on the host: systemctl start madsci-registryd"
    return f"docker compose up -d registryd, a service that mounts {_shared_folder(endpoint)} as this one does"


def _shared_folder(endpoint: Endpoint) -> Path:
    """Return the folder in which clients of several containers must see the same sockets."""
    if endpoint.registry is None or endpoint.socket_is_given or endpoint.is_system:
        return endpoint.socket.parent
    return endpoint.registry.parent


def make_folder(endpoint: Endpoint) -> None:
    """Make the registry's folder where it is missing, as MADSci does.

    Raises:
        PermissionDeniedError, UnavailableError: it cannot be made.
    """
    assert endpoint.registry is not None
    folder = endpoint.registry.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except PermissionError:
        raise PermissionDeniedError(f"{folder} cannot be made: no permission", path=str(folder)) from None
    except OSError as error:
        raise UnavailableError(f"{folder} cannot be made: {error.strerror}", path=str(folder)) from None


def start_daemon(endpoint: Endpoint, deadline: float) -> bool:
    """Start the daemon and wait until it serves; False where another client is at it or `deadline` came first.

    Args:
        endpoint: a registry for which `refusal` said nothing.
        deadline: monotonic instant; the starter goes on by itself after it.

    Raises:
        RegistryError: what the daemon said of its failure; PermissionDeniedError, UnavailableError: no folder `run`,
            or the process could not be started.
    """
    _reap()
    try:
        lock = _open_start_lock(endpoint)
    except PermissionError as error:
        raise PermissionDeniedError(f"{error.filename}: no permission", path=str(error.filename)) from None
    except OSError as error:
        raise UnavailableError(f"{error.filename}: {error.strerror}", path=str(endpoint)) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return _spawn(endpoint, deadline)
    finally:
        # Unlocked by name: a child forked meanwhile has a copy of the descriptor and would keep the lock.
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _open_start_lock(endpoint: Endpoint) -> int:
    run = endpoint.socket.parent
    if not endpoint.socket_is_given:
        run.mkdir(mode=0o700, exist_ok=True)
    return os.open(run / f"{endpoint.socket.stem}.start", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _spawn(endpoint: Endpoint, deadline: float) -> bool:
    log = endpoint.socket.with_suffix(".log")
    try:
        stderr = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            starter = Popen(
                command(endpoint),
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=stderr,
                cwd="/",
                env=clean_environment(environment()),
                start_new_session=True,
            )
        finally:
            os.close(stderr)
    except OSError as error:
        raise UnavailableError(f"no daemon could be started: {error}", hint=hint(endpoint)) from None
    _starters.append(starter)
    assert starter.stdout is not None
    with starter.stdout as pipe:
        line = _read_line(pipe.fileno(), deadline)
    _reap()
    return line is not None and _judge(line, log, endpoint)


def _judge(line: bytes, log: Path, endpoint: Endpoint) -> bool:
    try:
        outcome = json.loads(line)
    except ValueError:
        raise UnavailableError(f"the daemon did not start; {log} may say why", hint=hint(endpoint)) from None
    if "error" in outcome:
        raise _with_hint(from_wire(outcome["error"]), endpoint)
    return True


def _with_hint(error: RegistryError, endpoint: Endpoint) -> RegistryError:
    if isinstance(error, UnavailableError) and not error.hint:
        error.hint = hint(endpoint)
    return error


def _read_line(pipe: int, deadline: float) -> bytes | None:
    """Read to the first newline or the end; None if the deadline comes first."""
    line = b""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while b"\n" not in line:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        part = os.read(pipe, 65536)
        if not part:
            break
        line += part
    return line


def _reap() -> None:
    # The starter exits as soon as it has spoken; one that was slower is met here the next time.
    for starter in _starters[:]:
        if starter.poll() is not None:
            _starters.remove(starter)


def command(endpoint: Endpoint) -> list[str]:
    """Return the command line that starts the daemon of a registry."""
    assert endpoint.registry is not None
    argv = [sys.executable, "-m", "madsci_registryd", "--registry", str(endpoint.registry)]
    if endpoint.socket_is_given:
        argv += ["--socket", str(endpoint.socket)]
    return [*argv, "--idle-exit", str(IDLE_EXIT_S), "--autostarted"]


def clean_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return what a started daemon gets of an environment, with this program's own copy of the packages."""
    kept = (*_KEPT, *_KEPT_OF_CONTAINERS)
    clean = {key: value for key, value in env.items() if key in kept or key.startswith("LC_")}
    paths = [str(Path(path).absolute()) for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    # A program may have put the packages on sys.path by itself; installed ones are found anyway.
    paths += [root for name in ("madsci_registryd", "madsci_registry") if (root := _source_root(name))]
    if paths:
        clean["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return clean


def _source_root(package: str) -> str | None:
    spec = find_spec(package)
    if spec is None or not spec.origin:
        return None
    root = Path(spec.origin).absolute().parents[1]
    return None if root.name in ("site-packages", "dist-packages") else str(root)


def _foreign_folder(folder: Path) -> str | None:
    """Another user's registry is another user's daemon."""
    folder = _nearest(folder)
    owner = folder.stat().st_uid
    return None if owner == os.geteuid() else f"{folder} belongs to uid {owner}, not to you (uid {os.geteuid()})"


def _nearest(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _keeper(endpoint: Endpoint) -> tuple[str, str] | None:
    """Return who starts the daemon again when it is gone, and how that is told to do so, as the daemon noted it."""
    try:
        lines = endpoint.socket.with_suffix(".kept").read_text(encoding="utf-8", errors="replace")[:1000].splitlines()
    except OSError:
        return None
    by, start, *_ = [*("".join(c for c in line if c.isprintable()) for line in lines), "", ""]
    return by or "somebody", start


def _kept(endpoint: Endpoint) -> str | None:
    """A daemon of ours would keep the one out that its unit or container is just about to start again."""
    keeper = _keeper(endpoint)
    if keeper is None:
        return None
    note = endpoint.socket.with_suffix(".kept")
    return f"{keeper[0]} starts it (by {note}, which may be removed if that is over)"


def _in_container(endpoint: Endpoint, env: Mapping[str, str]) -> str | None:
    """A daemon in a container ends with it, while other containers on the same folder count on it.

    With the pids of the host it is no such thing: a person's toolbox, or a container made to look after the host.
    """
    if not containers.has_own_pids() or not containers.is_marked(env):
        return None
    with suppress(OSError):
        alone = lone_folder(endpoint, env)
        if alone:
            return f"{alone}, and no other container would see a registry there"
    return "this is a container: run madsci-registryd outside, or in a container of its own"


def _in_service(cgroup: Path = Path("/proc/self/cgroup")) -> str | None:
    """A daemon started in a systemd service is killed when that service stops."""
    try:
        unit = innermost_unit(cgroup.read_text())
    except OSError:
        return None
    if unit is None or not unit.endswith(".service"):
        return None
    return f"this runs in the systemd unit {unit}, which would take the daemon down with it"
