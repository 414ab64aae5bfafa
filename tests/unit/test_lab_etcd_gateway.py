"""The gateway to etcd on real members: which tries are repeated, what is a definite no, how it is let in."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import etcd
from etcd import Cluster
from helpers import until
from lab_proxy import LabProxy, Mode
from madsci_registry.errors import NoSpaceError, UnavailableError
from madsci_registry_lab.etcd_access import EtcdAccess, EtcdFiles, parse
from madsci_registry_lab.etcd_gateway import EtcdGateway, EtcdRefusedError, RevisionCompactedError
from madsci_registry_lab.etcd_wire import Compare, Delete, News, Put, Range, Txn, Watch, after
from madsci_registry_lab.faults import Fault

pytestmark = pytest.mark.skipif(not etcd.is_here(), reason=etcd.WHY_NOT)


@pytest.fixture(scope="module")
def one() -> Cluster:
    """An etcd of one member."""
    return etcd.shared()


@pytest.fixture
def gateway(one: Cluster, request: pytest.FixtureRequest) -> Iterator[EtcdGateway]:
    """A gateway to it, with a prefix of its own."""
    with closing(EtcdGateway(parse(f"{one.url}/{request.node.name}"))) as made:
        yield made


def put(gateway: EtcdGateway, name: str, value: str) -> int:
    """Write a key; return its revision."""
    return gateway.txn(Txn(then=(Put(gateway.access.prefix + name, value),))).revision


def value(gateway: EtcdGateway, name: str) -> str | None:
    """Read a key."""
    found = gateway.range(Range(gateway.access.prefix + name)).kvs
    return found[0].value if found else None


def through(proxy: LabProxy, one: Cluster, name: str, total_s: float = 8.0) -> EtcdGateway:
    """Return a gateway that asks the proxy first, and then the member behind it."""
    member = one.url.removeprefix("etcd://")
    return EtcdGateway(parse(f"etcd://127.0.0.1:{proxy.port},{member}/{name}"), total_s=total_s)


def port(one: Cluster) -> int:
    """Return the port of its member."""
    return int(one.url.rpartition(":")[2])


def test_transaction_that_does_not_hold_changes_nothing(gateway: EtcdGateway) -> None:
    """A transaction whose compare fails writes nothing and answers the reads of its other branch."""
    revision = put(gateway, "a", "1")
    key = gateway.access.prefix + "a"
    for compare in (
        Compare(key, "CREATE", 0),
        Compare(key, "MOD", revision - 1),
        Compare(key, "MOD", revision, "GREATER"),
    ):
        done = gateway.txn(Txn((compare,), (Put(key, "2"),), (Range(key),)))
        assert not done.succeeded
        assert done.found[0].kvs[0].value == "1"
    done = gateway.txn(Txn((Compare(key, "MOD", revision),), (Put(key, "2"), Range(key))))
    assert (done.succeeded, done.found[0].kvs[0].value, value(gateway, "a")) == (True, "2", "2")
    gateway.txn(Txn(then=(Delete(key),)))
    assert value(gateway, "a") is None


def test_touched_key_keeps_its_value(gateway: EtcdGateway) -> None:
    """A key that is put without a value has a new revision and its value; one that is not there is a definite no."""
    revision = put(gateway, "a", "ä\0'")
    key = gateway.access.prefix + "a"
    assert gateway.txn(Txn(then=(Put(key, None),))).revision > revision
    (kv,) = gateway.range(Range(key)).kvs
    assert (kv.value, kv.created) == ("ä\0'", revision)
    with pytest.raises(EtcdRefusedError):
        gateway.txn(Txn(then=(Put(key + "b", None),)))


def test_range_reads_pages_in_order_and_as_they_were(gateway: EtcdGateway) -> None:
    """A range is in the order of its keys' bytes, by pages, as of a revision, counted, or by when keys were made."""
    for name in ("z", "Ä", "a"):
        put(gateway, name, name)
    start = gateway.access.prefix
    page = gateway.range(Range(start, after(start), limit=2))
    assert ([kv.value for kv in page.kvs], page.count) == (["a", "z"], 3)
    before = page.revision
    put(gateway, "b", "b")
    assert gateway.range(Range(start, after(start), revision=before, count_only=True)).count == 3
    made = gateway.range(Range(start, after(start), created_from=1)).kvs
    assert [kv.value for kv in made] == ["z", "Ä", "a", "b"]
    assert not any(kv.value for kv in gateway.range(Range(start, after(start), keys_only=True)).kvs)


def test_transaction_of_many_operations_is_one(gateway: EtcdGateway) -> None:
    """More operations than etcd takes in one transaction are still all done, in one revision, or none."""
    key = gateway.access.prefix
    puts = tuple(Put(f"{key}{n:03}", "x") for n in range(400))
    assert not gateway.txn(Txn((Compare(f"{key}000", "MOD", 5),), puts)).succeeded
    done = gateway.txn(Txn((Compare(f"{key}000", "MOD", 0),), puts))
    found = gateway.range(Range(key, after(key))).kvs
    assert {kv.changed for kv in found} == {done.revision}
    assert len(found) == 400


@pytest.mark.parametrize("mode", ["refuse", "silent", "drop", "mute", "cut", "500", "no_http", "no_json"])
def test_try_without_an_answer_goes_on_at_the_next_member(
    one: Cluster, mode: Mode, request: pytest.FixtureRequest
) -> None:
    """Whatever a member or the network does to a request, the next member answers it."""
    name = request.node.name.replace("[", "-").replace("]", "")
    with LabProxy(port(one)) as proxy, closing(through(proxy, one, name)) as gateway:
        proxy.mode = mode
        put(gateway, "a", "1")
        assert value(gateway, "a") == "1"


def test_definite_no_is_not_repeated(one: Cluster) -> None:
    """What etcd refuses is asked once."""
    with LabProxy(port(one)) as proxy, closing(EtcdGateway(parse(f"etcd://127.0.0.1:{proxy.port}/x"))) as gateway:
        with pytest.raises(EtcdRefusedError) as refused:
            gateway.txn(Txn(then=(Put("a", "1"), Put("a", "2"))))
        assert refused.value.status == 400
        assert proxy.requests["POST /v3/kv/txn"] == 1


def test_nobody_there_is_told_in_time(one: Cluster) -> None:
    """Where no member answers, the outcome is unknown after the total time, and close ends what waits at once."""
    with LabProxy(port(one)) as proxy:
        proxy.mode = "refuse"
        with closing(EtcdGateway(parse(f"etcd://127.0.0.1:{proxy.port}"), total_s=0.3)) as gateway:
            with pytest.raises(UnavailableError, match="does not answer"):
                gateway.range(Range("a"))
        waiting = EtcdGateway(parse(f"etcd://127.0.0.1:{proxy.port}"), total_s=600)
        ended: list[UnavailableError] = []

        def ask() -> None:
            try:
                waiting.range(Range("a"))
            except UnavailableError as error:
                ended.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        waiting.close()
        thread.join(20)
        assert ended


def _fill(gateway: EtcdGateway) -> None:
    for n in range(2000):
        put(gateway, str(n), "x" * 10_000)


def test_quota_is_no_space_and_reads_go_on(tmp_path: Path) -> None:
    """An etcd that has reached its quota refuses what is put, and nothing changes; reads and deletes go on."""
    with Cluster(tmp_path, 1, "--quota-backend-bytes", "300000") as full:
        with closing(EtcdGateway(parse(full.url))) as gateway:
            with pytest.raises(NoSpaceError):
                _fill(gateway)
            assert value(gateway, "0") == "x" * 10_000
            gateway.txn(Txn(then=(Delete(gateway.access.prefix + "0"),)))
            assert value(gateway, "0") is None


def test_watch_brings_whole_revisions_from_where_it_is_begun(gateway: EtcdGateway) -> None:
    """A watch tells each put from its first revision on, those of a transaction at once, and no delete."""
    first = put(gateway, "a", "1")
    put(gateway, "a", "2")
    key = gateway.access.prefix
    gateway.txn(Txn(then=(Delete(f"{key}a"),)))
    gateway.txn(Txn(then=(Put(f"{key}b", "3"), Put(f"{key}c", "4"))))
    told: list[News] = []
    with gateway.watch(Watch(key, after(key), first + 1)) as news:
        while sum(len(answer.kvs) for answer in told) < 3:
            told.append(next(news))
    assert told[0].created
    assert [kv.value for answer in told for kv in answer.kvs] == ["2", "3", "4"]
    assert told[-1].kvs[-1].changed == told[-1].kvs[-2].changed


def test_watch_ends_with_the_gateway(gateway: EtcdGateway) -> None:
    """Whoever waits for news is let go when the gateway closes."""
    key, over = gateway.access.prefix, threading.Event()

    def listen() -> None:
        try:
            with gateway.watch(Watch(key, after(key), 1)) as news:
                begun.set()
                for _ in news:
                    pass
        except UnavailableError:
            over.set()

    begun = threading.Event()
    thread = threading.Thread(target=listen)
    thread.start()
    assert begun.wait(20)
    gateway.close()
    thread.join(20)
    assert over.is_set()


def test_compacted_revision_is_told(tmp_path: Path) -> None:
    """A watch or read of a revision that is not kept any more says so, and from where it may begin."""
    with Cluster(tmp_path) as cluster, closing(EtcdGateway(parse(cluster.url))) as gateway:
        last = [put(gateway, "a", str(n)) for n in range(10)][-1]
        cluster.control("compact", str(last))
        key = gateway.access.prefix
        with gateway.watch(Watch(key, after(key), 2)) as news:
            assert until(lambda: next(news).compacted) == last
        with pytest.raises(RevisionCompactedError):
            gateway.range(Range(key, revision=2))


def test_lost_token_is_renewed_once(tmp_path: Path) -> None:
    """With users, a token that etcd does not know any more is got anew without a word; a wrong password is a no."""
    password = tmp_path / "password"
    password.write_text("secret\n")
    with Cluster(tmp_path) as cluster:
        for command in ("user add root:secret", "user grant-role root root", "auth enable"):
            cluster.control(*command.split())
        files = EtcdFiles(user="root", password_file=password)
        with closing(EtcdGateway(parse(cluster.url, files))) as gateway:
            put(gateway, "a", "1")
            cluster.kill()  # it keeps tokens in memory
            cluster.start()
            assert value(gateway, "a") == "1"
            assert gateway._turn == 0  # the member that gave the token knows it
        password.write_text("wrong")
        for given in (EtcdFiles(), EtcdFiles(user="root", password_file=password)):
            with closing(EtcdGateway(parse(cluster.url, given))) as gateway, pytest.raises(EtcdRefusedError):
                put(gateway, "a", "2")


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A folder with an authority, and a certificate of it for both sides."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make certificates with")
    folder = tmp_path / "tls"
    folder.mkdir()
    (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    new_key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    for command in (
        f"req -x509 {new_key} -days 2 -subj /CN=lab-ca -keyout ca.key -out ca.pem",
        f"req {new_key} -subj /CN=member -keyout member.key -out member.csr",
        "x509 -req -in member.csr -CA ca.pem -CAkey ca.key -set_serial 1 -days 2 -extfile extensions -out member.pem",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder


def test_members_and_lab_show_each_other_certificates(tmp_path: Path, certificates: Path) -> None:
    """With TLS the members' certificates are checked, and the lab shows its own; without it nothing is answered."""
    ca, cert, key = certificates / "ca.pem", certificates / "member.pem", certificates / "member.key"
    with Cluster(tmp_path, tls=certificates) as cluster:
        with closing(EtcdGateway(parse(cluster.url, EtcdFiles(ca=ca, cert=cert, key=key)))) as gateway:
            revision = put(gateway, "a", "1")
            with gateway.watch(Watch(gateway.access.prefix, after(gateway.access.prefix), revision)) as news:
                assert until(lambda: next(news).kvs)
        for files in (EtcdFiles(ca=ca), EtcdFiles()):
            with closing(EtcdGateway(parse(cluster.url, files), total_s=0.5)) as gateway:
                with pytest.raises(UnavailableError):
                    put(gateway, "a", "2")


@pytest.mark.parametrize(
    "url", ["etcd://", "etcd:/a:1", "etcd://a", "etcd://a:x", "etcd://a:1,b", "etcd://user:x@a:1", "etcd://a:99999"]
)
def test_what_is_no_etcd_url_is_a_fault(url: str) -> None:
    """A setting that names no members is told at the start."""
    with pytest.raises(Fault):
        parse(url)


def test_prefix_of_the_url_keeps_labs_apart() -> None:
    """Without a path a lab has the usual prefix; with one, its own."""
    assert parse("etcd://a:1,b:2") == EtcdAccess(("http://a:1", "http://b:2"), "/madsci/lab/v1/")
    assert parse("etcd://a:1/other").prefix == "/other/v1/"


@pytest.mark.parametrize("files", [{"cert": "x"}, {"ca": "none"}, {"user": "lab"}, {"password_file": "none"}])
def test_half_of_a_setting_is_a_fault(tmp_path: Path, files: dict[str, str]) -> None:
    """A certificate without its authority, a user without a password, and files that are not there are told."""
    given = {key: tmp_path / value if key != "user" else value for key, value in files.items()}
    with pytest.raises(Fault):
        parse("etcd://a:1", EtcdFiles(**given))  # type: ignore[arg-type] # paths and text
