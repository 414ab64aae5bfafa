"""Where a lab's etcd is and what it takes to speak with it: the setting `etcd://HOST:PORT,.../PREFIX`, and files."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from madsci_registry_lab.faults import BAD_CONFIGURATION, Fault

PREFIX = "madsci/lab"
"""Under which a lab keeps its keys, where the setting says none: several labs can share an etcd."""
FORMAT = "v1"


@dataclass(frozen=True)
class EtcdFiles:
    """The settings besides the URL. A password stands in a file, never on a command line."""

    ca: Path | None = None
    """The authority (PEM) that signed the members' certificates: speak TLS."""
    cert: Path | None = None
    key: Path | None = None
    """The lab's own certificate (PEM) and its key, where the members ask for one."""
    user: str | None = None
    password_file: Path | None = None


NO_FILES = EtcdFiles()


@dataclass(frozen=True)
class EtcdAccess:
    """How to reach an etcd."""

    endpoints: tuple[str, ...]
    prefix: str
    """Of every key, with a slash at its end."""
    tls: ssl.SSLContext | None = None
    user: str | None = None
    password: str = ""


def parse(url: str, files: EtcdFiles = NO_FILES) -> EtcdAccess:
    """Read the setting. Raises Fault."""
    rest = url.removeprefix("etcd://")
    hosts, _, path = rest.partition("/")
    members = [member for member in hosts.split(",") if member]
    if rest == url or not members or not all(_is_address(member) for member in members):
        raise Fault(BAD_CONFIGURATION, f"store: must be etcd://HOST:PORT,HOST:PORT,... (it is {url!r})")
    tls = _tls(files)
    scheme = "https" if tls else "http"
    return EtcdAccess(
        endpoints=tuple(f"{scheme}://{member}" for member in members),
        prefix=f"/{path.strip('/') or PREFIX}/{FORMAT}/",
        tls=tls,
        user=files.user,
        password=_password(files),
    )


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and not set(host) & set("@?#") and port.isdecimal() and 0 < int(port) < 65536


def _tls(files: EtcdFiles) -> ssl.SSLContext | None:
    if files.ca is None:
        if files.cert or files.key:
            raise Fault(BAD_CONFIGURATION, "etcd_cert and etcd_key are of no use without etcd_ca")
        return None
    if (files.cert is None) != (files.key is None):
        raise Fault(BAD_CONFIGURATION, "etcd_cert and etcd_key: one is of no use without the other")
    try:
        tls = ssl.create_default_context(cafile=str(files.ca))
        if files.cert and files.key:
            tls.load_cert_chain(files.cert, files.key)
    except OSError as error:  # ssl.SSLError is one
        raise Fault(BAD_CONFIGURATION, f"etcd_ca, etcd_cert or etcd_key cannot be used: {error}") from None
    return tls


def _password(files: EtcdFiles) -> str:
    if (files.user is None) != (files.password_file is None):
        raise Fault(BAD_CONFIGURATION, "etcd_user and etcd_password_file: one is of no use without the other")
    if files.password_file is None:
        return ""
    try:
        return files.password_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Fault(BAD_CONFIGURATION, f"etcd_password_file {files.password_file}: {error}") from None
