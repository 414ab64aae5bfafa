"""Every setting with its default, unknown keys refused. The only reader of the daemon's environment.

Order: command line, then environment (MADSCI_REGISTRYD_*), then the TOML file, then the defaults here.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from madsci_registry.types import Proof
from madsci_registryd.faults import BadConfiguration

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
    proof: Proof = "pidfd"
    """The best proof of life that is used; a lower one than the kernel gives is for tests and for its bugs."""
    sessions_per_uid: Annotated[int, Field(ge=1, le=100_000)] = 4096
    """How many client processes one user may have."""

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
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BadConfiguration(f"{key}: {first['msg']} (it is {first['input']!r})") from None


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
