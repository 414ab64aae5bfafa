"""`metrics`: what the daemon counts, for Prometheus."""

from __future__ import annotations

import click

from madsci_registryctl.invocation import Command, Invocation
from madsci_registryctl.render import print_json


@click.command("metrics", cls=Command)
@click.pass_obj
def metrics_command(invocation: Invocation) -> None:
    """Print the daemon's metrics in the text format of Prometheus; exit status 6 if none serves. Starts none."""
    with invocation.client(autostart=False) as client:
        text = client.metrics()
    if invocation.as_json:
        print_json({"text": text})
    else:
        click.echo(text, nl=False)
