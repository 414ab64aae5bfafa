"""The documents' examples work: the Python client of protocol.md, the settings of operations.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from helpers import PATIENCE_S, PROJECT, DaemonProcess, environment

PROTOCOL = (PROJECT / "docs" / "protocol.md").read_text()
OPERATIONS = (PROJECT / "docs" / "operations.md").read_text()


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


def test_sample_configuration_loads(tmp_path: Path) -> None:
    """The sample of docs/operations.md is a valid configuration."""
    from madsci_registryd import settings

    sample = tmp_path / "registryd.toml"
    sample.write_text(re.findall(r"```toml\n(.*?)```", OPERATIONS, re.DOTALL)[0])
    loaded = settings.load({}, sample)
    assert loaded.registry == Path("/srv/lab/.madsci/registry.json")


def test_every_setting_is_documented() -> None:
    """The table of settings lists exactly the daemon's settings, with environment, key and option."""
    from madsci_registryd.settings import ENVIRONMENT, Settings

    rows = re.findall(rf"^\|(.*?)\| `{ENVIRONMENT}(\w+)` \| `(\w+)` \|", OPERATIONS, re.MULTILINE)
    assert [key for _, _, key in rows] == list(Settings.model_fields)
    for option, variable, key in rows:
        assert variable == key.upper()
        assert not option.strip() or option.strip().startswith(f"`--{key.replace('_', '-')} ")


def test_schema_that_ships_is_the_one_at_the_top() -> None:
    """The daemon's package has schema.sql as a relative link to the only full definition."""
    link = PROJECT / "daemon" / "madsci_registryd" / "schema.sql"
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == (PROJECT / "schema.sql").resolve()
