"""docs/lab.md says what the lab does: its routes, settings, exit statuses, status codes and metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from helpers import PROJECT
from madsci_registry.errors import BY_CODE
from madsci_registry_lab import connection, faults, gate, legacy, routes, tokens
from madsci_registry_lab.__main__ import main
from madsci_registry_lab.registry import LabRegistry
from madsci_registry_lab.settings import ENVIRONMENT, Settings

LAB = (PROJECT / "docs" / "lab.md").read_text()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[LabRegistry]:
    """A lab that nobody asks by HTTP."""
    with closing(LabRegistry(f"sqlite:{tmp_path}/lab.db")) as made:
        yield made


def test_routes_are_those_of_the_code(registry: LabRegistry) -> None:
    """The table of routes has each route of the program, and no other."""
    paths: dict[str, Any] = registry.app().openapi()["paths"]
    served = {(method.upper(), re.sub(":path", "", path)) for path, methods in paths.items() for method in methods}
    documented = re.findall(r"^\| `(GET|POST) (/\S+)` \|", LAB, re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert set(documented) == served


def test_settings_are_those_of_the_code() -> None:
    """The table of settings lists exactly the lab's settings, with option, environment, key and default."""
    rows = re.findall(rf"^\| `(--\S+) .*?` \| `{ENVIRONMENT}(\w+)` \| `(\w+)` \| (.*?) \|", LAB, re.MULTILINE)
    assert [key for _, _, key, _ in rows] == list(Settings.model_fields)
    options = {option for parameter in main.params for option in parameter.opts}
    for option, variable, key, default in rows:
        value = Settings.model_fields[key].default
        assert (option, variable) == (f"--{key.replace('_', '-')}", key.upper())
        assert option in options
        assert default == ("none" if value is None else f"`{value}`")
    assert options - {row[0] for row in rows} == {"--config", "--version"}


def test_exit_statuses_are_those_of_the_code() -> None:
    """The table of exit statuses lists those of the faults, besides 0 and the 2 of a wrong usage."""
    statuses = {value for name, value in vars(faults).items() if name.isupper()}
    assert {int(status) for status in re.findall(r"^\| (\d\d?) \|", LAB, re.MULTILINE)} == statuses | {0, 2}


def test_status_codes_are_those_of_the_code() -> None:
    """The table of HTTP statuses has each code that a lab answers, with its status; each is one of the protocol's."""
    rows = re.findall(r"^\| (\d{3}(?:, \d{3})*) \| (.*?) \|$", LAB, re.MULTILINE)
    documented = {(code, int(status)) for numbers, codes in rows for status in numbers.split(", ")
                  for code in re.findall(r"`(\w+)`", codes)}  # fmt: skip
    assert set(gate.STATUS.items()) <= documented
    assert documented - set(gate.STATUS.items()) == {("invalid", 400), ("permission_denied", 401)}
    assert set(gate.STATUS) <= set(BY_CODE)


def test_metrics_are_those_of_the_code(registry: LabRegistry) -> None:
    """The table of metrics lists each metric with its type and labels."""
    text = bytes(registry.metrics().body).decode()
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    rows = re.findall(r"^\| `(madsci_registry_lab_\w+)` \| (\w+) \| (.*?) \|", LAB, re.MULTILINE)
    assert {name: kind for name, kind, _ in rows} == types
    assert next(labels for name, _, labels in rows if name.endswith("answers_total")) == "`method` `route` `status`"


def test_limits_are_those_of_the_code() -> None:
    """The lease of a host and that of MADSci's routes, and the limits of requests, connections and tokens, stand
    in the document."""
    assert f"whose lease is {routes.LEASE_S:.0f} s" in LAB
    assert f"such a lock ends {legacy.LEASE_S:.0f} s" in LAB
    assert f"{gate.BODY_MAX_BYTES >> 20} MiB" in LAB
    assert f"comes in within {connection.REQUEST_S:.0f} s" in LAB
    assert f"of more than {connection.CONNECTIONS_MAX:,} connections" in LAB
    assert f"({tokens.TOKEN_MIN_CHARS} characters or more;" in LAB
