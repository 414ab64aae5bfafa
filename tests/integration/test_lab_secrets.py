"""What lets a host into the lab: its token is nowhere to be read, a wrong one locks out of the lab alone, and TLS is
checked."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import PATIENCE_S, DaemonProcess, until
from lab_fleets import FleetHost
from labs import LabHost, LabProcess
from madsci_registry import RegistryClient, RegistryError

TOKENS = {host: f"token-of-{host}-0123456789abcdef" for host in ("one", "two", "stale")}
WRONG = "wrong-token-0123456789abcdef"


@pytest.fixture(scope="module")
def folder(base_folder: Path) -> Path:
    """Where the lab, its certificate and all tokens of this module are."""
    return Path(tempfile.mkdtemp(dir=base_folder))


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[LabProcess]:
    """A lab with tokens and TLS that says all it can."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=lab", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")],
        check=True, capture_output=True, timeout=PATIENCE_S,
    )  # fmt: skip
    (folder / "tokens").write_text("".join(f"{host} {token}\n" for host, token in TOKENS.items()))
    tls = ("--tls-cert", str(folder / "cert.pem"), "--tls-key", str(folder / "key.pem"))
    with LabProcess(folder, "--token-file", str(folder / "tokens"), *tls, "--log-level", "debug") as running:
        yield running


def settings(folder: Path, lab: LabProcess, host: str, token: str, *, ca: bool = True) -> dict[str, str]:
    """Return the environment of a daemon that is `host`, in debugging."""
    path = folder / f"{host}.token"
    path.write_text(f"{host} {token}\n")
    path.chmod(0o600)
    given = {"LAB_URL": lab.url, "LAB_TOKEN_FILE": str(path), "LOG_LEVEL": "debug"}
    if ca:
        given["LAB_CA_FILE"] = str(folder / "cert.pem")
    return {f"MADSCI_REGISTRYD_{key}": value for key, value in given.items()}


@pytest.fixture
def host(folder: Path, guarded: LabProcess, request: pytest.FixtureRequest) -> Iterator[FleetHost]:
    """A host of the lab, whose daemon is not started yet; its parameter is (host, token, whether it has ca_file)."""
    name, token, ca = request.param
    env = settings(folder, guarded, name, token, ca=ca)
    with FleetHost(Path(tempfile.mkdtemp(dir=folder)), guarded.port, **env) as made:
        yield made


def said_by(host: FleetHost, client: RegistryClient) -> str:
    """Return all that a daemon says to whoever asks, writes, or shows of itself."""
    process = Path(f"/proc/{host.daemon.pid}")
    shown = (process / "cmdline").read_text() + (process / "environ").read_text()
    files = "".join(path.read_text() for path in host.folder.glob("*.json"))
    told = [client.status(), client.export(), client.metrics(), str(client.history()), str(client.list())]
    return host.daemon.log + shown + files + json.dumps(told)


@pytest.mark.parametrize("host", [("one", TOKENS["one"], True)], indirect=True)
def test_token_is_nowhere_to_be_read(host: FleetHost, guarded: LabProcess) -> None:
    """A host with its token and the lab's certificate is in, by the name that the token is for; the token stands in no
    log of daemon or lab at their most talkative, no answer, no error, no file, and nothing that a process shows."""
    host.daemon.start()
    host.await_settled()
    client = host.client()
    held = client.resolve("guarded arm", "node")
    assert (host.name, held.lab) == ("one", "confirmed")
    said = ""
    with LabHost(guarded.url, "two", token=TOKENS["two"]) as other:  # does not trust the certificate
        with pytest.raises(Exception, match="CERTIFICATE_VERIFY_FAILED") as failed:
            other.register()
        said += str(failed.value)
    guarded.kill()
    with pytest.raises(RegistryError) as away:
        client.lab_conflicts()
    said += str(away.value) + json.dumps(away.value.to_wire())
    host.await_state("away")
    guarded.start()
    host.await_settled()
    said += said_by(host, client) + guarded.log
    assert "lab_up" in said and "lab_away" in said
    assert TOKENS["one"] not in said and TOKENS["two"] not in said


@pytest.mark.parametrize("host", [("stale", WRONG, True)], indirect=True)
def test_wrong_token_locks_out_of_the_lab_alone(host: FleetHost, guarded: LabProcess) -> None:
    """A host whose token the lab does not know is refused and says so, without the token; names are given without the
    lab; with the right token, after a restart, the lab has all of them."""
    host.daemon.start()
    host.await_state("refused")
    client = host.client()
    mine = client.resolve("stale arm", "node")
    assert (mine.is_new, mine.lab) == (True, "unconfirmed")
    status = client.status()
    assert status["lab"]["error"] and any("refuses this host" in each for each in status["degraded"])
    assert "id=lab_refused" in host.daemon.log
    said = said_by(host, client) + guarded.log
    assert WRONG not in said
    Path(host.daemon.extra_env["MADSCI_REGISTRYD_LAB_TOKEN_FILE"]).write_text(f"stale {TOKENS['stale']}\n")
    host.daemon.restart()
    host.await_settled()
    until(lambda: mine.lab == "confirmed", "for the holder to hear of it")
    assert client.get("stale arm").lab == "confirmed"


@pytest.mark.parametrize("host", [("two", TOKENS["two"], False)], indirect=True)
def test_lab_whose_certificate_nobody_signed_is_no_lab(host: FleetHost) -> None:
    """Without the certificate in lab.ca_file a lab with one of its own is not spoken to: it is away, and why stands in
    the status; names are given without it."""
    host.daemon.start()
    assert host.client().resolve("untrusting arm", "node").lab == "unconfirmed"
    host.await_state("away")
    assert "CERTIFICATE_VERIFY_FAILED" in host.lab["error"]


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        (f"two {WRONG}\n", 0o644, "can be read by everybody"),
        (f"{WRONG}\n", 0o600, "is not one line"),
        (f"two {WRONG}\none {WRONG}\n", 0o600, "is not one line"),
        (None, 0o600, "No such file"),
    ],
    ids=["readable", "no host", "two hosts", "missing"],
)
def test_token_file_that_cannot_be_used_is_said_at_the_start(
    registry_path: Path, text: str | None, mode: int, why: str
) -> None:
    """A token file that others can read, that is not there, or that is no line of a token file, ends the start with 78;
    what is said of it does not hold the token."""
    file = registry_path.parent / "token"
    if text is not None:
        file.write_text(text)
        file.chmod(mode)
    daemon = DaemonProcess(registry_path)
    given = {"MADSCI_REGISTRYD_LAB_URL": "http://127.0.0.1:9", "MADSCI_REGISTRYD_LAB_TOKEN_FILE": str(file)}
    daemon.extra_env = given
    daemon.spawn()
    assert daemon.wait() == 78
    assert why in daemon.log and WRONG not in daemon.log
