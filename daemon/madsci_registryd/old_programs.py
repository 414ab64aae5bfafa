"""What an answer owes to old programs, which know registry.json alone: the contract, and that there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from madsci_registry import protocol as p
from madsci_registry.errors import RegistryError
from madsci_registryd.locks import Session

if TYPE_CHECKING:
    from madsci_registryd.export import Want


class OldPrograms:
    """What old programs, which know registry.json alone, have to see before anybody is answered. Here there are none.

    A name is *ready* when no old program can take it: its lock may be granted. What a request needs to be there first
    is asked for by `for_...` and brought there by `prepare`.
    """

    def ready(self, name: str) -> bool:
        """Tell whether the name's lock may be granted now."""
        return True

    def want(self, name: str) -> None:
        """Make the name ready, for who waits for it; who waits is looked at again then."""

    def id_for(self, name: str) -> str | None:
        """Return the ULID that old programs see for a name that is new here; None: they see none."""
        return None

    def for_resolve(self, who: Session, r: p.Resolve) -> list[Want]:
        """List what a resolve needs. Raises: RegistryError: it is refused anyway."""
        return []

    def for_many(self, who: Session, r: p.ResolveMany) -> list[Want]:
        """The same for many."""
        return []

    def for_rename(self, who: Session, r: p.Rename) -> list[Want]:
        """The same for a rename."""
        return []

    def for_import(self, entries: Iterable[tuple[str, dict[str, Any]]]) -> list[Want]:
        """The same for entries, each without a fault."""
        return []

    def prepare(self, wants: list[Want], then: Callable[[RegistryError | None], None]) -> None:
        """Bring that about, then call `then` with None, or with the error where it could not be done in time."""
        then(None)
