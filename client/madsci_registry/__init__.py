"""The registry's client: names that give the same ULID for ever, held by one process at a time.

    from madsci_registry import RegistryClient

    with RegistryClient() as registry:
        me = registry.resolve("liquidhandler_1", "node")
        print(me.id, me.fencing_token)

Importing this package imports neither zmq nor the daemon; RegistryClient is loaded at its first use, and so are
the classes of MADSci's classic API: IdentityResolver, LocalRegistryManager, LockManager and their values.
"""

from __future__ import annotations

from importlib import import_module
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
    LabState,
    LockState,
    Process,
    SessionInfo,
)

if TYPE_CHECKING:
    from madsci_registry.classic_types import LocalRegistry, RegistryEntry, RegistryLock, RegistryResolveResult
    from madsci_registry.client import RegistryClient
    from madsci_registry.fence import Fence
    from madsci_registry.identity_resolver import IdentityResolver
    from madsci_registry.local_registry import LocalRegistryManager
    from madsci_registry.lock_manager import LockManager, RegistryLockError
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
    "IdentityResolver",
    "ImportReport",
    "ImportedEntry",
    "InternalError",
    "InvalidError",
    "LabState",
    "LabUnavailableError",
    "LocalRegistry",
    "LocalRegistryManager",
    "LockLostError",
    "LockManager",
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
    "RegistryEntry",
    "RegistryError",
    "RegistryLock",
    "RegistryLockError",
    "RegistryResolveResult",
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


_LATE = {
    "Fence": "fence",  # fcntl is not everywhere
    "IdentityResolver": "identity_resolver",
    "LocalRegistry": "classic_types",
    "LocalRegistryManager": "local_registry",
    "LockManager": "lock_manager",
    "Registration": "registration",
    "RegistryClient": "client",
    "RegistryEntry": "classic_types",
    "RegistryLock": "classic_types",
    "RegistryLockError": "lock_manager",
    "RegistryResolveResult": "classic_types",
}
"""What is loaded at its first use, and from where. The daemon imports this package for its pure modules: the client's
transport must not come along."""


def __getattr__(name: str) -> object:
    if name in _LATE:
        return getattr(import_module(f"madsci_registry.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
