"""What `doctor`'s checks look at, and how they are run. A check takes the Case and returns its Findings.

A check that does not apply finds nothing. An OSError that one raises is a finding too: what may not be looked at is
what a person should know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madsci_registry.errors import RegistryError, UnavailableError
from madsci_registryctl.doctor.findings import Finding

if TYPE_CHECKING:
    from madsci_registry._endpoint import Endpoint
    from madsci_registry.types import SessionInfo

AS_OWNER = "run this as the user whom the registry belongs to, or correct the rights"


@dataclass(frozen=True)
class Case:
    """What the checks look at: the registry that was chosen, and what its daemon answered."""

    endpoint: Endpoint
    status: Mapping[str, Any] | None = None
    """None: no daemon answered."""
    sessions: Sequence[SessionInfo] = ()
    error: RegistryError | None = None
    """Why none answered."""

    @property
    def is_unserved(self) -> bool:
        """True: nobody listens, as opposed to a daemon that is silent or refuses."""
        return isinstance(self.error, UnavailableError)

    @property
    def database(self) -> Path | None:
        """Where the database is, by the daemon's word if it serves; None where only a socket is known."""
        said = Path(self.status["database"]) if self.status else None
        return said if said is not None and exists(said) else self.endpoint.database


Check = Callable[[Case], list[Finding]]


def run_checks(checks: Mapping[str, Check], case: Case) -> Iterator[Finding]:
    """Yield what each check finds, in their order."""
    for name, check in checks.items():
        try:
            yield from check(case)
        except OSError as error:
            yield unreadable(name, error)


def unreadable(check: str, error: OSError) -> Finding:
    """Say that something may not be looked at."""
    where = f"{error.filename}: " if error.filename else ""
    return Finding("error", check, f"{where}{error.strerror or error}", AS_OWNER)


def exists(path: Path) -> bool:
    """Tell whether a path is there; False where that may not be seen."""
    with suppress(OSError):
        return path.exists()
    return False
