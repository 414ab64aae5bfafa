"""What the lab's own routes are asked with: pydantic models, every limit in them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from madsci_registry.errors import InvalidError
from madsci_registry.names import METADATA_MAX_BYTES, check_metadata, check_name, is_ulid
from madsci_registry.types import ComponentType
from madsci_registry_lab.store import PROPOSAL_LIMIT, TERM_LIMIT, State, Want

PAGE_MAX = 1000
"""Entries or events of an answer."""
BATCH_MAX = 1000
WAIT_MAX_S = 60.0
"""How long a request for changes may be kept: less than what proxies let a connection be silent for."""
REVISION_LIMIT = 1 << 53
ID_MAX_BYTES = 255
TEXT_MAX_BYTES = 255
HOLDER_MAX_BYTES = 1024


def check_ulid(id: str) -> str:
    """Return `id` if it may be a new component's. Raises InvalidError."""
    if not is_ulid(id):
        raise InvalidError("id: is no ULID", field="id", reason="is no ULID")
    return id


def check_id(id: str) -> str:
    """Return `id` if a host may have it from an old file: 1 to 255 bytes of text. Raises InvalidError."""
    if not id.isprintable() or not 0 < len(id.encode()) <= ID_MAX_BYTES:
        raise InvalidError("id: is neither a ULID nor text that may be one", field="id", reason="is no id")
    return id


def check_instant(text: str) -> str:
    """Return an instant (ISO 8601) as the lab writes it, in UTC, so that two can be compared. Raises ValueError."""
    at = datetime.fromisoformat(text.replace("Z", "+00:00"))
    try:
        at = (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except OverflowError:
        raise ValueError("is before the year 1 or after 9999, in UTC") from None
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def check_text(text: str) -> str:
    """Return text that may be looked for. Raises ValueError: too long, or a lone surrogate, which is no text."""
    if len(text.encode("utf-8", "surrogatepass")) > TEXT_MAX_BYTES or any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"must be text of at most {TEXT_MAX_BYTES} bytes")
    return text


def check_holder(holder: dict[str, Any]) -> dict[str, Any]:
    """Return what a host says of a holder: it is in each event of the feed. Raises InvalidError, ValueError."""
    if len(check_metadata(holder, "holder").encode()) > HOLDER_MAX_BYTES:
        raise ValueError(f"is more than {HOLDER_MAX_BYTES} bytes as JSON")
    return holder


Name = Annotated[str, AfterValidator(check_name)]
Text = Annotated[str, AfterValidator(check_text)]
Word = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[!-~]+$")]
Revision = Annotated[int, Field(ge=0, lt=REVISION_LIMIT)]
Term = Annotated[int, Field(ge=0, lt=TERM_LIMIT)]
Instant = Annotated[str, Field(max_length=40), AfterValidator(check_instant)]
Metadata = Annotated[dict[str, Any], Field(description=f"JSON, at most {METADATA_MAX_BYTES} bytes")]


class Body(BaseModel):
    """A request: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Lockwish(Body):
    """A lock that is asked for."""

    proposal: Annotated[int, Field(ge=0, lt=PROPOSAL_LIMIT)] = 0
    """The host's own term: the lab's will be above it."""
    term: Term | None = None
    """The term that the lab gave before and that holders on the host still have."""
    holder: Annotated[dict[str, Any], AfterValidator(check_holder)] = Field(default_factory=dict)
    """Who on the host, for people."""

    def want(self) -> Want:
        return Want(proposal=self.proposal, term=self.term, holder=self.holder)


class Resolve(Body):
    """Get or create a component, and lock its name."""

    host: Name
    op: Word
    """Which request of this host: its repeat is answered the same."""
    name: Name
    component_type: ComponentType
    id: Annotated[str, AfterValidator(check_ulid)]
    """The ULID, should the name be new."""
    metadata: Metadata = Field(default_factory=dict)
    session: Word | None = None
    lock: Lockwish | None = None
    """With it, `session` is needed."""


class NamedLock(Lockwish):
    """A lock on a name that the lab knows."""

    name: Name


class Locks(Body):
    """Lock several names; each is answered by itself."""

    host: Name
    session: Word
    locks: Annotated[list[NamedLock], Field(max_length=BATCH_MAX)]


class Release(Body):
    """Give back locks, each by its term."""

    host: Name
    session: Word
    locks: dict[Name, Term]


class Component(Body):
    """A component as its host has it now."""

    id: str
    name: str
    component_type: ComponentType
    retired: bool = False
    metadata: dict[str, Any] = Field(default_factory=dict)
    created_at: Instant
    changed_at: Instant
    """When its identity changed last."""
    last_seen: Instant | None = None

    def state(self) -> State:
        """Return it checked. Raises InvalidError, TooLargeError."""
        return State(
            id=check_id(self.id),
            name=check_name(self.name),
            component_type=self.component_type,
            retired=self.retired,
            metadata=check_metadata(self.metadata),
            created_at=self.created_at,
            changed_at=self.changed_at,
            last_seen=self.last_seen,
        )


class OneChange(Body):
    """What one change of the host made of a component."""

    revision: Revision
    component: Component


class Changes(Body):
    """Identity changes of a host, in order."""

    host: Name
    epoch: Revision
    """Which numbering of the host's revisions."""
    after: Revision
    """These changes follow on this revision; 0: on nothing."""
    upto: Revision
    """There are no others up to this revision."""
    changes: Annotated[list[OneChange], Field(max_length=BATCH_MAX)]


class Sync(Body):
    """All components of a host, in pieces."""

    host: Name
    epoch: Revision
    upto: Revision | None = None
    """Given with the last piece: all is in up to this revision."""
    components: Annotated[list[Component], Field(max_length=BATCH_MAX)]


class Register(Body):
    """A host begins to keep locks."""

    host: Name
    boot: Word
    """Which run of the host's kernel (/proc/sys/kernel/random/boot_id)."""
    label: Text = ""


class Keepalive(Body):
    """A host lives, and this is what it holds."""

    host: Name
    session: Word
    boot: Word
    holds: dict[Text, Term] = Field(default_factory=dict)
    """Name to term."""


class Goodbye(Body):
    """A host ends its session, with all its locks."""

    host: Name
    session: Word


class Lookup(Body):
    """Which component: by name or by any of its ULIDs."""

    name: Text | None = None
    id: Text | None = None


class List(Body):
    """A page of the entries."""

    after: Text = ""
    """The last name of the page before."""
    limit: Annotated[int, Field(ge=1, le=PAGE_MAX)] = 200
    component_type: ComponentType | None = None


class History(Body):
    """A page of the changes of a name and its component."""

    name: Text
    after: Revision = 0
    limit: Annotated[int, Field(ge=1, le=PAGE_MAX)] = 200


class Conflicts(Body):
    """A page of the conflicts."""

    decided: bool = False
    """Those that were decided too."""
    after: Annotated[list[Text], Field(min_length=2, max_length=2)] = Field(default=["", ""])
    """Name and id of the last one of the page before."""
    limit: Annotated[int, Field(ge=1, le=PAGE_MAX)] = 200


class Merge(Body):
    """Decide a conflict."""

    host: Name
    name: Text
    prefer: Text
