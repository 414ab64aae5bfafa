"""`--lab URL` and what goes with it: whom to ask instead of a daemon, and by which right."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import click

from madsci_registry.errors import InvalidError
from madsci_registryctl.invocation import Invocation

if TYPE_CHECKING:
    import ssl

    from madsci_registryctl.lab.asking import LabRegistry

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])
TOKEN_FILE_MAX_BYTES = 4096


def with_lab(function: _Decorated) -> _Decorated:
    """Give a command `lab`: the LabRegistry that `--lab` names, None without it. It stands below `click.pass_obj`."""

    @click.option("--lab", "lab_url", metavar="URL", help="Ask the lab's registry itself, not a daemon.")
    @click.option("--lab-token-file", type=click.Path(path_type=Path), metavar="FILE",
                  help="With --lab: a file with the line HOST TOKEN, or TOKEN.")  # fmt: skip
    @click.option("--lab-ca-file", type=click.Path(path_type=Path), metavar="FILE",
                  help="With --lab: the certificates (PEM) that count for it.")  # fmt: skip
    @functools.wraps(function)
    def with_registry(
        invocation: Invocation,
        *arguments: Any,
        lab_url: str | None,
        lab_token_file: Path | None,
        lab_ca_file: Path | None,
        **named: Any,
    ) -> Any:
        if lab_url is None and (lab_token_file or lab_ca_file):
            raise click.UsageError("--lab-token-file and --lab-ca-file are for --lab.")
        lab = None if lab_url is None else _registry(invocation, lab_url, lab_token_file, lab_ca_file)
        return function(invocation, *arguments, lab=lab, **named)

    return with_registry  # type: ignore[return-value]


def _registry(invocation: Invocation, url: str, token_file: Path | None, ca_file: Path | None) -> LabRegistry:
    from madsci_registry._lab import Lab
    from madsci_registryctl.lab.asking import LabRegistry

    _check_url(url)
    host, token = ("", "") if token_file is None else read_token(token_file)
    tls = None if ca_file is None else _trusting(ca_file)
    lab = Lab(url, token=token, tls=tls, within_s=invocation.timeout)
    return LabRegistry(lab, host or socket.gethostname())


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_url = False
    if "@" in url:  # nor is it shown
        raise click.UsageError("--lab: a command line is no place for a password: --lab-token-file is for that.")
    if not is_url:
        raise click.UsageError(f"--lab: {url!r} is no URL such as http://lab.example:8010.")


def read_token(path: Path) -> tuple[str, str]:
    """Read a file with one line `HOST TOKEN`, or `TOKEN` alone (the host is "" then); `#` begins a comment.

    Raises:
        InvalidError: others may read it, or it is none; the message never holds what is in it. OSError.
    """
    with path.open("rb") as file:
        others_may_read = path.stat().st_mode & 0o007
        content = file.read(TOKEN_FILE_MAX_BYTES)
    if others_may_read:
        raise _bad_file("lab_token_file", f"{path} can be read by everybody: chmod o= {path}")
    try:
        lines = [words for line in content.decode().splitlines() if (words := line.split("#", 1)[0].split())]
    except UnicodeDecodeError:
        lines = []
    if len(lines) != 1 or len(lines[0]) > 2 or not lines[0][-1].isascii() or not lines[0][-1].isprintable():
        raise _bad_file("lab_token_file", f"{path} is not one line: HOST TOKEN, or TOKEN")
    *host, token = lines[0]
    return host[0] if host else "", token


def _trusting(ca_file: Path) -> ssl.SSLContext:
    import ssl

    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError:
        raise _bad_file("lab_ca_file", f"{ca_file} holds no certificate in PEM") from None


def _bad_file(field: str, reason: str) -> InvalidError:
    return InvalidError(f"{field}: {reason}", field=field, reason=reason)
