"""registry.json on the disk: its lock with old programs, and that it is never torn, followed or lost. Real files."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import FakeClock, environment
from madsci_registryd.registry_file import FileFault, LockTimeout, RegistryFile

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can give files away")
STRANGER = 4321
CONTENT = b'{"entries": {}}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of ours, mode 0755 whatever the umask is."""
    path = tmp_path / "lab"
    path.mkdir()
    path.chmod(0o755)
    return path


@pytest.fixture
def file(folder: Path) -> Iterator[RegistryFile]:
    file = RegistryFile(folder / "registry.json")
    yield file
    file.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def child(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python program that says a line when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


# What old programs do: flock, without waiting, on a file that they make with O_CREAT.
OLD_PROGRAM = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("ready", flush=True)
sys.stdin.read()
"""


def test_write_and_read_give_the_same_bytes_and_stamp(file: RegistryFile, folder: Path) -> None:
    """What was written in parts is read as one; the stamp tells that nothing changed since."""
    assert file.stamp() is None and file.read() is None
    stamp = file.write([b"a", b"", b"b" * (3 << 20), b"c"])
    found = file.read()
    assert found is not None
    content, read_stamp, owner = found
    assert content == b"a" + b"b" * (3 << 20) + b"c" and stamp == read_stamp == file.stamp()
    assert (owner.uid, owner.mode) == (os.geteuid(), 0o644)
    assert os.listdir(folder) == ["registry.json"]  # noqa: PTH208


def test_change_in_place_of_the_same_length_changes_the_stamp(
    file: RegistryFile, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old program that writes as many bytes in place, in the same tick of the kernel's clock, is noticed: the time
    of our file is one that the kernel has not given."""
    utime, times = os.utime, []

    def noted(fd: int, ns: tuple[int, int]) -> None:
        times.append((os.fstat(fd).st_mtime_ns, ns[1]))
        utime(fd, ns=ns)

    monkeypatch.setattr(os, "utime", noted)
    while not times or times[-1][0] == times[-1][1]:  # once in 65,536 times nothing is taken off
        stamp = file.write([CONTENT])
    assert stamp.mtime_ns == times[-1][1] < times[-1][0]
    for _ in range(50):
        stamp = file.write([CONTENT])
        with (folder / "registry.json").open("r+b") as old:
            old.write(CONTENT.upper())
        assert file.stamp() != stamp


@pytest.mark.parametrize("kind", ["symlink", "dangling", "FIFO", "folder", "socket"])
def test_what_is_no_file_is_never_followed(file: RegistryFile, folder: Path, kind: str) -> None:
    """A symlink, FIFO, folder or socket in the file's place is a lasting fault for every verb, and is left as it is."""
    path, target = folder / "registry.json", folder / "target"
    listener = socket.socket(socket.AF_UNIX)
    if kind == "symlink":
        target.write_bytes(CONTENT)
        path.symlink_to(target)
    elif kind == "dangling":
        path.symlink_to(target)
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        listener.bind(str(path))
    before = path.lstat()
    verbs: list[Callable[[], object]] = [file.stamp, file.read, lambda: file.write([b"x"])]
    for verb in verbs:
        with pytest.raises(FileFault, match="left alone") as fault:
            verb()
        assert fault.value.lasting
    assert path.lstat().st_ino == before.st_ino and path.lstat().st_mtime_ns == before.st_mtime_ns
    assert not target.exists() or target.read_bytes() == CONTENT
    listener.close()


@pytest.mark.parametrize("kind", ["symlink", "FIFO", "folder", "socket"])
def test_lock_that_is_no_file_is_never_followed(file: RegistryFile, folder: Path, kind: str) -> None:
    """A symlink, FIFO, folder or socket in the place of the lock file is a lasting fault, at once."""
    path, target = folder / "registry.json.lock", folder / "target"
    listener = socket.socket(socket.AF_UNIX)
    if kind == "symlink":
        path.symlink_to(target)
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        listener.bind(str(path))
    with pytest.raises(FileFault) as fault, file.locked(5):
        pass
    assert fault.value.lasting and not target.exists()
    listener.close()


def test_symlink_that_comes_after_the_look_is_not_followed(
    file: RegistryFile, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that is put in the file's place just before it is opened is not followed."""
    (folder / "target").write_bytes(CONTENT)
    (folder / "registry.json").symlink_to(folder / "target")
    monkeypatch.setattr(file, "stamp", object)
    with pytest.raises(FileFault, match="symbolic link"):
        file.read()


@AS_ROOT
def test_strangers_file_is_left_alone(file: RegistryFile, folder: Path) -> None:
    """A file that belongs neither to us nor to the folder's owner is a lasting fault, and stays as it is."""
    path = folder / "registry.json"
    path.write_bytes(CONTENT)
    os.chown(path, STRANGER, STRANGER)
    for verb in (file.stamp, file.read, lambda: file.write([b"x"])):
        with pytest.raises(FileFault, match=f"uid {STRANGER}") as fault:
            verb()
        assert fault.value.lasting
    assert path.read_bytes() == CONTENT


@AS_ROOT
def test_root_keeps_owner_group_and_mode(file: RegistryFile, folder: Path) -> None:
    """Written by root in somebody's folder, file and lock are that somebody's; a file that is there keeps its own."""
    os.chown(folder, STRANGER, STRANGER + 1)
    file.write([CONTENT])
    with file.locked(1):
        pass
    for path in (folder / "registry.json", folder / "registry.json.lock"):
        assert (path.stat().st_uid, path.stat().st_gid) == (STRANGER, STRANGER + 1)
    os.chown(folder / "registry.json", STRANGER, STRANGER + 2)
    (folder / "registry.json").chmod(0o640)
    file.write([CONTENT])
    found = (folder / "registry.json").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (STRANGER, STRANGER + 2, 0o640)


AS_SOMEBODY = """
import os, sys
from pathlib import Path
from madsci_registryd.registry_file import RegistryFile, FileFault
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
file = RegistryFile(Path(sys.argv[1]))
try:
    file.write([b"new"])
except FileFault as fault:
    print(fault.lasting, fault)
"""


@AS_ROOT
def test_owner_that_cannot_be_kept_is_a_lasting_fault() -> None:
    """Who may not give files away does not replace another's file, not even the folder owner's; it stays as it is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "registry.json").write_bytes(CONTENT)
        command = [sys.executable, "-c", AS_SOMEBODY, str(folder / "registry.json"), str(STRANGER)]
        said = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True).stdout
        assert said.startswith("True ") and "cannot keep the owner" in said
        assert (folder / "registry.json").read_bytes() == CONTENT
        assert os.listdir(folder) == ["registry.json"]  # noqa: PTH208


def test_hard_link_keeps_the_old_content(file: RegistryFile, folder: Path) -> None:
    """Another name of the same file is never written through: it keeps what it had."""
    (folder / "registry.json").write_bytes(CONTENT)
    (folder / "other").hardlink_to(folder / "registry.json")
    file.write([b"new"])
    assert (folder / "other").read_bytes() == CONTENT and (folder / "registry.json").read_bytes() == b"new"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize(
    ("of_folder", "of_file", "of_lock"),
    [(0o700, 0o600, 0o600), (0o755, 0o644, 0o644), (0o770, 0o660, 0o660), (0o775, 0o664, 0o664), (0o777, 0o664, 0o666)],
)
def test_modes_follow_the_folder(folder: Path, umask: int, of_folder: int, of_file: int, of_lock: int) -> None:
    """Whatever the umask, who may use the folder may use the lock file, and a new file is no wider than the folder."""
    folder.chmod(of_folder)
    before = os.umask(umask)
    try:
        file = RegistryFile(folder / "registry.json")
        file.write([CONTENT])
        with file.locked(1):
            pass
    finally:
        os.umask(before)
    assert (mode(folder / "registry.json"), mode(folder / "registry.json.lock")) == (of_file, of_lock)
    (folder / "registry.json").chmod(0o640)
    (folder / "registry.json.lock").chmod(0o600)
    file.write([CONTENT])
    with file.locked(1):
        pass
    assert mode(folder / "registry.json") == 0o640, "a file that is there keeps its mode"
    assert mode(folder / "registry.json.lock") == of_lock, "a lock file of ours that is too narrow is widened"
    file.close()


@AS_ROOT
def test_new_file_in_a_group_folder_has_the_folders_group(file: RegistryFile, folder: Path) -> None:
    """In a folder that a group may write, file and lock are the group's, made new or repaired."""
    os.chown(folder, 0, STRANGER)
    folder.chmod(0o2775)
    (folder / "registry.json.lock").touch()
    os.chown(folder / "registry.json.lock", 0, 0)
    file.write([CONTENT])
    with file.locked(1):
        pass
    for path in (folder / "registry.json", folder / "registry.json.lock"):
        assert (path.stat().st_gid, mode(path)) == (STRANGER, 0o664)


def test_lock_of_an_old_program_keeps_us_out_until_it_ends(file: RegistryFile, folder: Path) -> None:
    """While an old program has the file's lock, ours times out; it is ours as soon as that program is dead."""
    old = child(OLD_PROGRAM, folder / "registry.json.lock")
    try:
        with pytest.raises(LockTimeout), file.locked(0.1):
            pass
        threading.Timer(0.1, old.kill).start()
        with file.locked(20):
            assert old.wait() == -signal.SIGKILL
    finally:
        end(old)


def test_our_lock_keeps_an_old_program_out(file: RegistryFile, folder: Path) -> None:
    """While we have the file's lock an old program does not get it, and it does as soon as we are done."""
    path = folder / "registry.json.lock"
    with file.locked(1), path.open("r+") as old:
        with pytest.raises(BlockingIOError):
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open("r+") as old:
        fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_lock_is_given_back_though_a_forked_child_has_it_too(file: RegistryFile, folder: Path) -> None:
    """A child that was forked while the lock was held does not keep it."""
    with file.locked(1):
        pid = os.fork()
        if not pid:
            time.sleep(30)
            os._exit(0)
    try:
        other = RegistryFile(folder / "registry.json")
        with other.locked(1):
            pass
        other.close()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_lock_file_that_was_removed_meanwhile_locks_nothing(file: RegistryFile, folder: Path) -> None:
    """Where the lock file was removed and made anew, the new one counts, not the one that nobody else sees."""
    path = folder / "registry.json.lock"
    old = child(OLD_PROGRAM, path)
    path.unlink()
    newer = child(OLD_PROGRAM, path)
    end(old)  # the lock of the removed file is free now
    try:
        with pytest.raises(LockTimeout), file.locked(0.2):
            pass
    finally:
        end(newer)


def test_lock_got_on_a_removed_file_is_given_up(
    file: RegistryFile, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that was got on a file which lost its name just before is not taken for the lock."""
    path, opened = folder / "registry.json.lock", []
    open_lock = file._open_lock

    def open_and_lose() -> int | None:
        fd = open_lock()
        opened.append(fd)
        if len(opened) == 1:
            path.unlink()
        return fd

    monkeypatch.setattr(file, "_open_lock", open_and_lose)
    with file.locked(5):
        with path.open("r+") as old, pytest.raises(BlockingIOError):
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len([fd for fd in opened if fd is not None]) == 2


WRITES_FOR_EVER = """
import json, sys
from pathlib import Path
from madsci_registryd.registry_file import RegistryFile
file = RegistryFile(Path(sys.argv[1]))
print("ready", flush=True)
n = 0
while True:
    n += 1
    file.write([b"[", json.dumps([n] * 20000).encode(), b"]"])
"""


def test_reader_without_a_lock_sees_whole_files_only_whoever_is_killed(file: RegistryFile, folder: Path) -> None:
    """A reader in a loop, without any lock, sees whole files only, while writers are killed; sweep removes the rest."""
    path = folder / "registry.json"
    file.write([b"[]"])
    broken: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            content = path.read_bytes()
            try:
                json.loads(content)
            except ValueError:
                broken.append(content)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for n in range(12):
            writer = child(WRITES_FOR_EVER, path)
            time.sleep(0.01 + n * 0.003)
            end(writer)
            assert file.sweep() in (0, 1) and not list(folder.glob("*.tmp"))
    finally:
        done.set()
        reader.join()
    assert not broken and len(json.loads(path.read_bytes())[0]) == 20000


STOPS_IN_A_WRITE = """
import sys
from pathlib import Path
from madsci_registryd.registry_file import RegistryFile
def parts():
    yield b"x" * (3 << 20)
    print("ready", flush=True)
    sys.stdin.read()
RegistryFile(Path(sys.argv[1])).write(parts())
"""


def test_writer_killed_in_the_middle_leaves_the_old_file(file: RegistryFile, folder: Path) -> None:
    """SIGKILL in the middle of a write leaves the old file as it was, and one temporary file, which sweep removes."""
    stamp = file.write([CONTENT])
    end(child(STOPS_IN_A_WRITE, folder / "registry.json"))
    assert file.stamp() == stamp and (folder / "registry.json").read_bytes() == CONTENT
    assert len(list(folder.glob("registry.json.*.tmp"))) == 1
    assert file.sweep() == 1 and [path.name for path in folder.iterdir()] == ["registry.json"]


def test_sweep_removes_what_writes_leave_and_nothing_else(file: RegistryFile, folder: Path) -> None:
    """Sweep removes temporary files of this registry; other files, other registries' and folders stay."""
    (folder / "registry.json.0123456789ab.tmp").touch()
    others = ["registry.json.0123456789ab.tmp.bak", "registry.json.tmp", "other.json.0123456789ab.tmp", "registry.json"]
    for name in others:
        (folder / name).touch()
    (folder / "registry.json.0123456789ac.tmp").mkdir()
    (folder / "registry.json.0123456789ad.tmp").symlink_to(folder / "registry.json")
    assert file.sweep() == 1
    assert {path.name for path in folder.iterdir()} == {
        *others, "registry.json.0123456789ac.tmp", "registry.json.0123456789ad.tmp",
    }  # fmt: skip


def test_put_aside_gives_a_dated_name_and_overwrites_nothing(folder: Path) -> None:
    """Broken content is kept under a name with the date, a number where that is taken; the file stays at its place."""
    file = RegistryFile(folder / "registry.json", FakeClock(wall=1_795_525_200.0))
    file.write([b"present"])
    names = [file.put_aside(content) for content in (b"one", b"two", b"three")]
    dated = "registry.json.broken-2026-11-24T130000Z"
    assert names == [dated, f"{dated}-2", f"{dated}-3"]
    assert [(folder / name).read_bytes() for name in names] == [b"one", b"two", b"three"]
    assert (folder / "registry.json").read_bytes() == b"present"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "registry.json"])
    file.close()


def test_file_above_the_limit_is_not_read(file: RegistryFile) -> None:
    """A file that is longer than what is allowed is a fault, and not taken into memory."""
    file.write([b"x" * 101])
    with pytest.raises(FileFault, match="more than 100 bytes"):
        file.read(100)
    assert file.read(101) is not None


def test_short_writes_are_gone_on_with(file: RegistryFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel takes a few bytes at a time, all of them are written."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: write(fd, content[:7]))
    file.write([b"0123456789" * 10])
    found = file.read()
    assert found is not None and found[0] == b"0123456789" * 10


@pytest.mark.parametrize(
    ("number", "lasting"),
    [(errno.ENOSPC, False), (errno.EDQUOT, False), (errno.EIO, False), (errno.EROFS, True), (errno.EACCES, True)],
)
@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_failed_write_leaves_the_old_file_and_nothing_else(
    file: RegistryFile, folder: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, lasting: bool
) -> None:
    """A write that fails at any step is told as passing or lasting; the old file stays, no temporary one is left."""
    file.write([CONTENT])

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(FileFault) as fault:
        file.write([b"new"])
    assert fault.value.lasting is lasting and os.strerror(number) in str(fault.value)
    assert [path.name for path in folder.iterdir()] == ["registry.json"]
    assert (folder / "registry.json").read_bytes() == CONTENT


@AS_ROOT
def test_full_disk_is_a_passing_fault() -> None:
    """On a full disk a write is a passing fault, the old file stays; with room again the next one succeeds."""
    folder = Path(tempfile.mkdtemp())
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        folder.rmdir()
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        file = RegistryFile(folder / "registry.json")
        file.write([CONTENT])
        (folder / "ballast").write_bytes(b"x" * 900_000)
        with pytest.raises(FileFault) as fault:
            file.write([b"y" * 400_000])
        assert not fault.value.lasting
        assert (folder / "registry.json").read_bytes() == CONTENT and not list(folder.glob("*.tmp"))
        (folder / "ballast").unlink()
        file.write([b"y" * 400_000])
        file.close()
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def test_folder_that_is_gone_is_a_lasting_fault(file: RegistryFile, folder: Path) -> None:
    """In a folder that was removed nothing is made; without a folder there is nothing to open."""
    folder.rmdir()
    verbs: list[Callable[[], object]] = [file.read, lambda: file.write([b"x"]), lambda: file.locked(1).__enter__()]
    for verb in verbs:
        with pytest.raises(FileFault) as fault:
            verb()
        assert fault.value.lasting
    with pytest.raises(FileFault):
        RegistryFile(folder / "registry.json")


def test_descriptors_are_given_back(file: RegistryFile, folder: Path) -> None:
    """However often the file is locked, read, written and found wanting, no descriptor stays open."""
    file.write([CONTENT])

    def use() -> None:
        with file.locked(1):
            file.read()
            file.write([CONTENT])
        other = RegistryFile(folder / "registry.json")
        with other.locked(1), pytest.raises(LockTimeout), file.locked(0.01):
            pass
        other.close()
        with pytest.raises(FileFault):
            file.read(1)

    use()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        use()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
