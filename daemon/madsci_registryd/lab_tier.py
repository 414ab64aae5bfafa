"""What an answer owes to the lab, whose registry is over those of all hosts: the contract, and that there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from madsci_registry import protocol as p
from madsci_registry.errors import LabUnavailableError, RegistryError, UnsupportedError
from madsci_registry.types import ComponentType
from madsci_registryd.locks import Session
from madsci_registryd.store import Row

Standing = Literal["confirmed", "unconfirmed"]
"""confirmed: the lab has this host as the holder, and has heard it within the lease. unconfirmed: that is not known."""


Answer = Callable[[dict[str, Any]], None]


class Ask(NamedTuple):
    """What a request wants of the lab: a name's component, and its lock."""

    name: str
    component_type: ComponentType
    metadata: dict[str, Any] | None
    lock: bool
    who: Session | None


class Found(NamedTuple):
    """A component that the lab has under a name which is not known here yet."""

    id: str
    component_type: ComponentType
    metadata: dict[str, Any]
    created_at: str
    is_new: bool
    """This host made it just now."""


class LabTier:
    """There is no lab: every name is ready, and nothing is said of how it stands."""

    is_on = False

    def for_resolve(self, who: Session, r: p.Resolve) -> list[Ask]:
        """Say what the lab is to be asked before a resolve is run; nothing where its answer would change nothing."""
        return []

    def for_many(self, who: Session, r: p.ResolveMany) -> list[Ask]:
        """The same for many."""
        return []

    def prepare(self, asks: list[Ask], then: Callable[[], None]) -> None:
        """Ask that, then call `then`: when all is answered, or the lab is found to be away."""
        then()

    def ready(self, name: str) -> bool:
        """Tell whether a name may be given to a client of this host."""
        return True

    def want(self, name: str) -> None:
        """Have a name made ready for who waits for it: the loop hears of it when it is."""

    def refusal(self, name: str) -> RegistryError | None:
        """Say why a name is not ready, or no component may be made of it; None: nothing is known against it."""
        return None

    def found(self, name: str) -> Found | None:
        """Return what the lab said of a name that is not known here."""
        return None

    def known(self, name: str) -> Standing | None:
        """Say how surely a name that is new here is known by now: confirmed, by the lab; None: there is no lab."""
        return None

    def id_for(self, name: str) -> str | None:
        """Return the ULID of a name that is not known here: the lab's, or the one that was proposed to it."""
        return None

    def term(self, name: str) -> int | None:
        """Return the lab's term of a name that this host holds there: what tokens are made of. None: it has none."""
        return None

    def standing(self, row: Row) -> Standing | None:
        """Say how the lock of a component stands in the lab; None: it has no lock, or there is no lab."""
        return None

    def granted(self, name: str, term: int | None) -> None:
        """A client of this host was granted a name, with a token of that term of the lab, in a transaction that may
        still fail."""

    def pump(self) -> None:
        """Go on with what is to be done. For every turn of the loop."""


class NoLabVerbs:
    """There is no lab: what is not known here is not known."""

    is_on = False

    def lookup(self, name: str, answer: Answer) -> None:
        """Answer the ULID of a name that is not known here, null where it is absent."""
        answer({"ok": {"id": None}})

    def conflicts(self, who: Session, r: p.LabConflicts, answer: Answer) -> None:
        """Answer a page of the lab's conflicts."""
        raise no_lab()

    def merge(self, who: Session, r: p.LabMerge, answer: Answer) -> None:
        """Have the lab decide a conflict."""
        raise no_lab()

    def sync(self, who: Session, r: p.LabSync, answer: Answer) -> None:
        """Answer when the lab has all changes of this host, or the request's time is over."""
        raise no_lab()

    def status(self) -> dict[str, Any]:
        """Say how the lab is reached, and what it has of this host."""
        return {"state": "off"}


def no_lab() -> UnsupportedError:
    """Return the refusal of a request about the lab where there is none."""
    return UnsupportedError("this daemon has no lab: its setting lab.url names one", reason="no lab")


def away(why: str) -> LabUnavailableError:
    """Return the refusal of a request that needs the lab."""
    return LabUnavailableError(f"the lab does not answer, and the setting lab.require wants it asked: {why}")
