"""The command `madsci-registry-lab`: flags and exit statuses. What it does is in server.py."""

from __future__ import annotations

import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from madsci_registry_lab.faults import BAD_CONFIGURATION, Fault


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--listen", metavar="HOST:PORT", help="Where to serve; default 127.0.0.1:8010.")
@click.option("--store", metavar="sqlite:PATH", help="Where everything is kept; default sqlite:.madsci/lab.db.")
@click.option("--token-file", type=click.Path(path_type=Path), help="Lines `host token`, one for each host of the lab.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Serve HTTPS with this certificate (PEM).")
@click.option("--tls-key", type=click.Path(path_type=Path), help="The certificate's key.")
@click.option("--log-level", help="debug, info, warning or error.")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file with the same settings.")
@click.version_option(version("madsci-registryd"), prog_name="madsci-registry-lab")
def main(config: Path | None, **given: Any) -> None:
    """Serve the registry of a whole lab over HTTP, until told to stop.

    Settings come from these options, then the environment (MADSCI_REGISTRY_LAB_*), then the file of --config.
    """
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


def _fail(fault: Fault) -> None:
    click.echo(f"madsci-registry-lab: {fault}", err=True)
    sys.exit(fault.status)


if __name__ == "__main__":
    main()
