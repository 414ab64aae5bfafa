"""Which registry a client means, and when it may start a daemon: pure choices on folders made for the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from madsci_registry import InvalidError
from madsci_registry._autostart import clean_environment, command, refusal
from madsci_registry._endpoint import SYSTEM_REGISTRY, SYSTEM_RUN, Endpoint, choose
from madsci_registry.cgroups import innermost_unit


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path.resolve() / "home"
    folder.mkdir()
    return folder


def chosen(home: Path, cwd: Path, *, system: bool = False, **env: str) -> Endpoint:
    config = home.parent / "registryd.toml"
    if system:
        config.touch()
    return choose(None, None, {"HOME": str(home), **env}, cwd, system_config=config)


def folder(path: Path, *names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).touch()
    return path


def test_choose_with_arguments_takes_them_before_the_environment(home: Path) -> None:
    """A registry given as an argument is used whatever the environment says, with its sockets in run/ beside it."""
    env = {"HOME": str(home), "MADSCI_REGISTRY_SOCKET": "/x/y.sock", "MADSCI_REGISTRY_PATH": "/x/z.json"}
    endpoint = choose("lab/mine.json", None, env, home)
    assert endpoint.registry == home / "lab/mine.json"
    assert endpoint.database == home / "lab/mine.db"
    assert endpoint.socket == home / "lab/run/mine.sock"
    assert endpoint.lifeline == home / "lab/run/mine.life"
    assert "argument" in endpoint.reason


def test_choose_with_the_socket_variable_takes_it_before_the_path_variable(home: Path) -> None:
    """MADSCI_REGISTRY_SOCKET goes before MADSCI_REGISTRY_PATH and names no registry, so that none is started."""
    endpoint = chosen(home, home, MADSCI_REGISTRY_SOCKET="/x/y.sock", MADSCI_REGISTRY_PATH="/x/z.json")
    assert (endpoint.registry, endpoint.socket, endpoint.lifeline) == (None, Path("/x/y.sock"), Path("/x/y.life"))
    assert refusal(endpoint, {"MADSCI_REGISTRY_AUTOSTART": "1"}) is not None


def test_choose_with_the_path_variable_takes_it_before_folders(home: Path) -> None:
    """MADSCI_REGISTRY_PATH is a JSON path, as before; ~ is the home folder."""
    folder(home / ".madsci", "registry.db")
    assert chosen(home, home, MADSCI_REGISTRY_PATH="~/x/z.json").registry == home / "x/z.json"


@pytest.mark.parametrize("file", ["registry.db", "registry.json"])
def test_choose_with_a_registry_upwards_takes_it_before_the_system(home: Path, file: str) -> None:
    """The first .madsci folder upwards counts before the system's registry if it holds a registry."""
    folder(home / "a/.madsci", file)
    folder(home / "a/b/c/.git")
    endpoint = chosen(home, home / "a/b/c", system=True)
    assert endpoint.registry == home / "a/.madsci/registry.json"


def test_choose_with_an_empty_folder_upwards_takes_the_system_first(home: Path) -> None:
    """An empty .madsci folder counts after the system's registry, and before git root and home."""
    cwd = folder(home / "a/b")
    folder(home / "a/.madsci")
    folder(home / "a/b/.git")
    assert chosen(home, cwd, system=True).registry == SYSTEM_REGISTRY
    (home.parent / "registryd.toml").unlink()
    assert chosen(home, cwd).registry == home / "a/.madsci/registry.json"


def test_choose_with_a_git_root_upwards_takes_the_first(home: Path) -> None:
    """Without .madsci it is the one beside the first .git upwards (a file in a worktree); nothing is made."""
    cwd = folder(home / "a/b/c")
    folder(home / "a/.git")
    folder(home / "a/b", ".git")
    assert chosen(home, cwd).registry == home / "a/b/.madsci/registry.json"
    assert not (home / "a/b/.madsci").exists()


def test_choose_with_nothing_upwards_takes_the_home_folder(home: Path, tmp_path: Path) -> None:
    """Without .madsci and .git it is ~/.madsci, and the walk does not go above the home folder."""
    folder(tmp_path / ".madsci", "registry.db")
    assert chosen(home, folder(home / "a")).registry == home / ".madsci/registry.json"


def test_choose_with_settings_dir_starts_there(home: Path) -> None:
    """MADSCI_SETTINGS_DIR takes the place of the working directory."""
    folder(home / "a/.madsci")
    folder(home / "b/.madsci")
    endpoint = chosen(home, home / "b", MADSCI_SETTINGS_DIR=str(folder(home / "a/deep")))
    assert endpoint.registry == home / "a/.madsci/registry.json"


def test_choose_far_below_a_folder_goes_up_ten_levels(home: Path) -> None:
    """The walk goes up ten levels, as MADSci 0.8 does."""
    folder(home / "r/.madsci", "registry.db")
    ten = folder(home / "r/1/2/3/4/5/6/7/8/9/10")
    assert chosen(home, ten).registry == home / "r/.madsci/registry.json"
    assert chosen(home, folder(ten / "11")).registry == home / ".madsci/registry.json"


def test_choose_resolves_links_of_the_folder_but_not_of_the_file(home: Path) -> None:
    """Two ways to one folder are one registry; a link at registry.json itself is left alone."""
    folder(home / "real")
    (home / "link").symlink_to("real")
    (home / "real/registry.json").symlink_to("elsewhere.json")
    assert chosen(home, home, MADSCI_REGISTRY_PATH=f"{home}/link/registry.json").registry == home / "real/registry.json"


def test_choose_with_the_systems_path_uses_its_sockets(home: Path) -> None:
    """The system's registry as an argument means the sockets in /run/madsci, and is never started by a client."""
    endpoint = choose(SYSTEM_REGISTRY, None, {"HOME": str(home)}, home)
    assert (endpoint.is_system, endpoint.socket) == (True, SYSTEM_RUN / "registry.sock")
    assert refusal(endpoint, {"MADSCI_REGISTRY_AUTOSTART": "1"}) is not None


@pytest.mark.parametrize("bad", ["", "a\0b", "."])
def test_choose_with_what_is_no_file_is_invalid(home: Path, bad: str) -> None:
    """An empty path, a NUL and a folder are refused with the argument's name."""
    with pytest.raises(InvalidError) as caught:
        choose(bad, None, {"HOME": str(home)}, home)
    assert caught.value.field == "registry"


def test_refusal_in_an_own_folder_is_lifted_and_forced_by_the_variable(home: Path) -> None:
    """MADSCI_REGISTRY_AUTOSTART=0 forbids to start a daemon, 1 allows it wherever the registry is one's own."""
    endpoint = choose(home / "registry.json", None, {"HOME": str(home)}, home)
    assert "MADSCI_REGISTRY_AUTOSTART=0" in str(refusal(endpoint, {"MADSCI_REGISTRY_AUTOSTART": "0"}))
    assert refusal(endpoint, {"MADSCI_REGISTRY_AUTOSTART": "1"}) is None


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/node.service\n", "node.service"),
        ("0::/user.slice/user-1.slice/user@1.service/app.slice/app-x.scope\n", "app-x.scope"),
        ("0::/user.slice/user-1.slice/session-2.scope\n", "session-2.scope"),
        ("0::/user.slice/user@1.service/app.slice/node.service\n", "node.service"),
        ("9:name=systemd:/system.slice/old.service\n4:memory:/x.scope\n", "old.service"),
        ("0::/\n", None),
    ],
)
def test_innermost_unit_of_a_cgroup_is_what_would_take_a_daemon_down(cgroup: str, unit: str | None) -> None:
    """The innermost service or scope counts: a scope in user@UID.service is a person's own program."""
    assert innermost_unit(cgroup) == unit


def test_clean_environment_keeps_what_programs_need_and_nothing_that_shapes_the_daemon() -> None:
    """A started daemon gets no settings of its starter, and finds relative packages from wherever it runs."""
    env = {"PATH": "/bin", "LC_ALL": "C", "MADSCI_REGISTRYD_LOG_LEVEL": "DEBUG", "SECRET": "x", "PYTHONPATH": "client"}
    clean = clean_environment(env)
    assert (clean["PATH"], clean["LC_ALL"]) == ("/bin", "C")
    assert not {"SECRET", "MADSCI_REGISTRYD_LOG_LEVEL"} & set(clean)
    assert str(Path("client").absolute()) in clean["PYTHONPATH"].split(":")


def test_command_with_a_given_socket_passes_it_on(home: Path) -> None:
    """A daemon is told the socket only where it is not where the registry's path puts it."""
    env = {"HOME": str(home)}
    assert "--socket" not in command(choose("a.json", None, env, home))
    assert "--socket" in command(choose("a.json", "b.sock", env, home))
