"""`migrate`: takes over a registry.json that MADSci wrote, and goes back to it."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from madsci_registry import protocol
from madsci_registry.errors import BusyError, CorruptError, RegistryError, UnavailableError, UnsupportedError
from madsci_registry.registry_json import FOREIGN_ID, Document, entry_fault, instant, is_claim, is_foreign_id, parse
from madsci_registry.types import ImportedEntry, ImportReport
from madsci_registryctl import daemon_program
from madsci_registryctl.invocation import Command, Invocation
from madsci_registryctl.render import print_json, printable
from madsci_registryctl.transfer import print_report, status_of_report, write_whole

if TYPE_CHECKING:
    from madsci_registry._endpoint import Endpoint

READ_TRIES = 5
READ_PAUSE_S = 0.1
"""Old programs write in place: what is torn may be whole a moment later."""
OTHER_EVENTS = 1000
ENTRY_MAX_BYTES = protocol.FRAME_MAX_BYTES // 2
"""How many events of others may have come in since the daemon has started, and its own are still seen."""


@click.command("migrate", cls=Command)
@click.option(
    "--from", "file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Default: its own."
)
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@click.option("--rollback", is_flag=True, help="Make registry.json usable for old MADSci alone again.")
@click.pass_context
def migrate_command(context: click.Context, file: Path | None, dry_run: bool, rollback: bool) -> None:
    """Take over an existing registry.json (the registry's own, or FILE), and say what became of each entry.

    As `import` does, also for a file that is torn or damaged: what can be read of it is taken, what cannot is reported
    by line, as invalid. The original is kept as FILE.before-migration-DATE. A second run changes nothing. Exit status 8
    if any entry was in conflict, else 10 if any was invalid.

    --rollback clears the locks that the daemon keeps in registry.json to hold off old programs; no daemon may serve.
    """
    invocation: Invocation = context.obj
    if rollback:
        if file is not None or dry_run:
            raise click.UsageError("--rollback goes with neither --from nor --dry-run.")
        _roll_back(invocation)
        return
    own = _own_file(invocation)
    file = file or own
    if file is None:
        raise click.UsageError("Only a socket is known here: name the file by --from.")
    try:
        document, content = _read(file)
    except FileNotFoundError:
        raise click.UsageError(f"There is no {file}: name another file by --from.") from None
    is_own = own is not None and own.exists() and file.samefile(own)
    copy = None if dry_run else _Copy(file, content)
    try:
        report = _take_over(invocation, document, is_own=is_own, dry_run=dry_run)
    except BaseException:
        if copy:
            copy.drop_unless(taken=True)
        raise
    if copy:
        copy.drop_unless(taken=report.count("added") > 0)
    kept = copy.path if copy else None
    print_report(invocation, report, file=str(file), kept=str(kept) if kept else None)
    if kept and not invocation.as_json:
        invocation.say(f"The original is kept as {kept}.")
    context.exit(status_of_report(report))


def _own_file(invocation: Invocation) -> Path | None:
    endpoint = invocation.endpoint()
    if endpoint.registry is not None:
        return endpoint.registry
    with invocation.client(autostart=False) as client:
        said = Path(client.status()["registry"])
    return said if said.exists() else None  # in a container, its path is not ours


def _read(file: Path) -> tuple[Document, bytes]:
    for last in (*[False] * (READ_TRIES - 1), True):
        content = file.read_bytes()
        document = parse(content)
        if document.whole or last or not file.is_file():
            break
        time.sleep(READ_PAUSE_S)
    return document, content


class _Copy:
    """The original beside the file. It is made first: a daemon that starts writes its own file anew."""

    def __init__(self, file: Path, content: bytes) -> None:
        self.path: Path | None = None
        if not file.is_file():
            return  # a pipe has nothing beside it
        made = sorted(file.parent.glob(f"{_escaped(file.name)}.before-migration-*"))
        if any(other.is_file() and other.read_bytes() == content for other in made):
            return
        dated = f"{file.name}.before-migration-{datetime.now(timezone.utc):%Y-%m-%d}"
        number = 1
        path = file.with_name(dated)
        while path.exists() or path.is_symlink():
            number += 1
            path = file.with_name(f"{dated}-{number}")
        write_whole(path, content, file.stat().st_mode & 0o777)
        self.path = path

    def drop_unless(self, *, taken: bool) -> None:
        if self.path is not None and not taken:
            self.path.unlink()
            self.path = None


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _take_over(invocation: Invocation, document: Document, *, is_own: bool, dry_run: bool) -> ImportReport:
    entries, refused = _that_fit(document.entries)
    refused += [_unread(fault) for fault in document.faults]
    endpoint = invocation.endpoint()
    began = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%S.%fZ}"
    will_start = is_own and not _is_served(invocation)
    if will_start and dry_run:
        lines = _foretold(endpoint, entries)
    else:
        with invocation.client() as client:
            lines = client.import_entries(entries, dry_run=dry_run).entries
            if will_start:
                status = client.status()
                after = max(0, status["revision"] - 2 * len(document.entries) - OTHER_EVENTS)
                lines = _adopted_at_start(lines, entries, client.history(after=after), began)
    return ImportReport(dry_run=dry_run, entries=[_with_lock(line, entries, began) for line in lines] + refused)


def _that_fit(entries: dict[str, Any]) -> tuple[dict[str, Any], list[ImportedEntry]]:
    """Part from the entries those that no message to the daemon can hold."""
    good, refused = {}, []
    for name, entry in entries.items():
        size_bytes = len(protocol.encode({name: entry}))
        if size_bytes <= ENTRY_MAX_BYTES:
            good[name] = entry
        else:
            what = f"is {size_bytes} bytes, at most {ENTRY_MAX_BYTES} can be taken in"
            refused.append(ImportedEntry(name[:200], "invalid", what))
    return good, refused


def _unread(fault: Any) -> ImportedEntry:
    reason = replace(fault, name=None)
    return ImportedEntry(fault.name or "", "invalid", str(reason))


def _is_served(invocation: Invocation) -> bool:
    try:
        with invocation.client(autostart=False) as client:
            client.status()
    except UnavailableError:
        return False
    return True


def _foretold(endpoint: Endpoint, entries: dict[str, Any]) -> list[ImportedEntry]:
    """Say what a first start beside the file will do; starting a daemon now would do it."""
    if endpoint.database is not None and endpoint.database.exists():
        raise UnavailableError(
            f"no daemon serves {endpoint}, and one that starts takes its registry.json in: what would happen cannot be "
            "said without that",
            path=str(endpoint),
            hint="start it (registryctl status does not), or look at a copy of the file: migrate --dry-run --from COPY",
        )
    lines, owners = [], dict[str, str]()
    for name, entry in entries.items():
        reason = entry_fault(name, entry)
        if reason:
            lines.append(ImportedEntry(name, "invalid", reason))
        elif (owner := owners.setdefault(entry["id"], name)) != name:
            lines.append(ImportedEntry(name, "conflict", f"{entry['id']} is called {owner!r} here"))
        else:
            lines.append(ImportedEntry(name, "added", FOREIGN_ID if is_foreign_id(entry) else ""))
    return lines


def _adopted_at_start(
    lines: list[ImportedEntry], entries: dict[str, Any], events: list[Any], began: str
) -> list[ImportedEntry]:
    """Call added what the daemon took in by itself when this command started it."""
    adopted = {e.name for e in events if e.kind == "created" and e.at >= began and e.why.get("source")}

    def told(line: ImportedEntry) -> ImportedEntry:
        if line.outcome != "same" or line.name not in adopted:
            return line
        return ImportedEntry(line.name, "added", FOREIGN_ID if is_foreign_id(entries[line.name]) else "")

    return [told(line) for line in lines]


def _with_lock(line: ImportedEntry, entries: dict[str, Any], now: str) -> ImportedEntry:
    entry = entries.get(line.name)
    lock = entry.get("lock") if isinstance(entry, dict) else None
    if not isinstance(lock, dict) or is_claim(lock):
        return line
    until = instant(lock.get("expires_at"))
    if until is None or until <= now:
        return line
    held = f"held by an old program on {lock.get('holder_host')}, pid {lock.get('holder_pid')}, until {until}"
    return replace(line, reason=f"{line.reason}; {held}" if line.reason else held)


# the way back


def _roll_back(invocation: Invocation) -> None:
    endpoint = invocation.endpoint()
    if endpoint.registry is None:
        raise click.UsageError("Only a socket is known here: name the registry by --registry.")
    try:
        served = _is_served(invocation)
    except RegistryError:
        served = True  # it is there, and does not answer
    if served:
        raise _still_served(endpoint)
    done = daemon_program.run(endpoint.registry, "rollback")
    if done.returncode == daemon_program.SERVED:
        raise _still_served(endpoint)
    if done.returncode:
        said = (done.stderr.splitlines() or [f"status {done.returncode}"])[-1].removeprefix("madsci-registryd: ")
        error = CorruptError if done.returncode == daemon_program.DAMAGED else UnsupportedError
        raise error(said, path=str(endpoint.registry))
    names = done.stdout.splitlines()
    if invocation.as_json:
        print_json({"registry": str(endpoint.registry), "cleared": names})
        return
    for name in names:
        click.echo(printable(name))
    for line in done.stderr.splitlines():
        invocation.say(line)


def _still_served(endpoint: Endpoint) -> BusyError:
    return BusyError(
        f"a daemon serves {endpoint}. End the programs that hold names first, or set MADSCI_REGISTRY_AUTOSTART=0 for "
        "them: they start it again. Then registryctl stop, then this once more"
    )
