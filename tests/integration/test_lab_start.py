"""How a lab starts, or does not: settings, tokens, TLS, stores that are not its own, and the lease by real clocks."""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ulid import ULID

from helpers import _DIES_WITH_PARENT, PATIENCE_S, PROJECT, environment, until
from labs import MARK, LabHost, LabProcess, client
from madsci_registry._lab import Lab
from madsci_registry.errors import LabUnavailableError

TOKENS = {"lab1": "token-of-lab1-0123456789", "lab2": "token-of-lab2-0123456789"}


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokens of two hosts."""
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text("# host token\n" + "".join(f"{host} {token}\n\n" for host, token in TOKENS.items()))
    return path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, token_file: Path) -> Iterator[LabProcess]:
    """A lab whose hosts have tokens; the tests of this module share it."""
    with LabProcess(tmp_path_factory.mktemp("lab"), "--token-file", str(token_file), "--log-level", "debug") as running:
        yield running


def ended(*options: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the program, which shall end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "madsci_registry_lab", *options],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


# tokens


def test_who_has_no_token_is_refused(guarded: LabProcess) -> None:
    """Without a token, or with a wrong one, every route but the health answers 401, marked; health is open."""
    for headers in (
        {},
        {"Authorization": "Bearer wrong-token-0123456"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic !"},
    ):
        with httpx.Client(base_url=guarded.url, headers=headers, trust_env=False) as http:
            for answer in (
                http.get("/registry/resolve/arm"),
                http.get("/registry/hosts"),
                http.get("/metrics"),
                http.post("/registry/lookup", json={"name": "arm"}),
            ):
                assert (answer.status_code, answer.headers[MARK]) == (401, "1")
                assert answer.headers["WWW-Authenticate"] == "Bearer"
            for path in ("/health", "/registry/health"):
                assert http.get(path).status_code == 200


def test_token_is_its_hosts_alone(guarded: LabProcess) -> None:
    """A host with its token may speak in its own name, and not in another's."""
    with LabHost(guarded.url, "lab1", token=TOKENS["lab1"]) as host:
        assert host.register().resolve("arm", str(ULID()), lock={}).status_code == 200
        host.name = "lab2"
        for route, body in (
            ("hosts/register", {"boot": "b"}),
            ("changes", {"epoch": 1, "after": 0, "upto": 1, "changes": []}),
            ("release", {"session": host.session, "locks": {"arm": 1}}),
        ):
            refused = host.post(route, **body)
            assert (refused.status_code, refused.json()["code"]) == (403, "permission_denied")


def test_our_client_gives_its_token_as_the_password_of_the_url(guarded: LabProcess) -> None:
    """A lab_url with the token as its password is let in; one without is a lab that is not available."""
    assert Lab(guarded.url.replace("//", f"//lab1:{TOKENS['lab1']}@")).find("nobody") is None
    with pytest.raises(LabUnavailableError, match="401"):
        Lab(guarded.url).find("nobody")


def test_token_is_in_no_log_and_no_answer(guarded: LabProcess) -> None:
    """No token stands in the log, at its most talkative, nor in any answer."""
    said = ""
    for token in (*TOKENS.values(), "wrong-token-0123456789"):
        with client(guarded.url, token) as http:
            said += http.get("/registry/hosts").text + http.get("/openapi.json").text
            said += http.post("/registry/lookup", content=b"{", headers={"Content-Type": "application/json"}).text
            said += http.get("/metrics").text
    for token in (*TOKENS.values(), "wrong-token-0123456789"):
        assert token not in said
        assert token not in guarded.log


def test_tokens_change_while_hosts_go_on(tmp_path: Path) -> None:
    """A lab whose token file changes lets new hosts in, and others not any more, soon; a host that stays has its
    session and its locks."""
    path = tmp_path / "tokens"
    path.write_text(f"lab1 {TOKENS['lab1']}\nold token-of-old-0123456789\n")
    with LabProcess(tmp_path, "--token-file", str(path)) as lab, LabHost(lab.url, "lab1", token=TOKENS["lab1"]) as host:
        term = host.register().resolve("arm", str(ULID()), lock={}).json()["lock"]["term"]
        path.write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
        with client(lab.url, TOKENS["lab2"]) as new, client(lab.url, "token-of-old-0123456789") as old:
            until(lambda: new.get("/registry/hosts").status_code == 200, "for the new host to be let in")
            assert old.get("/registry/hosts").status_code == 401
        kept = host.keep(arm=term)
        assert (kept["lost"], kept["missing"]) == ([], [])


# settings


def test_missing_extra_is_said(tmp_path: Path) -> None:
    """Where fastapi and uvicorn are not installed, the program says what to install, with 78."""
    program = (
        "import sys; from importlib import util; real = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name in ('fastapi', 'uvicorn') else real(name, *a)\n"
        "sys.argv = ['madsci-registry-lab']; from madsci_registry_lab.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 78
    assert "pip install 'madsci-registryd[lab]'" in done.stderr


def certificate(folder: Path) -> tuple[Path, Path]:
    """Return a certificate for 127.0.0.1, signed by itself, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    folder.mkdir(exist_ok=True)
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=lab", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True, timeout=PATIENCE_S,
    )  # fmt: skip
    return cert, key


def test_tls_is_served(tmp_path: Path) -> None:
    """With a certificate and its key the lab serves HTTPS, to those who trust it; whoever speaks no TLS gets nothing,
    and no traceback in the log."""
    cert, key = certificate(tmp_path)
    with (
        LabProcess(tmp_path, "--tls-cert", str(cert), "--tls-key", str(key)) as lab,
        httpx.Client(verify=ssl.create_default_context(cafile=str(cert)), trust_env=False) as http,
    ):
        assert http.get(f"{lab.url}/health").json()["healthy"]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{lab.url}/health", trust_env=False)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{lab.port}/health", trust_env=False)
        assert http.get(f"{lab.url}/health").json()["healthy"]
        assert "Traceback" not in lab.log


def test_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    """A key that is not the certificate's, or no key at all, ends with 78."""
    (cert, _), (_, other_key) = certificate(tmp_path / "a"), certificate(tmp_path / "b")
    for key in (other_key, cert, tmp_path / "none"):
        done = ended("--listen", "127.0.0.1:0", "--tls-cert", str(cert), "--tls-key", str(key), cwd=tmp_path)
        assert (done.returncode, "tls_cert or tls_key cannot be used" in done.stderr) == (78, True)


def test_what_others_could_reach_needs_tokens(tmp_path: Path) -> None:
    """A lab that other hosts could reach ends with 78 where it has no tokens, and nothing is made."""
    done = ended("--listen", "0.0.0.0:0", cwd=tmp_path)
    assert (done.returncode, "may be reached from other hosts" in done.stderr) == (78, True)
    assert not (tmp_path / ".madsci").exists()


def test_port_in_use_is_said_and_changes_nothing(guarded: LabProcess, tmp_path: Path) -> None:
    """A port that another program has is 69; no store is made."""
    done = ended("--listen", f"127.0.0.1:{guarded.port}", cwd=tmp_path)
    assert (done.returncode, f"port {guarded.port}" in done.stderr) == (69, True)
    assert not (tmp_path / ".madsci").exists()


def test_unit_starts_the_program_with_its_settings(tmp_path: Path) -> None:
    """The command and the environment of the systemd unit are the program's: it starts, with its store in the unit's
    state folder."""
    unit = (PROJECT / "systemd" / "madsci-registry-lab.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert command.endswith("/bin/madsci-registry-lab")
    settings = dict(re.findall(r"^Environment=(\w+)=(.*)$", unit, re.MULTILINE))
    assert settings == {"MADSCI_REGISTRY_LAB_STORE": "sqlite:/var/lib/madsci-registry-lab/lab.db"}
    assert "\nStateDirectory=madsci-registry-lab\n" in unit
    here = {name: value.replace("/var/lib", str(tmp_path)) for name, value in settings.items()}
    started = subprocess.Popen(
        [sys.executable, "-c", _DIES_WITH_PARENT, "-m", "madsci_registry_lab", "--listen", "127.0.0.1:0"],
        cwd=tmp_path,
        env=environment(**here),
        stderr=subprocess.PIPE,
    )
    try:
        said = started.stderr
        assert said
        until(lambda: b"serving on" in said.readline(), "for it to serve")
        assert (tmp_path / "madsci-registry-lab" / "lab.db").exists()
    finally:
        started.kill()
        started.communicate(timeout=PATIENCE_S)
