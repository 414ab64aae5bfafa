"""`doctor --verify`: the whole database is checked by the daemon's own program, on a copy where a daemon serves."""

from __future__ import annotations

import tempfile
from pathlib import Path

from madsci_registry.errors import RegistryError
from madsci_registryctl import daemon_program
from madsci_registryctl.doctor import probes
from madsci_registryctl.doctor.case import Case
from madsci_registryctl.doctor.checks import WAL_MAX_BYTES, in_bytes
from madsci_registryctl.doctor.findings import Finding
from madsci_registryctl.invocation import Invocation


def integrity(invocation: Invocation, case: Case) -> list[Finding]:
    """Check the whole database; the copy that is made for it is removed again. Raises OSError."""
    if case.status is not None:
        return _of_a_copy(invocation, case)
    if not case.is_unserved:
        return [_unchecked("the daemon does not answer", "see the daemon's finding")]
    if case.endpoint.registry is None or case.database is None:
        return [_unchecked("only its socket is known", "name the registry by its path")]
    if not case.database.exists():
        return [Finding("note", "integrity", "there is no database to check yet")]
    return _verify(case.endpoint.registry, case)


def _of_a_copy(invocation: Invocation, case: Case) -> list[Finding]:
    with tempfile.TemporaryDirectory(prefix="madsci-doctor-") as name:
        folder = Path(name)
        missing_bytes = _needed_bytes(case) - probes.space(folder).free_bytes
        if missing_bytes > 0:
            fix = "make room there, or name another folder by TMPDIR"
            return [_unchecked(f"its copy needs {in_bytes(missing_bytes)} more in {folder.parent}", fix)]
        try:
            with invocation.client(autostart=False) as client:
                client.backup(folder / "registry.db")
        except RegistryError as error:
            return [_unchecked(error.message, "try again")]
        return _verify(folder / "registry.json", case)


def _needed_bytes(case: Case) -> int:
    """The copy, and the write-ahead log that SQLite may make beside it."""
    path = case.database
    size_bytes = path.stat().st_size if path is not None and path.exists() else 0  # 0: in a container, not visible
    return size_bytes + WAL_MAX_BYTES


def _verify(registry: Path, case: Case) -> list[Finding]:
    done = daemon_program.run(registry, "verify")
    if done.returncode == 0:
        what = "a copy of it, made now, was checked" if case.status else "it was checked"
        return [Finding("ok", "integrity", f"the whole database is sound ({what})")]
    said = done.stdout.splitlines() or done.stderr.splitlines()[-1:]
    if done.returncode != daemon_program.DAMAGED:
        return [_unchecked(f"{' '.join(said)} (status {done.returncode})", "see docs/operations.md for that status")]
    return [Finding("error", "integrity", line, _restore(case)) for line in said]


def _restore(case: Case) -> str:
    registry = Path(case.status["registry"]) if case.status else case.endpoint.registry
    assert registry is not None, "without a daemon only a registry that was named is checked"
    kept = case.database.parent if case.database else registry.parent
    state = f" --state-dir {kept}" if kept != registry.parent else ""
    stop = "registryctl stop, then " if case.status else ""
    return f"{stop}madsci-registryd --registry {registry}{state} restore BACKUP (docs/operations.md)"


def _unchecked(why: str, fix: str) -> Finding:
    return Finding("error", "integrity", f"not checked: {why}", fix)
