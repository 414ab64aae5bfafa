"""The drop-in, with a small tree in place of MADSci: who is served, when, and what is said.

The programs run in processes of their own, which read the .pth as the start of an installed interpreter does. The real
packages are in tests/integration/test_real_madsci.py.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from helpers import PATIENCE_S, PROJECT, environment

PTH = PROJECT / "client" / "madsci_registry_dropin.pth"
START = f"import site; site.addpackage({str(PTH.parent)!r}, {PTH.name!r}, set())\n"
"""What an interpreter does at its start where the wheel is installed."""
OWN = "madsci.common.registry"
FORMS = [
    "import madsci.common.registry; C = madsci.common.registry.LockManager",
    "import madsci.common.registry.lock_manager; C = madsci.common.registry.lock_manager.LockManager",
    "import madsci.common.registry.identity_resolver as m; C = m.IdentityResolver",
    "from madsci.common import registry; C = registry.IdentityResolver",
    "from madsci.common.registry import LocalRegistryManager as C",
    "from madsci.common.registry import local_registry; C = local_registry.RegistryError",
    "from madsci.common.registry import *; C = RegistryLockError",
    "from madsci.common.registry.local_registry import LocalRegistryManager as C",
    "import importlib; C = importlib.import_module('.lock_manager', 'madsci.common.registry').RegistryLockError",
    "C = __import__('madsci.common.registry.identity_resolver', fromlist=['_']).LocalRegistryManager",
    "from madsci.common.neighbour import C",
    "from importlib.util import find_spec, module_from_spec; s = find_spec('madsci.common.registry.lock_manager');"
    "m = module_from_spec(s); s.loader.exec_module(m); C = m.LockManager",
]
"""The ways to import that there are; each leaves one class as C."""


@pytest.fixture
def madsci(tmp_path: Path) -> Path:
    """Make what stands for MADSci 0.8.1: a folder for PYTHONPATH."""
    tree = {
        "common/__init__.py": "",
        "common/neighbour.py": "from .registry.lock_manager import LockManager as C",
        "common/registry/__init__.py": (
            "from madsci.common.registry.identity_resolver import IdentityResolver\n"
            "from madsci.common.registry.local_registry import LocalRegistryManager\n"
            "from madsci.common.registry.lock_manager import LockManager, RegistryLockError\n"
        ),
        "common/registry/identity_resolver.py": (
            "from madsci.common.registry.local_registry import LocalRegistryManager\nclass IdentityResolver: pass"
        ),
        "common/registry/local_registry.py": "class LocalRegistryManager: pass\nclass RegistryError(Exception): pass",
        "common/registry/lock_manager.py": "class LockManager: pass\nclass RegistryLockError(Exception): pass",
        "common/registry/more.py": "from madsci.common.registry import LockManager",
        "common/types/__init__.py": "",
        "common/types/registry_types.py": "\n".join(
            f"class {name}: pass"
            for name in ("LocalRegistry", "RegistryEntry", "RegistryLock", "RegistryResolveResult")
        ),
    }
    for name, text in tree.items():
        file = tmp_path / "tree" / "madsci" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    _version(tmp_path / "tree", "0.8.1")
    return tmp_path / "tree"


def _version(tree: Path, version: str) -> None:
    info = tree / "madsci_common.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: madsci-common\nVersion: {version}\n")


def run(program: str, tree: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program as an interpreter with our wheel would, and check that it ended well."""
    env = environment(**env)
    if tree is not None:
        env["PYTHONPATH"] = f"{tree}:{env['PYTHONPATH']}"
    command = [sys.executable, "-c", START + program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    return done


def silent(program: str, tree: Path | None = None, **env: str) -> str:
    """Run a program that says nothing on stderr; return its stdout."""
    done = run(program, tree, **env)
    assert done.stderr == ""
    return done.stdout.strip()


# who is served


@pytest.mark.parametrize("form", FORMS)
def test_import_in_every_form_is_served(madsci: Path, form: str) -> None:
    """With the variable, every way to import a class of MADSci's registry gives ours, and without it MADSci's own."""
    program = f"{form}\nprint(C.__module__)"
    assert silent(program, madsci, MADSCI_REGISTRY_DROPIN="1").startswith("madsci_registry.")
    assert silent(program, madsci).startswith(OWN)


@pytest.mark.parametrize("form", FORMS)
def test_install_serves_every_form(madsci: Path, form: str) -> None:
    """After install() every way to import is served, without the variable."""
    program = f"from madsci_registry.dropin import install; install(); install()\n{form}\nprint(C.__module__)"
    assert silent(program, madsci).startswith("madsci_registry.")


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "Yes", "on", " 1 "])
def test_variable_that_is_on_serves(madsci: Path, value: str) -> None:
    """1, true, yes and on, in any case, switch it on."""
    program = f"from {OWN} import LockManager; print(LockManager.__module__)"
    assert silent(program, madsci, MADSCI_REGISTRY_DROPIN=value) == "madsci_registry.lock_manager"


@pytest.mark.parametrize("value", [None, "", "0", "false", "no", "off", "2", "enabled"])
def test_variable_that_is_not_on_changes_nothing(madsci: Path, value: str | None) -> None:
    """Without the variable, and with any other value, MADSci's own registry is there, and none of our classes."""
    program = (
        f"import sys; from {OWN} import IdentityResolver, LockManager\n"
        "ours = ('madsci_registry.client', 'madsci_registry.lock_manager', 'pydantic', 'zmq')\n"
        "print(LockManager.__module__, [m for m in ours if m in sys.modules])"
    )
    env = {} if value is None else {"MADSCI_REGISTRY_DROPIN": value}
    assert silent(program, madsci, **env) == f"{OWN}.lock_manager []"


def test_variable_that_the_program_sets_before_its_first_import_counts(madsci: Path) -> None:
    """A program that loads a .env into its environment is served from then on: the lab that MADSci's template makes."""
    program = (
        "import os, madsci.common; os.environ['MADSCI_REGISTRY_DROPIN'] = '1'\n"
        f"from {OWN} import LockManager; print(LockManager.__module__)"
    )
    assert silent(program, madsci) == "madsci_registry.lock_manager"


def test_decision_is_made_once(madsci: Path) -> None:
    """A program that began with MADSci's own registry has no module of ours beside it, whatever is set later."""
    program = (
        f"import os, {OWN}; os.environ['MADSCI_REGISTRY_DROPIN'] = '1'\n"
        f"import sys; del sys.modules['{OWN}.lock_manager']\n"
        f"import {OWN}.lock_manager as again; print(again.LockManager.__module__)"
    )
    assert silent(program, madsci) == f"{OWN}.lock_manager"


def test_start_of_an_interpreter_loads_nothing(madsci: Path) -> None:
    """The .pth loads no module at all, with the variable too; install() neither pydantic, nor zmq, nor MADSci."""
    program = f"import sys; before = set(sys.modules); {START}print(sorted(set(sys.modules) - before))"
    assert silent(program, madsci, MADSCI_REGISTRY_DROPIN="1") == "[]"
    program = (
        "import sys; from madsci_registry.dropin import install; install()\n"
        "print([m for m in ('pydantic', 'zmq', 'madsci', 'madsci_registry.client', 'logging') if m in sys.modules])"
    )
    assert silent(program, madsci) == "[]"


def test_start_and_install_twice_are_once(madsci: Path) -> None:
    """A .pth that is read twice, and install() called twice, add one finder each."""
    program = (
        START + "from madsci_registry.dropin import install; install(); install()\n"
        "import sys; names = [getattr(f, '__name__', '') for f in sys.meta_path]\n"
        "print(names[:2], names.count('_Finder'), names.count('MadsciRegistryDropin'))"
    )
    assert silent(program, madsci) == "['_Finder', 'MadsciRegistryDropin'] 1 1"


def test_without_madsci_nothing_breaks() -> None:
    """Where MADSci is not installed, a program starts, installs, and is told that there is no module madsci."""
    program = (
        "from madsci_registry.dropin import install; install()\n"
        f"try:\n    import {OWN}.lock_manager\nexcept ModuleNotFoundError as error: print(error.name)"
    )
    assert silent(program, MADSCI_REGISTRY_DROPIN="1") == "madsci"


def test_other_modules_of_the_package_stay_and_see_ours(madsci: Path) -> None:
    """A module that we do not serve is MADSci's own, and what it imports from its siblings is ours."""
    program = f"from {OWN}.more import LockManager, __file__ as f; print(LockManager.__module__, f)"
    expected = f"madsci_registry.lock_manager {madsci}/madsci/common/registry/more.py"
    assert silent(program, madsci, MADSCI_REGISTRY_DROPIN="1") == expected


def test_values_are_madscis_own(madsci: Path) -> None:
    """RegistryEntry and its kin are MADSci's classes everywhere, and those that our classes make."""
    program = (
        f"from {OWN} import local_registry, lock_manager, identity_resolver\n"
        "from madsci.common.types import registry_types as theirs; from madsci_registry import classic_types as ours\n"
        "assert local_registry.RegistryEntry is ours.RegistryEntry is theirs.RegistryEntry\n"
        "assert lock_manager.RegistryEntry is theirs.RegistryEntry\n"
        "assert local_registry.LocalRegistry is ours.LocalRegistry is theirs.LocalRegistry\n"
        "assert lock_manager.RegistryLock is ours.RegistryLock is theirs.RegistryLock\n"
        "assert identity_resolver.RegistryResolveResult is ours.RegistryResolveResult is theirs.RegistryResolveResult"
    )
    silent(program, madsci, MADSCI_REGISTRY_DROPIN="1")


# install() after the registry was imported


def test_install_binds_names_that_were_imported_before(madsci: Path) -> None:
    """Modules and names that a program imported before install() are ours after it, without a word."""
    program = (
        f"import {OWN} as package; from {OWN}.lock_manager import RegistryLockError\n"
        "import madsci.common.neighbour as neighbour, sys\n"
        "from madsci_registry.dropin import install; install(); install()\n"
        f"print({{c.__module__ for c in (package.LockManager, sys.modules['{OWN}.lock_manager'].LockManager,"
        "neighbour.C, RegistryLockError)})"
    )
    assert silent(program, madsci) == "{'madsci_registry.lock_manager'}"


def test_install_warns_of_objects_that_were_made_before(madsci: Path) -> None:
    """Objects and subclasses of MADSci's own, made before install(), are named in one warning."""
    program = (
        f"from {OWN} import IdentityResolver, LockManager\nclass Mine(LockManager): pass\nthing = IdentityResolver()\n"
        "from madsci_registry.dropin import install; install(); install()"
    )
    done = run(program, madsci)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("IdentityResolver, LockManager of madsci.common.registry were made before install()")


def test_install_in_many_threads_is_once(madsci: Path) -> None:
    """Sixteen threads that install and import at once all get ours, by one finder."""
    program = (
        "import sys, threading, importlib; from madsci_registry.dropin import install\n"
        "found, gate = [], threading.Barrier(16)\n"
        "def one():\n"
        "    gate.wait(); install()\n"
        f"    found.append(importlib.import_module('{OWN}.lock_manager').LockManager.__module__)\n"
        "threads = [threading.Thread(target=one) for _ in range(16)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(set(found), len(found), [f.__name__ for f in sys.meta_path[:2]].count('_Finder'))"
    )
    assert silent(program, madsci) == "{'madsci_registry.lock_manager'} 16 1"


# what is said


@pytest.mark.parametrize("version", ["0.9.0", "0.7.2", "1.0.0"])
def test_unknown_version_is_served_with_one_warning(madsci: Path, version: str) -> None:
    """A MADSci that was not tried is served too, with one warning by logging and nothing on stdout."""
    _version(madsci, version)
    program = f"import {OWN}.lock_manager as m, {OWN}.local_registry; assert m.LockManager.__module__ > 'madsci_r'"
    done = run(program, madsci, MADSCI_REGISTRY_DROPIN="1")
    assert done.stdout == ""
    assert done.stderr == (
        f"madsci.common.registry is served by madsci-registryd, which was tried with MADSci 0.8.x, not {version}\n"
    )
    quiet = "import logging; logging.getLogger('madsci_registry').setLevel('ERROR')\n" + program
    silent(quiet, madsci, MADSCI_REGISTRY_DROPIN="1")


def test_version_that_nobody_tells_is_warned_about(madsci: Path) -> None:
    """A MADSci without metadata (a checkout on the path) is served, with the same warning."""
    (madsci / "madsci_common.dist-info" / "METADATA").unlink()
    (madsci / "madsci_common.dist-info").rmdir()
    done = run(f"import {OWN}", madsci, MADSCI_REGISTRY_DROPIN="1")
    assert done.stderr.endswith("MADSci 0.8.x, not an unknown version\n")
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)


@pytest.mark.parametrize("values", [None, "class RegistryEntry: pass"])
def test_unknown_version_without_the_values_has_ours(madsci: Path, values: str | None) -> None:
    """A MADSci that keeps its RegistryEntry and kin elsewhere, or only some of them, is served with ours."""
    _version(madsci, "0.9.0")
    file = madsci / "madsci" / "common" / "types" / "registry_types.py"
    file.write_text(values) if values else file.unlink()
    program = f"from {OWN}.lock_manager import RegistryEntry as E, RegistryLock as L; print(E.__module__, L.__module__)"
    done = run(program, madsci, MADSCI_REGISTRY_DROPIN="1")
    assert done.stdout == "madsci_registry.classic_types madsci_registry.classic_types\n"
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("platform", ["win32", "darwin"])
@pytest.mark.parametrize("start", ["pass", "from madsci_registry.dropin import install; install()"])
def test_other_platform_keeps_madscis_own_with_one_warning(madsci: Path, platform: str, start: str) -> None:
    """On Windows and macOS MADSci's own registry stays, with one warning by logging and nothing on stdout."""
    program = (
        # What Python itself has for that platform is not here: it is imported before.
        f"import importlib.abc, logging, sys; sys.platform = {platform!r}\n{start}\n"
        f"import {OWN}.local_registry, {OWN}.lock_manager as m; sys.platform = 'linux'\n"
        f"assert m.LockManager.__module__ == '{OWN}.lock_manager'"
    )
    done = run(program, madsci, MADSCI_REGISTRY_DROPIN="1")
    assert done.stdout == ""
    assert done.stderr == f"madsci-registryd is for Linux: {OWN} stays MADSci's own on {platform}\n"


def test_registry_that_cannot_be_served_is_not_replaced_by_madscis_own(madsci: Path) -> None:
    """Where our classes cannot be loaded, the import fails and says why; MADSci's own is not used instead."""
    program = (
        "import sys; sys.modules['madsci_registry.local_registry'] = None\n"
        f"try:\n    from {OWN}.identity_resolver import IdentityResolver\n"
        "except ImportError as error: print(error)"
    )
    said = silent(program, madsci, MADSCI_REGISTRY_DROPIN="1")
    assert "cannot be loaded: ModuleNotFoundError" in said
    assert "MADSci's own registry is not used instead" in said


# registryctl dropin


def ctl(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run registryctl."""
    command = [sys.executable, "-m", "madsci_registryctl", *words]
    env = environment(**env)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_dropin_becomes_the_command() -> None:
    """The command runs in the same process with the variable set, and its exit status is handed on."""
    command = [sys.executable, "-m", "madsci_registryctl", "dropin", "--", "sh", "-c"]
    script = 'echo "$$ $MADSCI_REGISTRY_DROPIN"; exit 7'
    with subprocess.Popen([*command, script], env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate(timeout=PATIENCE_S)[0] == f"{process.pid} 1\n"
    assert process.returncode == 7


def test_dropin_hands_the_registry_on(tmp_path: Path) -> None:
    """--registry and --socket are what the command uses, over what the environment said."""
    script = 'echo "$MADSCI_REGISTRY_PATH|$MADSCI_REGISTRY_SOCKET"'
    path, old = str(tmp_path / "r.json"), {"MADSCI_REGISTRY_SOCKET": "/run/a.sock", "MADSCI_REGISTRY_PATH": "/b.json"}
    assert ctl("--registry", path, "dropin", "--", "sh", "-c", script, **old).stdout == f"{path}|\n"
    assert ctl("dropin", "--socket", "/run/c.sock", "--", "sh", "-c", script, **old).stdout == "/b.json|/run/c.sock\n"
    assert ctl("dropin", "--", "sh", "-c", script, **old).stdout == "/b.json|/run/a.sock\n"


def test_dropin_with_no_command_that_can_run_says_so(tmp_path: Path) -> None:
    """Without a command: 2. One that is not found: 127. One that may not or cannot run: 126."""
    assert ctl("dropin").returncode == 2
    done = ctl("dropin", "--", "no-such-command")
    assert (done.returncode, done.stderr) == (127, "registryctl: no-such-command: command not found\n")
    file = tmp_path / "script"
    file.write_text("true")
    done = ctl("dropin", "--", str(file))
    assert (done.returncode, done.stderr) == (126, f"registryctl: {file}: Permission denied\n")
    file.chmod(0o755)
    assert ctl("dropin", "--", str(file)).returncode == 126


@pytest.mark.parametrize("is_script", [False, True])
def test_dropin_warns_of_an_interpreter_without_our_package(tmp_path: Path, is_script: bool) -> None:
    """A Python that does not find our package is warned about before it becomes the command; ours is not."""
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    python.chmod(0o755)
    script = tmp_path / "madsci"
    script.write_text(f"#!{python} -u\nprint('ran')\n")
    script.chmod(0o755)
    done = ctl("dropin", "--", *([str(script)] if is_script else [str(python), "-c", "print('ran')"]))
    assert done.stdout == "ran\n"
    assert done.stderr.startswith(f"registryctl: {python} does not find madsci-registryd, so it uses MADSci's own")
    assert ctl("dropin", "--", sys.executable, "-c", "").stderr == ""


def test_dropin_on_another_platform_warns_and_runs() -> None:
    """Not on Linux, the command runs, and is said to keep MADSci's own registry."""
    program = (
        "import sys; from madsci_registryctl.__main__ import main; sys.platform = 'darwin'\n"
        "main(['dropin', '--', 'echo', 'ran'])"
    )
    done = run(program)
    assert done.stdout == "ran\n"
    assert done.stderr == "registryctl: MADSci's own registry stays: madsci-registryd is not for darwin\n"


# what is shipped


def test_environment_that_make_installs_has_the_pth() -> None:
    """The installed distribution, editable as `make` has it or not, has the .pth, and an interpreter reads it."""
    try:
        files = distribution("madsci-registryd").files or []
    except PackageNotFoundError:
        pytest.skip("madsci-registryd is not installed here")
    assert PTH.name in map(str, files)
    program = "import sys; print([getattr(f, '__name__', '') for f in sys.meta_path].count('MadsciRegistryDropin'))"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, timeout=PATIENCE_S, check=True)
    assert done.stdout == b"1\n"
