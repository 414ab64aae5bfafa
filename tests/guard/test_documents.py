"""The documents say what the code does: examples, settings, exit statuses, and the tests that they name."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import PATIENCE_S, PROJECT, DaemonProcess, environment

PROTOCOL = (PROJECT / "docs" / "protocol.md").read_text()
OPERATIONS = (PROJECT / "docs" / "operations.md").read_text()
ARCHITECTURE = (PROJECT / "docs" / "architecture.md").read_text()
SAMPLE = (PROJECT / "docs" / "registryd.toml").read_text()
README = (PROJECT / "README.md").read_text()


def table_of_statuses(program: str) -> set[int]:
    """Read the exit statuses that operations.md lists for a program."""
    found = re.search(rf"^## Exit statuses of {program}\n(.*?)(?=^## |\Z)", OPERATIONS, re.MULTILINE | re.DOTALL)
    assert found, f"operations.md has no exit statuses of {program}"
    return {int(status) for status in re.findall(r"^\| (\d+) \|", found[1], re.MULTILINE)}


def test_example_client_of_the_protocol_document_works(daemon: DaemonProcess) -> None:
    """The client in docs/protocol.md, which uses nothing of ours, gets a ULID and a lock."""
    example = re.findall(r"```python\n(.*?)```", PROTOCOL, re.DOTALL)[0]
    example = example.replace("/var/lib/lab/.madsci/run", str(daemon.socket.parent))
    plain = {**environment(), "PYTHONWARNINGS": "ignore::ResourceWarning", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", example], env=plain, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "'is_new': True" in done.stdout
    assert "'fencing_token': " in done.stdout


def test_example_of_the_readme_works(daemon: DaemonProcess) -> None:
    """The Python session of the README prints what it shows, but for ULID, token, host and instant."""
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    done = subprocess.run(
        [sys.executable, "-c", example],
        env=environment(MADSCI_REGISTRY_PATH=str(daemon.registry)),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert re.fullmatch(r"[0-9A-Z]{26} \d+ True", first)
    assert second.startswith("'liquidhandler_1' is held by another instance in this process on ")
    assert third == "None free"


def test_fence_example_of_the_readme_prints_what_it_shows(tmp_path: Path) -> None:
    """The fence of the README refuses the older token in the very words that stand there."""
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1].replace("/tmp/lab/", f"{tmp_path}/")
    shown = re.findall(r"```console\n(fencing token .*?)```", README, re.DOTALL)[0]
    done = subprocess.run(
        [sys.executable, "-c", example], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == shown


def test_readme_begins_with_its_two_commands() -> None:
    """Who opens the README sees `make run` and `make test` before any other command or output."""
    code = [line.strip() for line in README.splitlines() if line.startswith(("    ", "```"))]
    assert [line.split("#")[0].strip() for line in code[:2]] == ["make run", "make test"]
    targets = re.findall(r"^(\w+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake (?:PYTHON=\S+ )?([a-z]+)\b", README)) <= set(targets)


def test_sample_configuration_has_every_setting_commented_out() -> None:
    """docs/registryd.toml sets nothing as it is, and has each key of the settings once, in their order."""
    from madsci_registryd.settings import Settings

    assert all(line.startswith("#") for line in SAMPLE.splitlines() if line)
    keys = re.findall(r"^# ([\w.]+) = ", SAMPLE, re.MULTILINE)
    assert [key.replace("lab.", "lab_") for key in keys] == list(Settings.model_fields)


def test_sample_configuration_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/registryd.toml with all keys in force is a valid configuration; what has a default is shown with it."""
    from madsci_registryd import settings

    for key in settings.Settings.model_fields:
        monkeypatch.delenv(settings.ENVIRONMENT + key.upper(), raising=False)
    config = tmp_path / "registryd.toml"
    config.write_text(re.sub(r"^# ([\w.]+ = )", r"\1", SAMPLE, flags=re.MULTILINE))
    loaded = settings.load({}, config)
    for key, field in settings.Settings.model_fields.items():
        assert getattr(loaded, key) == field.default or field.default in (None, ()), key
        assert getattr(loaded, key) is not None, key


def test_every_setting_is_documented_with_its_default() -> None:
    """The table of settings lists exactly the daemon's settings, with option, environment, key and default."""
    from madsci_registryd.__main__ import main
    from madsci_registryd.settings import ENVIRONMENT, Settings

    rows = re.findall(rf"^\|(.*?)\| `{ENVIRONMENT}(\w+)` \| `([\w.]+)` \| (.*?) \|", OPERATIONS, re.MULTILINE)
    rows = [(option, variable, key.replace("lab.", "lab_"), default) for option, variable, key, default in rows]
    assert [key for _, _, key, _ in rows] == list(Settings.model_fields)
    options = {option for parameter in main.params for option in parameter.opts}
    for option, variable, key, default in rows:
        flag = f"--{key.replace('_', '-')}"
        assert variable == key.upper()
        assert option.strip().startswith((f"`{flag} ", f"`{flag}`")) if flag in options else not option.strip()
        value = Settings.model_fields[key].default
        shown = str(value).lower() if isinstance(value, bool) else [*value] if isinstance(value, frozenset) else value
        assert default.startswith("none: ") if value in (None, ()) else default == f"`{shown}`", key


def test_every_exit_status_of_the_daemon_is_documented() -> None:
    """operations.md lists exactly the statuses of the daemon's faults, besides 0 and the 2 of a wrong usage."""
    from madsci_registryd import faults

    statuses = {cls.status for _, cls in inspect.getmembers(faults, inspect.isclass) if hasattr(cls, "status")}
    assert table_of_statuses("madsci-registryd") == statuses | {0, 2}


def test_every_exit_status_of_registryctl_is_documented() -> None:
    """operations.md lists exactly the statuses that registryctl's table of them has."""
    from madsci_registryctl import exits

    statuses = {value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)}
    assert table_of_statuses("registryctl") == statuses


def test_tests_that_architecture_names_exist() -> None:
    """Each promise of architecture.md names at least one test, and every test that it names is there."""
    sources = "\n".join(path.read_text() for path in (PROJECT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", ARCHITECTURE))
    assert named <= set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    promises = re.findall(r"^\| (\d+) \| \*\*.*?\| (.*?) \|$", ARCHITECTURE, re.MULTILINE)
    assert [int(number) for number, _ in promises] == [*range(1, 11)]
    assert all("`test_" in tests for _, tests in promises)


def test_modules_that_architecture_describes_are_those_of_the_code() -> None:
    """architecture.md has a word on every module of the daemon and of the client library, and on no other."""
    named = set(re.findall(r"\*\*`(\w+)`\*\*", ARCHITECTURE.replace(_section_of_the_lab(), "")))
    folders = (PROJECT / "daemon" / "madsci_registryd", PROJECT / "client" / "madsci_registry")
    modules = {path.stem for folder in folders for path in folder.glob("*.py")} - {"__init__"}
    assert named == modules | {"madsci_registryctl"}


def test_modules_of_the_lab_that_architecture_describes_are_those_of_the_code() -> None:
    """architecture.md has a word on every module of the lab, and on no other."""
    modules = {path.stem for path in (PROJECT / "lab" / "madsci_registry_lab").glob("*.py")} - {"__init__"}
    assert set(re.findall(r"\*\*`(\w+)`\*\*", _section_of_the_lab())) == modules


def _section_of_the_lab() -> str:
    found = re.search(r"^## Modules of the lab\n.*?(?=^## )", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    assert found
    return found[0]


def test_schema_that_ships_is_the_one_at_the_top() -> None:
    """The daemon's package has schema.sql as a relative link to the only full definition."""
    link = PROJECT / "daemon" / "madsci_registryd" / "schema.sql"
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == (PROJECT / "schema.sql").resolve()
