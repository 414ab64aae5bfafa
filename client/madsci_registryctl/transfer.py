"""`export`, `import` and `backup`: a whole registry, out and in. Every file is written with the caller's rights."""

from __future__ import annotations

import json
import os
import re
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import click

from madsci_registry.errors import InvalidError
from madsci_registry.registry_json import FORMAT_VERSION
from madsci_registryctl import exits
from madsci_registryctl.invocation import Command, Invocation
from madsci_registryctl.render import print_json, print_table
from madsci_registryctl.strict_json import loads

if TYPE_CHECKING:
    from madsci_registry.types import ImportReport


@click.command("export", cls=Command)
@click.option("-o", "--output", "path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
@click.pass_obj
def export_command(invocation: Invocation, path: Path | None) -> None:
    """Print the whole registry in the format of registry.json, or write it to FILE, which is replaced whole."""
    with invocation.client() as client:
        registry = client.export()
    if path is None:
        print_json(registry)
        return
    write_whole(path, (json.dumps(registry, indent=2) + "\n").encode())
    count = len(registry["entries"])
    if invocation.as_json:
        print_json({"file": str(path), "entries": count})
    else:
        invocation.say(f"{count} entries written to {path}.")


def write_whole(path: Path, content: bytes, mode: int | None = None) -> None:
    """Make `path` hold `content`, durably: at every instant it is the old file or the whole new one. Raises OSError.

    `mode` are its permission bits; None: those of the present file, or what the umask gives.
    """
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(_wanted_mode(path) if mode is None else mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _wanted_mode(path: Path) -> int:
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        mask = os.umask(0)  # there is no other way to read it; registryctl makes no file in another thread
        os.umask(mask)
        return 0o666 & ~mask


@click.command("import", cls=Command)
@click.argument("file", type=click.File("rb"))
@click.option("--merge", "mode", flag_value="merge", default="merge", help="Add what is missing.  [default]")
@click.option("--replace", "mode", flag_value="replace", help="Also retire what the file lacks; rebinds nothing.")
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@click.pass_context
def import_command(context: click.Context, file: BinaryIO, mode: Literal["merge", "replace"], dry_run: bool) -> None:
    """Take the entries of FILE (a registry.json; - is stdin) into the registry, and report each one.

    An entry is added, the same already, in conflict (the name has another ULID, or the ULID another name), or invalid;
    the good ones are taken even where others are not. Exit status 8 if any was in conflict, else 10 if any was invalid.
    A FILE that is not whole (no JSON, a key twice, NaN) is refused before anything happens, with exit status 10.
    """
    invocation: Invocation = context.obj
    entries = read_entries(file.read())
    with invocation.client() as client:
        report = client.import_entries(entries, mode=mode, dry_run=dry_run)
    print_report(invocation, report)
    context.exit(status_of_report(report))


def read_entries(content: bytes) -> dict[str, Any]:
    """Return the entries of a registry.json by name, unchecked but for being unambiguous JSON.

    Raises:
        InvalidError: not such a file; `field` names the place.
    """
    registry = loads(content, "registry")
    if not isinstance(registry, dict) or not isinstance(registry.get("entries"), dict):
        raise InvalidError(
            "registry.entries: must be an object of entries by name", field="registry.entries", reason="no object"
        )
    version = registry.get("version", FORMAT_VERSION)
    if version != FORMAT_VERSION or isinstance(version, bool):
        reason = f"is {version!r}, only {FORMAT_VERSION} can be read"
        raise InvalidError(f"registry.version: {reason}", field="registry.version", reason=reason)
    entries: dict[str, Any] = registry["entries"]
    return entries


def print_report(invocation: Invocation, report: ImportReport, **more: object) -> None:
    """Print what became of each entry, on stderr how many of each; in JSON also `more`."""
    outcomes = ("added", "same", "conflict", "invalid", "retired")
    counts = {outcome: report.count(outcome) for outcome in outcomes}
    if invocation.as_json:
        entries = [{"name": e.name, "outcome": e.outcome, "reason": e.reason} for e in report.entries]
        print_json({"dry_run": report.dry_run, **more, "counts": counts, "entries": entries})
        return
    rows = [(e.outcome, e.name or None, e.reason or None) for e in report.entries]
    print_table(invocation, ("OUTCOME", "NAME", "REASON"), rows)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    invocation.say(f"{'Would be' if report.dry_run else 'Done'}: {summary}.")


def status_of_report(report: ImportReport) -> int:
    """Return the exit status of an import: its worst outcome."""
    if report.count("conflict"):
        return exits.CONFLICT
    return exits.INVALID if report.count("invalid") else exits.OK


@click.command("backup", cls=Command)
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--into", type=click.Path(file_okay=False, path_type=Path), help="A folder for backups with dated names.")
@click.option("--keep", type=click.IntRange(1), metavar="N", help="With --into: remove all but the N newest of them.")
@click.pass_obj
def backup_command(invocation: Invocation, file: Path | None, into: Path | None, keep: int | None) -> None:
    """Write a consistent copy of the database to FILE while the daemon serves; FILE is replaced whole.

    `madsci-registryd restore FILE` reads it.
    """
    if (file is None) == (into is None):
        raise click.UsageError("give either FILE or --into DIR")
    if keep is not None and into is None:
        raise click.UsageError("--keep goes with --into")
    stem = invocation.endpoint().socket.stem
    if into is not None:
        into.mkdir(mode=0o700, exist_ok=True)
        file = into / f"{stem}-{datetime.now(timezone.utc):%Y-%m-%dT%H%M%SZ}.db"
    assert file is not None
    with invocation.client() as client:
        client.backup(file)
    removed = rotate(file, stem, keep) if into is not None and keep is not None else []
    size_bytes = file.stat().st_size
    if invocation.as_json:
        gone = {"removed": [str(old) for old in removed]} if into is not None else {}
        print_json({"file": str(file), "bytes": size_bytes, **gone})
        return
    invocation.say(f"{size_bytes} bytes written to {file}.")
    for old in removed:
        invocation.say(f"Removed {old}.")


def rotate(new: Path, stem: str, keep: int) -> list[Path]:
    """Remove the oldest of a registry's backups beside the `new` one, so that `keep` are left with it; return those."""
    dated = re.compile(rf"{re.escape(stem)}-\d{{4}}-\d\d-\d\dT\d{{6}}Z\.db")
    # The new one stays, whatever the clock said when it was named.
    others = sorted(path for path in new.parent.iterdir() if dated.fullmatch(path.name) and path != new)
    old = others[: max(len(others) - keep + 1, 0)]
    for path in old:
        path.unlink(missing_ok=True)
    return old
