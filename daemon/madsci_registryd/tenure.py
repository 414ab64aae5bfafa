"""A name, and what this host has of it in the lab."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from madsci_registry.errors import RegistryError
from madsci_registryd.lab_tier import Ask, Found

KEPT_S = 5.0
"""How long a tenure is kept for the request that it was asked for: it may have to wait for registry.json first."""
REMEMBERED_S = 10.0
"""How long an answer of the lab counts for the request that asked."""
LOOK_S = 1.0


class Has(Enum):
    """What the host has of a name in the lab."""

    NOTHING = "nothing"
    IT = "it"
    STALE = "stale"  # its session has ended: to be taken again, with the term that it had


@dataclass(eq=False)
class Tenure:
    """A name, what the host has of it, and what is under way."""

    name: str
    has: Has = Has.NOTHING
    term: int = 0
    told_as: str | None = None
    """The name that the lab has it under, where it does not know of a rename yet."""
    is_asking: bool = False
    """A request about it is under way."""
    waiting: list[tuple[Ask, Callable[[], None]]] = field(default_factory=list)
    kept_until: float = 0.0
    """Monotonic: until when it is for somebody who has asked."""
    answer: Found | RegistryError | None = None
    answered_at: float = -math.inf
    proposed_id: str | None = None
    """The ULID that was proposed to the lab for a name that is not known here."""
    is_watched: bool = False
    """It will be looked at whether it is to be given back."""
