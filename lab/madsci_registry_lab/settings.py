"""Every setting with its default, unknown keys refused. The only reader of the lab's environment.

Order: command line, then environment (MADSCI_REGISTRY_LAB_*), then the TOML file, then the defaults here.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from madsci_registry_lab.etcd_access import EtcdFiles
from madsci_registry_lab.faults import BAD_CONFIGURATION, Fault

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same module under its first name
    import tomli as tomllib

ENVIRONMENT = "MADSCI_REGISTRY_LAB_"


class Settings(BaseModel):
    """How a lab registry runs. Immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    listen: str = "127.0.0.1:8010"
    """Where it serves: HOST:PORT. Without tokens, HOST must be a loopback address."""
    store: str = "sqlite:.madsci/lab.db"
    """Where it keeps everything: sqlite:PATH, or etcd://HOST:PORT,HOST:PORT,... of its members."""
    etcd_ca: Path | None = None
    """The authority (PEM) of etcd's certificates: speak TLS with it."""
    etcd_cert: Path | None = None
    """A certificate (PEM) that etcd is shown."""
    etcd_key: Path | None = None
    """That certificate's key."""
    etcd_user: str | None = None
    """The user of etcd."""
    etcd_password_file: Path | None = None
    """A file that holds that user's password."""
    token_file: Path | None = None
    """A file of lines `host token`, one for each host."""
    tls_cert: Path | None = None
    """A certificate (PEM, with its chain): serve HTTPS."""
    tls_key: Path | None = None
    """The certificate's key."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def etcd(self) -> EtcdFiles:
        return EtcdFiles(self.etcd_ca, self.etcd_cert, self.etcd_key, self.etcd_user, self.etcd_password_file)

    @property
    def address(self) -> tuple[str, int]:
        return _address(self.listen)

    @field_validator("listen")
    @classmethod
    def _is_address(cls, text: str) -> str:
        _address(text)
        return text

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key: one is of no use without the other")
        if self.token_file is None and not is_loopback(self.address[0]):
            raise ValueError(
                f"listen: {self.listen} may be reached from other hosts, and without token_file whoever reaches it may "
                "do all; listen on 127.0.0.1, or give each host a token"
            )
        return self


def load(given: Mapping[str, Any], config: Path | None) -> Settings:
    """Join command line, environment and file.

    Raises:
        Fault: naming the key and, for an unknown one, the nearest known.
    """
    values = _read(config) if config else {}
    for key in values:
        _check_known(key, f"{key} in {config}")
    for name, value in os.environ.items():
        if name.upper().startswith(ENVIRONMENT):
            key = name.upper().removeprefix(ENVIRONMENT).lower()
            _check_known(key, name)
            values[key] = value
    values |= {key: value for key, value in given.items() if value is not None}
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise Fault(BAD_CONFIGURATION, f"{key}: {first['msg']}" if key else first["msg"]) from None


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError("must be HOST:PORT, as in 127.0.0.1:8010")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Tell whether only this host itself is reached by that name or address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_known(key: str, shown: str) -> None:
    if key not in Settings.model_fields:
        near = difflib.get_close_matches(key, Settings.model_fields, n=1, cutoff=0)
        raise Fault(BAD_CONFIGURATION, f"unknown setting {shown}; the nearest known one is {near[0]}")


def _read(config: Path) -> dict[str, Any]:
    try:
        return dict(tomllib.loads(config.read_text(encoding="utf-8")))
    except OSError as error:
        raise Fault(BAD_CONFIGURATION, f"{config}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Fault(BAD_CONFIGURATION, f"{config} is no TOML: {error}") from None
