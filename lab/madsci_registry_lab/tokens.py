"""Which host a bearer token belongs to. Tokens are kept as hashes, compared in constant time, and never shown."""

from __future__ import annotations

import hashlib
import hmac
import logging
from base64 import b64decode
from pathlib import Path

from madsci_registry.errors import InvalidError
from madsci_registry.names import check_name
from madsci_registry_lab.faults import BAD_CONFIGURATION, Fault

log = logging.getLogger(__name__)

TOKEN_MIN_CHARS = 16
"""64 bits, were they hexadecimal digits: what cannot be guessed over a network."""


class Tokens:
    """The tokens of a lab. Immutable."""

    def __init__(self, hashed: dict[bytes, str]) -> None:
        self._hashed = hashed

    def host_of(self, token: str) -> str | None:
        """Return the host whose token this is; None: nobody's. Takes as long either way."""
        given, found = _hash(token), None
        for hashed, host in self._hashed.items():
            if hmac.compare_digest(hashed, given):
                found = host
        return found


class TokenFile:
    """The tokens of a file, which is read again when it has changed: who is new is let in, who is gone is not.

    Whoever calls `look` now and then, in one thread, has it so. A file that is still being written is left for the next
    time; one that is no token file is told by the log, and what was before goes on.
    """

    def __init__(self, path: Path) -> None:
        """Read it. Raises Fault."""
        self._path = path
        self._seen = self._read = _stamp(path)
        self._tokens = read_tokens(path)

    def host_of(self, token: str) -> str | None:
        """Return the host whose token this is; None: nobody's."""
        return self._tokens.host_of(token)

    def look(self) -> None:
        """Read the file if it has changed, and has not changed since the last look."""
        before, self._seen = self._seen, _stamp(self._path)
        if self._seen == self._read or self._seen != before:
            return
        self._read = self._seen
        try:
            self._tokens = read_tokens(self._path)
        except Fault as fault:
            log.error("%s; the tokens from before go on", fault)  # noqa: TRY400 - no fault of ours
        else:
            log.info("token_file: %s has been read again", self._path)


def read_tokens(path: Path) -> Tokens:
    """Read a file of lines `host token`; a host may have several, `#` begins a comment.

    Raises:
        Fault: it cannot be read, or has no token, or a line that is none; the message does not hold the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise Fault(BAD_CONFIGURATION, f"token_file: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Fault(BAD_CONFIGURATION, f"token_file: {path} is not UTF-8") from None
    hashed: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        where = f"token_file: line {number} of {path}"
        if len(words) != 2 or not words[1].isascii() or len(words[1]) < TOKEN_MIN_CHARS:
            raise Fault(BAD_CONFIGURATION, f"{where} is not: host token, of {TOKEN_MIN_CHARS} characters or more")
        try:
            host = check_name(words[0], "host")
        except InvalidError as error:
            raise Fault(BAD_CONFIGURATION, f"{where}: {error.message}") from None
        if hashed.setdefault(_hash(words[1]), host) != host:
            raise Fault(BAD_CONFIGURATION, f"{where} has a token that another host has")
    if not hashed:
        raise Fault(BAD_CONFIGURATION, f"token_file: {path} holds no token")
    return Tokens(hashed)


def token_in(authorization: str) -> str | None:
    """Return the token of an Authorization header: the bearer's, or the password of a URL; None: there is none."""
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except ValueError:
            return None
    return None


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what changes with a file; nothing where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
