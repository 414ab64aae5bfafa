"""The command `madsci-registry-lab`: flags and exit statuses. What it does is in server.py, copying.py, checking.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import click

from madsci_registry_lab.faults import BAD_CONFIGURATION, Fault

_FILE = click.Path(path_type=Path)


def _etcd_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--etcd-password-file", type=_FILE, help="Holds that user's password."),
        click.option("--etcd-user", help="The user of etcd."),
        click.option("--etcd-key", type=_FILE, help="The key of --etcd-cert."),
        click.option("--etcd-cert", type=_FILE, help="A certificate (PEM) that etcd is shown."),
        click.option("--etcd-ca", type=_FILE, help="The authority (PEM) of etcd's certificates: speak TLS with it."),
    ):
        command = option(command)
    return command


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--listen", metavar="HOST:PORT", help="Where to serve; default 127.0.0.1:8010.")
@click.option(
    "--store",
    metavar="URL",
    help="Where everything is kept: sqlite:PATH or etcd://HOST:PORT,...; default sqlite:.madsci/lab.db.",
)
@_etcd_options
@click.option("--token-file", type=click.Path(path_type=Path), help="Lines `host token`, one for each host of the lab.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Serve HTTPS with this certificate (PEM).")
@click.option("--tls-key", type=click.Path(path_type=Path), help="The certificate's key.")
@click.option("--log-level", help="debug, info, warning or error.")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file with the same settings.")
@click.version_option(version("madsci-registryd"), prog_name="madsci-registry-lab")
@click.pass_context
def main(context: click.Context, /, config: Path | None, **given: Any) -> None:
    """Serve the registry of a whole lab over HTTP, until told to stop.

    Settings come from these options, then the environment (MADSCI_REGISTRY_LAB_*), then the file of --config. What
    is asked of etcd goes for the commands as well.
    """
    if context.invoked_subcommand is not None:
        context.obj = {"config": config, **given}
        return
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        fault = f"{' and '.join(missing)} are not installed: pip install 'madsci-registryd[lab]'"
        _fail(Fault(BAD_CONFIGURATION, fault))
    from madsci_registry_lab.settings import load

    try:
        settings = load(given, config)
        from madsci_registry_lab.server import serve

        status = serve(settings)
    except Fault as fault:
        _fail(fault)
    sys.exit(status)


@main.command()
@click.option("--from", "source", metavar="URL", required=True, help="The store that has the lab; it stays as it is.")
@click.option("--to", "target", metavar="URL", required=True, help="The store that gets it; it must be empty.")
@click.pass_obj
def copy(given: dict[str, Any], source: str, target: str) -> None:
    """Copy a lab from one store to another, whole and compared, while nothing serves either of them."""
    try:
        from madsci_registry_lab.copying import copy as copy_lab
        from madsci_registry_lab.settings import load

        counts = copy_lab(source, target, load(given, given.pop("config")).etcd)
    except Fault as fault:
        _fail(fault)
    click.echo("copied and compared: " + ", ".join(f"{count} {part}" for part, count in counts.items()))


@main.command()
@click.pass_obj
def check(given: dict[str, Any]) -> None:
    """Say how the etcd of --store is: versions, members, alarms, quota, compaction. Exit status 1: look at it."""
    try:
        from madsci_registry_lab.checking import check as check_etcd
        from madsci_registry_lab.etcd_access import parse
        from madsci_registry_lab.settings import load

        settings = load(given, given.pop("config"))
        found = check_etcd(parse(settings.store, settings.etcd))
    except Fault as fault:
        _fail(fault)
    for finding in found:
        click.echo(f"{finding.weight:8} {finding.text}")
    sys.exit(any(finding.weight != "good" for finding in found))


def _fail(fault: Fault) -> NoReturn:
    click.echo(f"madsci-registry-lab: {fault}", err=True)
    sys.exit(fault.status)


if __name__ == "__main__":
    main()
