"""How registryctl shows values and errors: JSON, plain text, or on a terminal a table of rich."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from shutil import get_terminal_size
from typing import TYPE_CHECKING

import click

from madsci_registry.errors import HeldError, NotFoundError, RegistryError

if TYPE_CHECKING:
    from madsci_registry.types import Holder, OldLock
    from madsci_registryctl.invocation import Invocation

# What a terminal may take for a command, or what breaks a line. A name that an old file brought in may hold any of it.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

_FRACTION = re.compile(r"(?<=:\d\d)\.\d+")


def printable(value: object) -> str:
    """Return a value as one line of text that cannot steer a terminal; None is a dash."""
    text = "-" if value is None else str(value)
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def whole_seconds(instant: str) -> str:
    """Shorten an instant of ISO 8601 to whole seconds, for people; JSON has it in full."""
    return _FRACTION.sub("", instant)


def print_json(value: object) -> None:
    """Print a value as JSON, indented, control characters escaped."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(value, indent=2, ensure_ascii=not is_utf8)
    click.echo("\n".join(_CONTROL.sub(lambda m: f"\\u{ord(m[0]):04x}", line) for line in text.split("\n")))


def print_table(invocation: Invocation, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their columns: on a terminal that is wide enough styled by rich, else as plain padded text."""
    lines = [list(columns), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    needed = sum(widths) + 2 * len(widths)
    # A folded table can neither be read nor its ULIDs copied; plain lines are folded by the terminal itself.
    if sys.stdout.isatty() and needed <= get_terminal_size().columns:
        _print_rich_table(invocation, lines)
        return
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_rich_table(invocation: Invocation, lines: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in lines[0]:
        table.add_column(column, no_wrap=True)
    for row in lines[1:]:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    Console(no_color=invocation.no_color or None, highlight=False).print(table)


_STYLES = {
    "held": "green",
    "retired": "dim",
    "conflict": "red",
    "invalid": "red",
    "added": "green",
    "detached": "yellow",
    "connection": "yellow",
    "confirmed": "green",
    "unconfirmed": "yellow",
}


def print_fields(values: Mapping[str, object]) -> None:
    """Print one `name: value` a line; a list takes a line for each of its items."""
    width = max(map(len, values), default=0) + 1
    for name, value in values.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            click.echo(f"{name + ':':<{width}} {printable(item)}")


def holder_text(holder: Holder) -> str:
    """Say in a few words who holds a name, since when, and how surely it lives."""
    return f"{holder.label} on {holder.host} since {whole_seconds(holder.since)}, known by its {holder.proof}"


def holder_fields(holder: Holder) -> dict[str, object]:
    """Say all that is known of a holder: the kernel's facts first, what the client says of itself apart."""
    fields: dict[str, object] = {
        "holder": holder_text(holder),
        "its command": holder.command_line,
        "its executable": holder.executable,
        "it began": whole_seconds(holder.process_started_at) if holder.process_started_at else None,
        "its container": holder.container,
        "its unit": holder.unit,
        "to end it": holder.end_command,
        "it says it is": f"{holder.client or 'nothing'}, instance {holder.instance}",
    }
    return {name: value for name, value in fields.items() if value is not None}


def old_lock_fields(lock: OldLock) -> dict[str, object]:
    """Say what an old program wrote of itself into registry.json."""
    return {
        "holder": f"{lock.label} since {whole_seconds(lock.acquired_at)}",
        "until": f"{whole_seconds(lock.expires_at)}, if it does not renew that",
        "it says it is": f"instance {lock.holder_instance}",
    }


def hint_of(error: RegistryError) -> str | None:
    """Say what a person can do about an error, or None."""
    own: str | None = getattr(error, "hint", None)
    if own:
        return own
    if isinstance(error, NotFoundError) and error.renamed_to:
        return f"it is called {error.renamed_to!r} now"
    if isinstance(error, HeldError) and error.old_lock:
        lock = error.old_lock
        return f"kill {lock.holder_pid} on {lock.holder_host} would end it; its lock is over 30 s later"
    if isinstance(error, HeldError) and error.holder and not error.holder.session:  # on another host of the lab
        return None if not error.place else f"you were number {error.place} in the queue"
    if isinstance(error, HeldError) and error.holder:
        place = f"; you were number {error.place} in the queue" if error.place else ""
        program = f"runs {error.holder.command_line}; " if error.holder.command_line else ""
        return f"{program}known by its {error.holder.proof}{place}"
    return None


def print_error(error: RegistryError, *, as_json: bool) -> None:
    """Print an error: for people on stderr, as JSON one object `{"error": {"code", "message", ...}}` on stdout."""
    hint = hint_of(error)
    if as_json:
        wire = error.to_wire()
        print_json({"error": {**wire, "hint": hint} if hint else wire})
        return
    click.echo(f"registryctl: {printable(error.message)}", err=True)
    if hint and hint not in error.message:
        click.echo(f"  {printable(hint)}", err=True)


def print_usage_error(error: click.ClickException, *, as_json: bool) -> None:
    """Print what is wrong with a command line, as `print_error` does; its code is `usage`."""
    if as_json:
        print_json({"error": {"code": "usage", "message": error.format_message()}})
    else:
        error.show()
