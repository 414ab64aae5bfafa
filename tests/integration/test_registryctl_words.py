"""What registryctl reads and prints, without a registry: words, files, exit statuses, errors of usage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from madsci_registry import errors
from madsci_registryctl import exits
from madsci_registryctl.__main__ import COMMANDS, main, registryctl
from madsci_registryctl.invocation import Invocation, finite_seconds, seconds
from madsci_registryctl.render import print_json, print_table, printable
from madsci_registryctl.resolve import parse_metadata
from madsci_registryctl.strict_json import loads
from madsci_registryctl.transfer import read_entries, write_whole


def test_exit_status_every_code_has_one() -> None:
    """Every error code of the registry has its exit status in the table, and the table knows no other code."""
    assert set(exits.BY_CODE) == set(errors.BY_CODE)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_every_command_has_one(name: str) -> None:
    """Every command says what it does, and its global options may stand after it."""
    result = CliRunner().invoke(registryctl, [name, "--json", "--help"])
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: registryctl {name}")


def test_parse_metadata_values_json_or_text() -> None:
    """A value that is JSON counts as JSON, any other as text; only the first `=` separates."""
    words = ("a=1", "b=true", "c=plain words", 'd={"x": [1.5]}', "e=x=y", "f=", 'g="1"')
    assert parse_metadata(words) == {
        "a": 1, "b": True, "c": "plain words", "d": {"x": [1.5]}, "e": "x=y", "f": "", "g": "1",
    }  # fmt: skip


@pytest.mark.parametrize("words", [("novalue",), ("=1",), ("a=1", "a=2"), ("a=NaN",), ('a={"x":1,"x":2}',)])
def test_parse_metadata_unclear_word_refused(words: tuple[str, ...]) -> None:
    """A word that is no key=value, a key given twice, and JSON that is not strict are refused."""
    with pytest.raises(errors.InvalidError):
        parse_metadata(words)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b'{"a": {"b": 1, "b": 2}}', "file.a.b"),
        (b'{"a": [1, NaN]}', "file.a.1"),
        (b'{"a": -Infinity}', "file.a"),
        (b'{"a": 1e999}', "file.a"),
        (b'{"a": "\\ud800"}', "file.a"),
        (b'{"a": {"\\udfff": 1}}', "file.a"),
        (b'{"a": "\xff"}', "file"),
        (b'{"a": 1', "file"),
        (b'{"a": ' + b"9" * 5000 + b"}", "file"),
        (b"[" * 100_000, "file"),
        (b"", "file"),
    ],
)
def test_loads_json_not_strict_names_place(text: bytes, place: str) -> None:
    """What is no clean JSON is refused, with the place where it is not."""
    with pytest.raises(errors.InvalidError) as caught:
        loads(text, "file")
    assert caught.value.field == place


def test_read_entries_other_files_refused() -> None:
    """A JSON file that is no registry of version 1 is refused, naming the field."""
    for text, field in (("[]", "registry.entries"), ('{"version": 1}', "registry.entries")):
        with pytest.raises(errors.InvalidError) as caught:
            read_entries(text.encode())
        assert caught.value.field == field
    with pytest.raises(errors.InvalidError) as caught:
        read_entries(b'{"version": 2, "entries": {}}')
    assert caught.value.field == "registry.version"
    assert read_entries(b'{"version": 1, "entries": {"a": {}}}') == {"a": {}}


@pytest.mark.parametrize("word", ["-1", "nan", "x", ""])
def test_seconds_no_duration_refused(word: str) -> None:
    """A duration is a number of seconds, 0 or more; a timeout is finite and above 0."""
    with pytest.raises(click.BadParameter):
        seconds(word)
    with pytest.raises(click.BadParameter):
        finite_seconds("inf" if word == "nan" else "0")


def test_printable_control_characters_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing that an old file brought in reaches the terminal as a control character, in JSON neither."""
    nasty = "a\x1b[2J\u009b\n\u202eb"
    assert printable(nasty) == r"a\x1b[2J\x9b\n\u202eb"
    print_json({nasty: nasty})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {nasty: nasty}
    assert not set(printed) & set("\x1b\u009b\u202e")


def test_table_without_terminal_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Where stdout is no terminal a table is plain text in columns."""
    print_table(Invocation(), ("NAME", "ID"), [("longer name", 1), ("b", None)])
    assert capsys.readouterr().out == "NAME         ID\nlonger name  1\nb            -\n"


def test_usage_error_with_json_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json a usage error is an object on stdout too, wherever --json stands, with exit status 2."""
    for words in (["nosuch", "--json"], ["--json", "list", "--bogus"], ["list", "--bogus", "--json"]):
        assert main(words) == exits.USAGE
        assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"
    assert main(["release", "a"]) == exits.USAGE
    assert "--force" in capsys.readouterr().err


def test_run_command_words_are_not_options(capsys: pytest.CaptureFixture[str]) -> None:
    """What stands behind `--` is the command's own: a --json there is none of registryctl's."""
    assert main(["run", "a", "--type", "nosuch", "--", "x", "--json"]) == exits.USAGE
    captured = capsys.readouterr()
    assert not captured.out
    assert "nosuch" in captured.err


def test_write_whole_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be written whole stays as it was, and nothing else is left in its folder."""
    target = tmp_path / "out.json"
    target.write_bytes(b"old")
    target.chmod(0o640)
    write_whole(target, b"new")
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640

    def no_space(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_whole(target, b"newer")
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    assert target.read_bytes() == b"new"


def test_completion_scripts_for_three_shells() -> None:
    """Completion prints a script for bash, zsh and fish that asks registryctl for the words."""
    for shell in ("bash", "zsh", "fish"):
        result = CliRunner().invoke(registryctl, ["completion", shell])
        assert result.exit_code == 0
        assert "_REGISTRYCTL_COMPLETE" in result.output


def test_import_of_main_is_light() -> None:
    """Starting registryctl imports neither rich, pydantic, SQLite nor daemon code."""
    code = "import sys, madsci_registryctl.__main__, madsci_registryctl.lookup; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert not imported & {"rich", "pydantic", "apsw", "sqlite3", "madsci_registryd", "asyncio"}
