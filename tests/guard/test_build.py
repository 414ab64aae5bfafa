"""What is shipped: wheel and sdist hold the schema and both programs, and an installed wheel works."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from helpers import PROJECT

pytestmark = [pytest.mark.build, pytest.mark.timeout(400)]
UNITS = PROJECT / "systemd"
SCHEMA = (PROJECT / "schema.sql").read_bytes()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both; the wheel from the sdist, as an index's users would."""
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(PROJECT))
    return out


def _run(*command: str) -> str:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_the_schema_and_the_packages(built: Path) -> None:
    """The wheel has schema.sql as a file inside the daemon's package, and all packages, the lab's with its own one."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        assert wheel.read("madsci_registryd/schema.sql") == SCHEMA
    for module in ("madsci_registry/client.py", "madsci_registryctl/__main__.py", "madsci_registryd/__main__.py"):
        assert module in names
    assert {"madsci_registry_lab/__main__.py", "madsci_registry_lab/schema.sql"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "client/", "daemon/", "lab/"))]


def test_wheel_and_sdist_hold_the_units(built: Path) -> None:
    """Each file of systemd/ is in the wheel inside the command line's package, in the sdist there and at the top."""
    shipped = {str(path.relative_to(UNITS)): path.read_bytes() for path in UNITS.rglob("*") if path.is_file()}
    configuration = shipped.pop("registryd.toml")  # beside the units there
    assert "madsci-registryd.service" in shipped
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        for name, content in shipped.items():
            assert wheel.read(f"madsci_registryctl/service/units/{name}") == content
        assert wheel.read("madsci_registryctl/service/registryd.toml") == configuration
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    for folder in ("systemd", "client/madsci_registryctl/service/units"):
        assert {f"{folder}/{name}" for name in shipped} <= names


def test_sdist_holds_what_a_build_needs(built: Path) -> None:
    """The sdist has the schema, where the daemon's package has it a file or a link to it."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {"schema.sql", "daemon/madsci_registryd/schema.sql", "pyproject.toml", "README.md", "LICENSE"} <= names


def test_installed_wheel_starts_both_programs(built: Path, tmp_path: Path) -> None:
    """Both commands of an installed wheel start, and the installed daemon finds its schema."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = _run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # The libraries come from this environment; ours come from the wheel, which the path of the venv puts first.
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    libraries = {str(Path(p).resolve()) for p in sys.path if p.endswith("site-packages")}
    Path(site, "libraries.pth").write_text("\n".join(libraries) + "\n")
    assert "madsci-registryd" in _run(str(python), "-m", "madsci_registryd", "--version")
    assert "registryctl" in _run(str(python), "-m", "madsci_registryctl", "--version")
    found = _run(
        str(python),
        "-c",
        "from importlib.resources import files; import madsci_registryd as d;"
        "print(d.__file__); print(files(d).joinpath('schema.sql').read_text())",
    )
    assert found.startswith(site)
    unit = _run(
        str(python),
        "-c",
        "from madsci_registryctl.service import units; print(units.read('madsci-registryd.service', '/opt/x/bin'))",
    )
    assert "\nExecStart=/opt/x/bin/madsci-registryd " in unit
    assert found.split("\n", 1)[1].strip().encode() == SCHEMA.strip()
