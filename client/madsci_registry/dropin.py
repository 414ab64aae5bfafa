"""Stands in for `madsci.common.registry` in a program that knows nothing of us.

    MADSCI_REGISTRY_DROPIN=1 python my_node.py        or one line in the .env of the lab
    registryctl dropin -- python my_node.py
    from madsci_registry.dropin import install        or from code: install()

Theory of operation. The wheel brings `madsci_registry_dropin.pth`, which every interpreter of the environment runs at
its start. It puts a finder of one line in front of `sys.meta_path`, loads nothing of ours and reads no environment.
Only when a program imports `madsci.common.registry` does that finder ask `find_spec` here, and only then, once for the
process, it is decided whether the program is served: so a `load_dotenv` that ran before, as in MADSci's lab template,
counts, and programs without MADSci never pay. The modules are new ones, filled with our classes; other submodules stay
MADSci's. Its values (`madsci.common.types.registry_types`) stay MADSci's as well, and our classes make those: a
program's isinstance, field types and MadsciBaseModel methods then hold, where a second family of models could not be
assigned to a field of the first.

Wrong is worse than down. Where a program is to be served and cannot be, importing the registry fails with the reason,
outside of what MADSci's nodes and managers catch. Only where the daemon cannot run at all, on another system than
Linux, does MADSci's own registry stay, with a warning. Nothing here writes to stdout.
"""

from __future__ import annotations

import sys
from _thread import allocate_lock  # without what `threading` imports: this may be all that a program loads of us
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING

from madsci_registry._endpoint import environment

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

__all__ = ["VARIABLE", "find_spec", "install"]

VARIABLE = "MADSCI_REGISTRY_DROPIN"
ON = ("1", "true", "yes", "on")
"""In any case. Everything else is off, in the environment over a .env too."""
KNOWN_MADSCI = "0.8."
"""What the real packages were tried with (tests/integration/test_real_madsci.py)."""

_PACKAGE = "madsci.common.registry"
_VALUES_MODULE = "madsci.common.types.registry_types"
_VALUES = ("LocalRegistry", "RegistryEntry", "RegistryLock", "RegistryResolveResult")
_MEMBERS = {
    _PACKAGE: ("IdentityResolver", "LocalRegistryManager", "LockManager", "RegistryLockError"),
    f"{_PACKAGE}.identity_resolver": (
        *("IdentityResolver", "LocalRegistryManager", "RegistryLockError"),
        *("ComponentType", "RegistryResolveResult"),
    ),
    f"{_PACKAGE}.local_registry": (
        *("LocalRegistryManager", "RegistryError", "RETRY_INTERVAL_SECONDS", "LockManager", "RegistryLockError"),
        *("ComponentType", "LocalRegistry", "RegistryEntry"),
    ),
    f"{_PACKAGE}.lock_manager": ("LockManager", "RegistryLockError", "RegistryEntry", "RegistryLock"),
}
"""What programs find in each module that is served."""
_SOURCES = {
    "ComponentType": "types",
    "IdentityResolver": "identity_resolver",
    "LocalRegistryManager": "local_registry",
    "LockManager": "lock_manager",
    "RETRY_INTERVAL_SECONDS": "local_registry",
    "RegistryError": "errors",
    "RegistryLockError": "lock_manager",
    **dict.fromkeys(_VALUES, "classic_types"),
}
"""Which of our modules has it."""

_CLASSES = ("IdentityResolver", "LocalRegistryManager", "LockManager", "RegistryError", "RegistryLockError")

_installing = allocate_lock()
_is_installed = False
_is_served: bool | None = None
"""Decided at the first import, once for the process: package and submodules are all ours or all MADSci's."""


def install() -> None:
    """Serve `madsci.common.registry` of this process, whatever the environment says; more than once is once.

    Threads may call it, and MADSci need not be there; nothing of it is imported. Where its registry was imported
    already, names in loaded modules are bound anew; objects and subclasses made before go on with MADSci's own, which
    is warned about. Elsewhere than on Linux MADSci's own registry stays, with a warning at its first import. Forked
    children are served too; other processes where they run this call or have MADSCI_REGISTRY_DROPIN.

    Raises:
        ImportError: MADSci's registry was imported already, and ours cannot be loaded.
    """
    global _is_installed, _is_served
    with _installing:
        if not _is_installed:
            _is_installed, _is_served = True, None
            sys.meta_path.insert(0, _Finder)
        loaded = [module for module in filter(None, map(sys.modules.get, _MEMBERS)) if not _is_ours(module)]
        if loaded and _serves():
            _replace(loaded)


def find_spec(name: str, path: Sequence[str] | None = None) -> ModuleSpec | None:
    """Return how to load a module of MADSci's registry from us; None: not one, or not here. The .pth calls this."""
    if name not in _MEMBERS or not _serves():
        return None
    spec = ModuleSpec(name, _Loader(), origin=__file__, is_package=name == _PACKAGE)
    original = PathFinder.find_spec(name, path)
    if name == _PACKAGE and original is not None:
        spec.submodule_search_locations = original.submodule_search_locations  # what we do not serve
    return spec


class _Finder:
    """Goes onto sys.meta_path where `install` is called."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return find_spec(name, path)


class _Loader(Loader):
    """Fills a module with our classes."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Raise ImportError where ours cannot be loaded: a registry that is not the daemon's would be worse."""
        try:
            _use_values_of_madsci()
            members = {name: _member(name) for name in _MEMBERS[module.__name__]}
        except Exception as error:
            raise ImportError(
                f"{module.__name__} is to be served by madsci-registryd, which cannot be loaded: {error!r}; MADSci's "
                f"own registry is not used instead. Repair the installation, or unset {VARIABLE}.",
                name=module.__name__,
            ) from error
        vars(module).update(members, __all__=list(members), __doc__=__doc__, __file__=__file__)


def _is_ours(module: ModuleType) -> bool:
    return isinstance(module.__loader__, _Loader)


def _member(name: str) -> object:
    return getattr(import_module(f"madsci_registry.{_SOURCES[name]}"), name)


def _use_values_of_madsci() -> None:
    """Let our classes make MADSci's models, where it has them: RegistryEntry and its kin."""
    try:
        theirs = import_module(_VALUES_MODULE)
    except ModuleNotFoundError as error:
        if error.name is None or not _VALUES_MODULE.startswith(error.name):
            raise
        return  # a MADSci that keeps them elsewhere: it was warned about
    if all(hasattr(theirs, name) for name in _VALUES):
        ours = import_module("madsci_registry.classic_types")
        for name in _VALUES:
            setattr(ours, name, getattr(theirs, name))


# whether the program is served


def _serves() -> bool:
    global _is_served
    if _is_served is None:
        _is_served = (_is_installed or _is_asked_for()) and _can_serve()
    return _is_served


def _is_asked_for() -> bool:
    value = environment().get(VARIABLE)
    return (_of_env_file() if value is None else value).strip().lower() in ON


def _of_env_file() -> str:
    """Return what the .env says, found as MADSci finds it for its own settings. It does not put it into os.environ."""
    try:
        from dotenv import dotenv_values

        finding = import_module("madsci.common.settings_dir")
        file = finding.walk_up_find(".env", finding.resolve_settings_dir())
        return (dotenv_values(file).get(VARIABLE) if file else None) or ""
    except (ImportError, AttributeError):  # a MADSci that finds it otherwise
        return ""
    except (OSError, ValueError) as error:
        _warn(f"a .env cannot be read, so it does not say {VARIABLE}: {error}")
        return ""


def _can_serve() -> bool:
    if sys.platform != "linux":
        _warn(f"madsci-registryd is for Linux: {_PACKAGE} stays MADSci's own on {sys.platform}")
        return False
    version = _version_of_madsci()
    if version is not None and not version.startswith(KNOWN_MADSCI):
        _warn(f"{_PACKAGE} is served by madsci-registryd, which was tried with MADSci {KNOWN_MADSCI}x, not {version}")
    return True


def _version_of_madsci() -> str | None:
    """Return the version of MADSci, or what stands for one that nobody tells; None: it is not there."""
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec as find

    try:
        return version("madsci-common")
    except PackageNotFoundError:
        return "an unknown version" if find("madsci") else None


def _warn(text: str) -> None:
    import logging  # programs without anything to say do not pay for it

    logging.getLogger("madsci_registry").warning(text)


# programs that imported the registry before install()


def _replace(loaded: list[ModuleType]) -> None:
    from importlib import reload

    old = {name: value for module in loaded for name, value in vars(module).items() if name in _CLASSES}
    for module in loaded:
        reload(module)  # finds it by our finder
    new = {id(value): _member(name) for name, value in old.items()}
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict):
            names.update({name: new[id(value)] for name, value in list(names.items()) if id(value) in new})
    _warn_of_remains(list(old.values()))


def _warn_of_remains(old: list[type]) -> None:
    import gc

    remains = {cls.__name__ for cls in old if cls.__subclasses__()}
    remains |= {type(thing).__name__ for thing in gc.get_objects() if type(thing) in old}
    if remains:
        names = ", ".join(sorted(remains))
        _warn(f"{names} of {_PACKAGE} were made before install() and go on with MADSci's own registry.json")
