"""Every setting with its default, unknown keys refused. The only reader of the daemon's environment.

Order: command line, then environment (MADSCI_REGISTRYD_*), then the TOML file, then the defaults here.
"""

from __future__ import annotations

import difflib
import grp
import os
import sys
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from madsci_registry import containers
from madsci_registry.types import Proof
from madsci_registryd.admission import Access
from madsci_registryd.faults import BadConfiguration
from madsci_registryd.quotas import Limits

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same module under its first name
    import tomli as tomllib

ENVIRONMENT = "MADSCI_REGISTRYD_"
SYSTEM_REGISTRY = Path("/var/lib/madsci/registry.json")
SYSTEM_SOCKETS = Path("/run/madsci")


class Settings(BaseSettings):
    """How a daemon runs. Immutable."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT, extra="forbid", frozen=True)

    registry: Path = Path(".madsci/registry.json")
    """The registry's name: the path of its JSON file; the database and the sockets lie beside it."""
    state_dir: Path | None = None
    """Where database and sockets are kept instead, for a registry whose folder cannot hold them."""
    socket: Path | None = None
    """Where requests are served; ends in .sock, the lifeline is beside it in .life. Default: run/NAME.sock."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    idle_exit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds without any client after which the daemon ends. Default: it never does."""
    export: bool = True
    """Keep registry.json as MADSci's own programs read and write it; off where none of them is left."""
    ephemeral: bool = False
    """In a container, keep the registry where it goes with the container: on overlayfs, or in memory."""
    proof: Proof = "pidfd"
    """The best proof of life that is used; a lower one than the kernel gives is for tests and for its bugs."""
    access: Access = "owner"
    """Who may use the registry beside root: the daemon's user, the group of the registry's folder, or everyone."""
    allow_uids: frozenset[Annotated[int, Field(ge=0, lt=1 << 32)]] = frozenset()
    """Users who may use it too, with `access = owner`."""
    admin_group: int | str | None = None
    """The group, by name or number, whose members may do what takes something from others."""
    connections_per_uid: Annotated[int, Field(ge=1, le=100_000)] = Limits().connections
    """How many lifelines one user may have open."""
    sessions_per_uid: Annotated[int, Field(ge=1, le=100_000)] = Limits().sessions
    """How many client processes one user may have."""
    names_per_uid: Annotated[int, Field(ge=1)] = Limits().names
    """How many names one user may make."""
    locks_per_uid: Annotated[int, Field(ge=1)] = Limits().locks
    """How many names one user may hold."""
    requests_per_uid: Annotated[int, Field(ge=1)] = Limits().requests
    """How many requests of one user may wait at once, for a name, a change or their turn."""
    bytes_per_uid: Annotated[int, Field(ge=1 << 20)] = Limits().bytes
    """How many bytes of requests that wait for their turn, and how many of imports, the daemon keeps for one user."""

    metrics_listen: str | None = None
    """Where metrics are served by HTTP: HOST:PORT, HOST a loopback address. Default: nowhere."""
    metrics_file: Path | None = None
    """A file for node_exporter's textfile collector; ends in .prom. Default: none."""

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        return None if self.metrics_listen is None else _address(self.metrics_listen)

    RELOADED: ClassVar = ("log_level", "admin_group", *(f"{what}_per_uid" for what in Limits._fields))
    """What a reload changes; anything else takes a restart, which costs no lock."""

    @model_validator(mode="after")
    def _is_one_rule(self) -> Settings:
        if self.access == "group" and self.allow_uids:
            raise ValueError("access = group cannot be with allow_uids: files have modes for one group, not for users")
        return self

    @property
    def limits(self) -> Limits:
        return Limits(**{what: getattr(self, f"{what}_per_uid") for what in Limits._fields})

    @property
    def admin_gid(self) -> int | None:
        """The number of `admin_group`. Raises: BadConfiguration where there is no such group."""
        group = self.admin_group
        if group is None or isinstance(group, int) or group.isdecimal():
            return None if group is None else int(group)
        try:
            return grp.getgrnam(group).gr_gid
        except KeyError:
            raise BadConfiguration(f"admin_group: there is no group {group!r} on this host") from None

    @field_validator("metrics_listen")
    @classmethod
    def _is_loopback(cls, text: str | None) -> str | None:
        if text is not None:
            _address(text)
        return text

    @field_validator("metrics_file")
    @classmethod
    def _is_prom(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix != ".prom":
            raise ValueError("must end in .prom, or node_exporter does not read it")
        return path

    @field_validator("registry")
    @classmethod
    def _is_json(cls, path: Path) -> Path:
        if path.suffix != ".json" or not path.stem:
            raise ValueError("must be the path of a .json file")
        return path

    @field_validator("socket")
    @classmethod
    def _is_sock(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix != ".sock":
            raise ValueError("must end in .sock")
        return path

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings


def _address(text: str) -> tuple[str, int]:
    """Read HOST:PORT. Raises: ValueError where it is something else, or may be reached from other hosts."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError("must be ADDRESS:PORT, as in 127.0.0.1:9847")
    try:
        address = ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise ValueError("must be ADDRESS:PORT with an address in numbers, as in 127.0.0.1:9847") from None
    if not address.is_loopback:
        raise ValueError(
            "must be a loopback address: metrics are served without encryption and to whoever asks; let something "
            "that asks who it is (a reverse proxy, an agent of Prometheus) pass them on to other hosts"
        )
    return str(address), int(port)


class Places:
    """Where a registry's files are. The registry's folder is resolved once, the file itself never."""

    def __init__(self, settings: Settings) -> None:
        folder = Path(os.path.realpath(settings.registry.parent))
        self.registry = folder / settings.registry.name
        name = settings.registry.stem
        state = Path(os.path.realpath(settings.state_dir)) if settings.state_dir else folder
        self.state = state
        self.database = state / f"{name}.db"
        self.lock = state / f"{name}.db.lock"
        self.lock_beside = folder / f"{name}.db.lock" if state != folder else None
        """The lock that a daemon without a state folder would take."""
        default = (SYSTEM_SOCKETS if self.registry == SYSTEM_REGISTRY else state / "run") / f"{name}.sock"
        self.socket = settings.socket.absolute() if settings.socket else default
        self.lifeline = self.socket.with_suffix(".life")
        self.kept = self.socket.with_suffix(".kept")
        """Says to clients who starts the daemon again."""
        self.owns_socket_folder = settings.socket is None
        """The sockets' folder is there for them alone."""


def load(given: Mapping[str, Any], config: Path | None) -> Settings:
    """Join command line, environment and file.

    Raises: BadConfiguration, naming the key and, for an unknown one, the nearest known.
    """
    values = _read(config) if config else {}
    for name in os.environ:
        if name.upper().startswith(ENVIRONMENT):
            _check_known(name.upper().removeprefix(ENVIRONMENT).lower(), name)
    for key in values:
        _check_known(key, f"{key} in {config}")
    from_environment = {k for k in Settings.model_fields if ENVIRONMENT + k.upper() in os.environ}
    init = {k: v for k, v in values.items() if k not in from_environment} | {
        k: v for k, v in given.items() if v is not None
    }
    try:
        return Settings(**init)
    except SettingsError as error:  # a list in the environment that is no JSON
        raise BadConfiguration(f"{error}; a list is written as JSON: [1000, 9999]") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise BadConfiguration(f"{key}: {message} (it is {first['input']!r})" if key else message) from None


class Supervision(NamedTuple):
    """What a service manager put into the environment; see supervisor.py."""

    notify_socket: str | None = None
    watchdog_s: float = 0.0
    """Within which time it wants to hear of us; 0: it does not."""
    sockets: int = 0
    """How many listening sockets it passed."""


NO_SUPERVISION = Supervision()


def supervision() -> Supervision:
    """Take what a service manager told this process out of the environment: it is for no child of ours."""
    given = {
        name: os.environ.pop(name, "")
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
    }
    ours = str(os.getpid())
    watched = given["WATCHDOG_PID"] in ("", ours) and given["WATCHDOG_USEC"].isdigit()
    passed = given["LISTEN_PID"] == ours and given["LISTEN_FDS"].isdigit()
    return Supervision(
        given["NOTIFY_SOCKET"] or None,
        int(given["WATCHDOG_USEC"]) / 1e6 if watched else 0.0,
        int(given["LISTEN_FDS"]) if passed else 0,
    )


def in_container() -> bool:
    """Tell whether this process is in a container."""
    return containers.is_container(os.environ)


def journal_stream() -> tuple[int, int] | None:
    """Return device and inode of the stream that leads to the journal (systemd.exec(5)), None where none does."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    return (int(device), int(inode)) if device.isdecimal() and inode.isdecimal() else None


def _check_known(key: str, shown: str) -> None:
    if key not in Settings.model_fields:
        near = difflib.get_close_matches(key, Settings.model_fields, n=1, cutoff=0)
        raise BadConfiguration(f"unknown setting {shown}; the nearest known one is {near[0]}")


def _read(config: Path) -> dict[str, Any]:
    try:
        return dict(tomllib.loads(config.read_text(encoding="utf-8")))
    except OSError as error:
        raise BadConfiguration(f"{config}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfiguration(f"{config} is no TOML: {error}") from None
