"""Every setting with its default, unknown keys refused. The only reader of the daemon's environment.

Order: command line, then environment (MADSCI_REGISTRYD_*), then the TOML file, then the defaults here.
"""

from __future__ import annotations

import difflib
import grp
import json
import os
import sys
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

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

    lab_url: Annotated[tuple[str, ...], NoDecode] = ()
    """The lab's registry, by the URLs of one or several equal services of it. Default: there is no lab."""
    lab_token_file: Path | None = None
    """A file with this host's line `HOST TOKEN` of the lab's token file."""
    lab_ca_file: Path | None = None
    """Certificates (PEM) that the lab's is to be signed by. Default: those of the system."""
    lab_require: bool = False
    """Refuse what the lab would have to be asked for while it is away, instead of going on without it."""
    lab_deadline_s: Annotated[float, Field(gt=0, le=60)] = 2.0
    """How long a request waits for the lab at most."""

    metrics_listen: str | None = None
    """Where metrics are served by HTTP: HOST:PORT, HOST a loopback address. Default: nowhere."""
    metrics_file: Path | None = None
    """A file for node_exporter's textfile collector; ends in .prom. Default: none."""

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        return None if self.metrics_listen is None else _address(self.metrics_listen)

    RELOADED: ClassVar[tuple[str, ...]] = ("log_level", "admin_group", *(f"{what}_per_uid" for what in Limits._fields))
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

    @model_validator(mode="after")
    def _has_lab(self) -> Settings:
        if not self.lab_url and (self.lab_token_file or self.lab_ca_file or self.lab_require):
            raise ValueError("lab.token_file, lab.ca_file and lab.require are for a lab, and there is no lab.url")
        return self

    @field_validator("lab_url", mode="before")
    @classmethod
    def _are_urls(cls, given: Any) -> Any:
        """Take one URL or a list of them; the environment has a list as JSON."""
        if isinstance(given, str):
            given = json.loads(given) if given.startswith("[") else [given]
        if not isinstance(given, (list, tuple)) or not all(isinstance(url, str) for url in given):
            raise ValueError("must be a URL or a list of URLs")
        return tuple(_lab_url(url) for url in given)

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


def _lab_url(text: str) -> str:
    """Return the URL of a lab's service without a slash at its end. Raises: ValueError where it is something else."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("must be a URL such as http://lab.example:8010")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a password: lab.token_file is for that")
    _ = parts.port  # raises where it is none
    return text.rstrip("/")


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
        _check_known(key, f"{_shown(key)} in {config}")
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
        key = ".".join(_shown(str(part)) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if not key:
            raise BadConfiguration(message) from None
        # A URL may hold a password.
        given_as = "" if key.startswith("lab.url") else f" (it is {first['input']!r})"
        raise BadConfiguration(f"{key}: {message}{given_as}") from None


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


def _shown(key: str) -> str:
    """Return a setting's key as the file has it: those of the lab stand in a table of their own."""
    return key.replace("lab_", "lab.", 1) if key.startswith("lab_") else key


def _check_known(key: str, shown: str) -> None:
    if key not in Settings.model_fields:
        near = difflib.get_close_matches(key, Settings.model_fields, n=1, cutoff=0)
        raise BadConfiguration(f"unknown setting {shown}; the nearest known one is {_shown(near[0])}")


def _read(config: Path) -> dict[str, Any]:
    try:
        values = dict(tomllib.loads(config.read_text(encoding="utf-8")))
        lab = values.pop("lab", {})
        if not isinstance(lab, dict):
            raise BadConfiguration(f"lab in {config} is a table: lab.url = ...")
        return values | {f"lab_{key}": value for key, value in lab.items()}
    except OSError as error:
        raise BadConfiguration(f"{config}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfiguration(f"{config} is no TOML: {error}") from None
