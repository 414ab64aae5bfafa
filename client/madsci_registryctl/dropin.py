"""`dropin`: runs a MADSci program on this registry, without a change of its code."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from madsci_registry._endpoint import environment
from madsci_registry.dropin import VARIABLE
from madsci_registryctl import exits
from madsci_registryctl.invocation import Command, Invocation

LOOK_S = 10
"""How long the interpreter of CMD may take to say whether it has our package."""


@click.command("dropin", cls=Command)
@click.argument("command", metavar="-- CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def dropin_command(context: click.Context, command: tuple[str, ...]) -> None:
    """Run CMD, a program of MADSci as it is, with its registry served by the daemon.

    Sets MADSCI_REGISTRY_DROPIN=1 and becomes CMD; its exit status is CMD's. It reaches every Python program that CMD
    starts, in an environment that has madsci-registryd installed. --registry and --socket are handed on to it.
    """
    env = _environment(context.obj)
    if sys.platform != "linux":
        context.obj.say(f"registryctl: MADSci's own registry stays: madsci-registryd is not for {sys.platform}")
    elif interpreter := _without_us(command[0], env):
        context.obj.say(
            f"registryctl: {interpreter} does not find madsci-registryd, so it uses MADSci's own registry; "
            "install madsci-registryd there too"
        )
    context.exit(_become(command, env))


def _environment(invocation: Invocation) -> dict[str, str]:
    env = {**environment(), VARIABLE: "1"}
    if invocation.registry is not None or invocation.socket is not None:
        endpoint = invocation.endpoint()
        env.pop("MADSCI_REGISTRY_SOCKET", None)
        if endpoint.registry is not None:
            env["MADSCI_REGISTRY_PATH"] = str(endpoint.registry)
        if endpoint.socket_is_given:
            env["MADSCI_REGISTRY_SOCKET"] = str(endpoint.socket)
    return env


def _without_us(program: str, env: Mapping[str, str]) -> str | None:
    """Return the interpreter of a Python program where it does not find our package; None: it does, or who knows."""
    interpreter = _interpreter(shutil.which(program, path=env.get("PATH")))
    if interpreter is None:
        return None
    look = "import sys, importlib.util as u; sys.exit(3 * (u.find_spec('madsci_registry') is None))"
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run(
            [interpreter, "-c", look], check=False, env=env, stdin=quiet, stdout=quiet, stderr=quiet, timeout=LOOK_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return interpreter if done.returncode == 3 else None


def _interpreter(file: str | None) -> str | None:
    """Return the Python that a file is, or that its first line names; None: neither."""
    if file is None:
        return None
    if Path(file).name.startswith("python"):
        return file
    try:
        with Path(file).open("rb") as script:
            first = script.read(512).split(b"\n", 1)[0]
    except OSError:
        return None
    words = os.fsdecode(first[2:]).split() if first.startswith(b"#!") else []
    return words[0] if words and Path(words[0]).name.startswith("python") else None


def _become(command: tuple[str, ...], env: dict[str, str]) -> int:
    """Replace this process by CMD; return an exit status, having said why, where that cannot be."""
    sys.stdout.flush()
    sys.stderr.flush()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and a program inherits that
    try:
        os.execvpe(command[0], command, env)
    except FileNotFoundError:
        click.echo(f"registryctl: {command[0]}: command not found", err=True)
        return exits.COMMAND_NOT_FOUND
    except OSError as error:
        click.echo(f"registryctl: {command[0]}: {error.strerror}", err=True)
        return exits.NOT_EXECUTABLE
