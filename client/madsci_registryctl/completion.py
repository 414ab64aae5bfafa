"""`completion`: the script that makes a shell complete registryctl's words and the registry's names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from madsci_registryctl.invocation import Command

VARIABLE = "_REGISTRYCTL_COMPLETE"
"""Where click looks for a shell's question: made from the program's name."""


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    bash: eval "$(registryctl completion bash)" in ~/.bashrc; zsh the same in ~/.zshrc; fish: write it to
    ~/.config/fish/completions/registryctl.fish.
    """
    completion_class = get_completion_class(shell)
    assert completion_class is not None, "click has all three"
    group = context.find_root().command
    click.echo(completion_class(group, {}, "registryctl", VARIABLE).source())
