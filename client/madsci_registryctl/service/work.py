"""Does what was planned: files first, then commands. Nothing is undone where one fails: the next run goes on there."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from madsci_registry._endpoint import SYSTEM_CONFIG
from madsci_registry.errors import UnavailableError
from madsci_registryctl.invocation import Invocation
from madsci_registryctl.render import print_json, printable
from madsci_registryctl.service import reach, systemd, takeover, units
from madsci_registryctl.service.files import Disk
from madsci_registryctl.service.plan import SERVICE, SOCKET, TEMPLATE, Command, Plan, Service, removal


class Report:
    """Says what is done when it is done; with --json in one object at the end."""

    def __init__(self, invocation: Invocation) -> None:
        self._invocation = invocation
        self._files: list[dict[str, str]] = []
        self._commands: list[str] = []
        self.left: list[Path] = []
        """Unit files that were left alone, as they are another program's."""

    def file(self, path: Path, outcome: str) -> None:
        """Note what became of a file or folder."""
        self._files.append({"path": str(path), "outcome": outcome})
        self._line(outcome, str(path))

    def command(self, command: Command) -> None:
        """Note a command that was run."""
        self._commands.append(shlex.join(command))
        self._line("ran", shlex.join(command))

    def _line(self, what: str, of: str) -> None:
        if not self._invocation.as_json:
            click.echo(f"{what:<10} {printable(of)}")
            sys.stdout.flush()

    def paths(self, *outcomes: str) -> list[str]:
        """List the files of these outcomes."""
        return [file["path"] for file in self._files if file["outcome"] in outcomes]

    def is_empty(self) -> bool:
        """Tell whether nothing was done or found."""
        return not (self._files or self._commands or self.left)

    def half_done(self) -> str:
        """Say what stays where a command has failed."""
        changed = ", ".join(self.paths("written", "replaced", "removed")) or "none"
        return f"files changed so far: {changed}. Run the same again when it is mended"

    def end(self, unit: str | None, talk: list[str]) -> None:
        """Say the last words."""
        if self._invocation.as_json:
            print_json({"unit": unit, "files": self._files, "commands": self._commands})
        for line in talk:
            self._invocation.say(line)


def disk_of(service: Service) -> Disk:
    """Return how files of a service are written."""
    return Disk(follows_links=service.scope == "user")


def install(report: Report, service: Service, plan: Plan) -> None:
    """Write the files, then have systemd start the service, or start it anew where it is older than its files.

    The host's configuration does not stay where it was not there and the service does not serve: as long as it exists,
    every program of the host looks for this registry.

    Raises: RegistryError, OSError; the report has what was done before.
    """
    disk = disk_of(service)
    takeover.check(service)
    with disk.locked(service.unit_folder):
        if service.folder is not None and not service.folder.exists():
            service.folder.mkdir(mode=0o700)
            report.file(service.folder, "written")
        for path, outcome in disk.write(plan.files):
            report.file(path, outcome)
        try:
            _start(report, service, plan)
        except BaseException as error:
            if str(SYSTEM_CONFIG) in report.paths("written"):
                report.file(SYSTEM_CONFIG, disk.remove(SYSTEM_CONFIG))
            if isinstance(error, UnavailableError):
                error.hint = report.half_done()
            raise


def _start(report: Report, service: Service, plan: Plan) -> None:
    for command in plan.prepare:
        _run(report, command)
    with takeover.handed_over(service) as ended:
        if ended is not None:
            report.command(("kill", str(ended)))
        for command in _starting(service, plan):
            _run(report, command)
    if _is_outdated(service, plan):
        _run(report, service.systemctl("restart", service.unit))
    takeover.check_served(service)


def _starting(service: Service, plan: Plan) -> Iterator[Command]:
    state = takeover.state(service, service.unit)
    is_new_socket = SOCKET in plan.units and takeover.state(service, SOCKET) != "active"
    # systemd starts no socket of a service that runs. And a start that is asked for while the last try ends, because
    # another daemon served (69), is counted as that try: as failed.
    if (state == "active" and is_new_socket) or state in ("activating", "deactivating"):
        yield service.systemctl("stop", service.unit)
    yield service.systemctl("enable", "--now", *plan.units)


def _is_outdated(service: Service, plan: Plan) -> bool:
    """Tell whether the service was started before its files were written or its program installed."""
    pid = int(systemd.shown(service.scope, service.unit, "MainPID") or 0)
    newest = max([reach.installed_at(), *(file.path.stat().st_mtime for file in plan.files)])
    try:
        return pid != 0 and systemd.started_at(pid) < newest
    except OSError:
        return False  # it has just ended, and comes back as it should be


def _run(report: Report, command: Command) -> None:
    systemd.run(command, report.half_done())
    report.command(command)


def present(service: Service) -> list[str]:
    """List what is in the folder of the units, and which units are enabled there. Raises OSError."""
    disk, folder = disk_of(service), service.unit_folder
    names = disk.names(folder)
    return [*names, *(name for wants in names if wants.endswith(".wants") for name in disk.names(folder / wants))]


def uninstall(report: Report, service: Service) -> None:
    """Stop and disable the units, then remove the files that are as they were written.

    Raises: RegistryError, OSError; the report has what was done before.
    """
    disk, there = disk_of(service), present(service)
    foreign = [name for name in (SERVICE, TEMPLATE) if _is_foreign(disk, service.unit_folder / name)]
    plan = removal(service, there, foreign=foreign)
    files = [path for path in plan.files if disk.exists(path)]
    units = [unit for unit in plan.units if unit in there]
    report.left = [service.unit_folder / name for name in foreign if service.folder is None or name == TEMPLATE]
    if not files and not units:
        return
    systemd.require(service.scope)
    with disk.locked(service.unit_folder):
        for path in files:
            disk.check_writable(path.parent)
        if units:
            _run(report, service.systemctl("disable", "--now", *units))
        for path in files:
            report.file(path, disk.remove(path))
        for path in plan.notes:
            # Not that of a container, which serves the folder now.
            if any(unit in disk.text(path) for unit in units):
                disk.discard(path)
                report.file(path, "removed")
        _run(report, service.systemctl("daemon-reload"))


def _is_foreign(disk: Disk, unit: Path) -> bool:
    """Tell whether a unit file is another program's: one that is still there, or something else altogether."""
    text = disk.text(unit)
    programs = units.daemons_in(text)
    return bool(text) and not any(p == reach.program() or not p.exists() for p in programs)
