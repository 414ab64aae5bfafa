"""The registry's client: names that give the same ULID for ever, held by one process at a time.

    from madsci_registry import RegistryClient

    with RegistryClient() as registry:
        me = registry.resolve("liquidhandler_1", "node")
        print(me.id, me.fencing_token)

Importing this package imports neither zmq nor the daemon; RegistryClient is loaded at its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from madsci_registry import errors
from madsci_registry.errors import (
    BusyError,
    CompactedError,
    ConflictError,
    CorruptError,
    HeldError,
    InternalError,
    InvalidError,
    LabUnavailableError,
    LockLostError,
    NameTakenError,
    NoSpaceError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolVersionError,
    QuotaError,
    RegistryError,
    RegistryTimeoutError,
    SessionRequiredError,
    StaleEpochError,
    TooLargeError,
    UnavailableError,
    UnknownOutcomeError,
    UnsupportedError,
    WaitingError,
    WrongTypeError,
)
from madsci_registry.types import (
    Component,
    ComponentType,
    Event,
    Holder,
    ImportedEntry,
    ImportReport,
    LockState,
    Process,
    SessionInfo,
)

if TYPE_CHECKING:
    from madsci_registry.client import RegistryClient
    from madsci_registry.fence import Fence
    from madsci_registry.registration import Registration

__all__ = [
    "BusyError",
    "CompactedError",
    "Component",
    "ComponentType",
    "ConflictError",
    "CorruptError",
    "Event",
    "Fence",
    "HeldError",
    "Holder",
    "ImportReport",
    "ImportedEntry",
    "InternalError",
    "InvalidError",
    "LabUnavailableError",
    "LockLostError",
    "LockState",
    "NameTakenError",
    "NoSpaceError",
    "NotFoundError",
    "PermissionDeniedError",
    "Process",
    "ProtocolVersionError",
    "QuotaError",
    "Registration",
    "RegistryClient",
    "RegistryError",
    "RegistryTimeoutError",
    "SessionInfo",
    "SessionRequiredError",
    "StaleEpochError",
    "TooLargeError",
    "UnavailableError",
    "UnknownOutcomeError",
    "UnsupportedError",
    "WaitingError",
    "WrongTypeError",
    "errors",
]


def __getattr__(name: str) -> object:
    # The daemon imports this package for its pure modules: the client's transport must not come along.
    if name == "RegistryClient":
        from madsci_registry.client import RegistryClient

        return RegistryClient
    if name == "Registration":
        from madsci_registry.registration import Registration

        return Registration
    if name == "Fence":  # fcntl is not everywhere
        from madsci_registry.fence import Fence

        return Fence
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
