"""The directory of keys: what is in it, who may read it, and what it never tells."""

from __future__ import annotations

import copy
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from zmqexecutor.keys import Keys, add_worker, default_directory
from zmqexecutor.wire.security import Access, check_address, reachable


@pytest.fixture
def made(tmp_path: Path) -> Keys:
    return Keys.create(tmp_path / "keys")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def secret(path: Path) -> str:
    return path.read_text().strip()


def files(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


# ------------------------------------------------------------------------ making


@pytest.fixture(params=[0o000, 0o022, 0o277], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_one_user_has_all_keys_whatever_the_umask(tmp_path: Path) -> None:
    if os.geteuid() != 0 and os.umask(os.umask(0o022)) & 0o200:
        pytest.skip("nothing could be written into the new directory")
    made = Keys.create(tmp_path / "keys")
    directory = made.directory
    assert files(directory) == [
        "authorized/worker.public",
        "master.public",
        "master.secret",
        "worker.secret",
    ]
    assert mode(directory) == 0o700
    assert mode(directory / "master.secret") == mode(directory / "worker.secret") == 0o600
    assert Keys.load(directory) == made
    assert made.for_master() is made.for_worker() is made


def test_keys_belong_together(made: Keys) -> None:
    master = secret(made.directory / "master.secret").encode()
    worker = secret(made.directory / "worker.secret").encode()
    assert zmq.curve_public(master) == made.master_public
    assert zmq.curve_public(worker) == made.worker_public
    assert made.worker_public is not None
    assert made.who(made.worker_public) == "worker"
    assert made.who(made.master_public) is None


def test_parents_are_made_and_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o755)
    for directory in (tmp_path / "a" / "b" / "keys", tmp_path / "there"):
        assert mode(Keys.create(directory).directory) == 0o700


@pytest.mark.parametrize("name", ["master.secret", "notes.txt"])
def test_nothing_is_overwritten(made: Keys, name: str) -> None:
    (made.directory / "notes.txt").write_text("mine")
    before = {name: (made.directory / name).read_bytes() for name in files(made.directory)}
    if name == "notes.txt":
        for other in set(before) - {name}:
            (made.directory / other).unlink()
        (made.directory / "authorized").rmdir()
        before = {name: b"mine"}
    with pytest.raises(FileExistsError, match=r"keys/[a-z.]+ exists.*never overwritten"):
        Keys.create(made.directory)
    assert {name: (made.directory / name).read_bytes() for name in files(made.directory)} == before
    assert os.listdir(made.directory.parent) == ["keys"]


def test_a_worker_of_another_host(made: Keys, tmp_path: Path) -> None:
    folder = add_worker(made.directory, "alpha.example-1")
    assert folder == made.directory / "workers" / "alpha.example-1"
    assert files(folder) == ["master.public", "worker.secret"]
    assert (mode(folder), mode(folder / "worker.secret")) == (0o700, 0o600)
    moved = Keys.load(folder.rename(tmp_path / "there"))
    assert moved.for_worker().master_public == made.master_public
    assert moved.worker_public is not None
    assert moved.worker_public != made.worker_public
    assert made.who(moved.worker_public) == "alpha.example-1"
    with pytest.raises(FileNotFoundError, match=r"a master on tcp.*there/master\.secret"):
        moved.for_master()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b", "ä", "x" * 65, "a\n"])
def test_a_name_that_is_none_for_a_file(made: Keys, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        add_worker(made.directory, name)
    assert not (made.directory / "workers").exists()


def test_a_worker_is_not_added_twice(made: Keys) -> None:
    folder = add_worker(made.directory, "alpha")
    authorized = made.directory / "authorized" / "alpha.public"
    before = authorized.read_bytes(), secret(folder / "worker.secret")
    with pytest.raises(FileExistsError, match=r"authorized/alpha\.public exists"):
        add_worker(made.directory, "alpha")
    assert before == (authorized.read_bytes(), secret(folder / "worker.secret"))
    authorized.unlink()
    with pytest.raises(FileExistsError, match=r"workers/alpha/master\.public exists"):
        add_worker(made.directory, "alpha")


def test_only_a_master_adds_workers(made: Keys) -> None:
    with pytest.raises(FileNotFoundError, match="a master"):
        add_worker(add_worker(made.directory, "alpha"), "beta")


# ----------------------------------------------------------------------- reading


@pytest.mark.parametrize("bits", [0o710, 0o750, 0o701, 0o777])
def test_a_directory_that_others_can_enter_is_refused(made: Keys, bits: int) -> None:
    made.directory.chmod(bits)
    with pytest.raises(PermissionError, match=f"run: chmod 700 {made.directory}$"):
        Keys.load(made.directory)


@pytest.mark.parametrize("name", ["master.secret", "worker.secret"])
@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620])
def test_a_secret_that_others_can_read_is_refused(made: Keys, name: str, bits: int) -> None:
    path = made.directory / name
    path.chmod(bits)
    with pytest.raises(PermissionError, match=rf"run: chmod 600 {path}$") as caught:
        Keys.load(made.directory)
    assert secret(path) not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", "master.secret"])
def test_keys_of_another_user_are_refused(made: Keys, name: str) -> None:
    os.chown(made.directory / name, 4711, 4711)
    with pytest.raises(PermissionError, match=r"belongs to another user \(uid 4711"):
        Keys.load(made.directory)


def test_there_are_no_keys(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no directory .*nowhere.*zmqexecutor keygen"):
        Keys.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir(mode=0o700)
    with pytest.raises(FileNotFoundError, match=r"empty/master\.public.*zmqexecutor keygen"):
        Keys.load(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is not a directory"):
        Keys.load(tmp_path / "file")


GOOD = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
NO_KEYS = {
    "nothing": "",
    "too short": GOOD[:-1],
    "too long": GOOD + "x",
    "another alphabet": GOOD[:-1] + "~",
    "not ASCII": GOOD[:-1] + "é",
    "beyond 32 bits": "#" * 40,
    "two": f"{GOOD}\n{GOOD}",
}


@pytest.mark.parametrize("text", NO_KEYS.values(), ids=NO_KEYS)
@pytest.mark.parametrize("name", ["master.public", "master.secret", "worker.secret"])
def test_a_file_that_is_no_key_is_named_and_not_shown(made: Keys, name: str, text: str) -> None:
    path = made.directory / name
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} is not a key") as caught:
        Keys.load(made.directory)
    assert GOOD[:10] not in str(caught.value)


def test_a_key_may_have_comments(made: Keys) -> None:
    for name in files(made.directory):
        path = made.directory / name
        path.write_text(f"# of the lab\n\n  {secret(path)} \r\n")
    assert Keys.load(made.directory) == made
    assert made.worker_public is not None
    assert made.who(made.worker_public) == "worker"


def test_the_public_key_of_another_master_is_told(made: Keys) -> None:
    (made.directory / "master.public").write_text(GOOD)
    with pytest.raises(ValueError, match=r"master\.public does not belong to"):
        Keys.load(made.directory)


def test_what_a_role_needs_is_named(made: Keys) -> None:
    (made.directory / "worker.secret").unlink()
    with pytest.raises(FileNotFoundError, match=r"a worker on tcp.*worker\.secret"):
        Keys.load(made.directory).for_worker()
    (made.directory / "authorized" / "worker.public").unlink()
    (made.directory / "authorized").rmdir()
    with pytest.raises(FileNotFoundError, match=r"a master on tcp.*authorized"):
        Keys.load(made.directory).for_master()


def test_the_authorized_are_looked_up_each_time(made: Keys) -> None:
    authorized = made.directory / "authorized"
    (authorized / "a.public").write_text("no key")
    (authorized / "b.txt").write_text(GOOD)
    (authorized / "d.public").mkdir()
    assert made.who(GOOD.encode()) is None
    (authorized / "c.public").write_text(GOOD)
    assert made.who(GOOD.encode()) == "c"
    (authorized / "c.public").unlink()
    assert made.who(GOOD.encode()) is None


# ----------------------------------------------------------------------- secrets


def test_secrets_are_neither_shown_nor_pickled(made: Keys) -> None:
    secrets = [secret(made.directory / f"{name}.secret") for name in ("master", "worker")]
    shown = f"{made!r} {made} {Access(made)!r}"
    assert made.master_public.decode() in shown
    assert not any(text in shown for text in secrets)
    for copied in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="name of their directory"):
            copied(made)


# ------------------------------------------------------------ the default directory


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("ZMQEXECUTOR_KEYS", raising=False)
    return tmp_path


def test_the_default_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_directory() == home / ".config" / "zmqexecutor" / "keys"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert default_directory() == home / ".config" / "zmqexecutor" / "keys"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "xdg"))
    assert default_directory() == home / "xdg" / "zmqexecutor" / "keys"
    monkeypatch.setenv("ZMQEXECUTOR_KEYS", str(home / "mine"))
    assert default_directory() == home / "mine"
    monkeypatch.setenv("ZMQEXECUTOR_KEYS", "")
    assert default_directory() is None


def test_default_keys_are_those_that_exist(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Keys.load_default() is None
    made = Keys.create()
    assert made.directory == home / ".config" / "zmqexecutor" / "keys"
    assert Keys.load() == Keys.load_default() == made
    monkeypatch.setenv("ZMQEXECUTOR_KEYS", "")
    assert Keys.load_default() is None
    with pytest.raises(ValueError, match="ZMQEXECUTOR_KEYS is set to nothing"):
        Keys.create()
    monkeypatch.setenv("ZMQEXECUTOR_KEYS", str(home / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Keys.load_default()


# ------------------------------------------------------------------------ policy

LOOPBACK = "tcp://127.0.0.1:5555"
ELSEWHERE = ["tcp://0.0.0.0:5555", "tcp://[::]:5555", "tcp://192.0.2.1:1", "tcp://eth0:5555",
             "tcp://example.org:5555", "tcp://[fe80::1%eth0]:5555"]  # fmt: skip


@pytest.mark.parametrize("endpoint", ELSEWHERE)
@pytest.mark.usefixtures("home")
def test_other_hosts_need_keys_or_the_users_word(endpoint: str, made: Keys) -> None:
    with pytest.raises(ValueError, match=r"keygen` and pass keys=.*allow_plaintext_tcp"):
        Access.decide(endpoint, "master", None)
    assert Access.decide(endpoint, "master", made) == Access(made)
    assert Access.decide(endpoint, "worker", str(made.directory)) == Access(made)
    assert Access.decide(endpoint, "worker", None, allow_plaintext_tcp_from_anyone=True) == Access(
        anyone=True
    )


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://*:5555", "tcp://:5555", "tcp://1.2.3.4:0;5.6.7.8:5", "tcp://a b:5", "tcp://[x]:5"],
)
def test_addresses_that_keys_do_not_help(endpoint: str, made: Keys) -> None:
    with pytest.raises(ValueError, match=r"write tcp://0\.0\.0\.0:5555|with one host"):
        Access.decide(endpoint, "master", made)


@pytest.mark.usefixtures("home")
def test_the_loopback_interface_needs_no_keys_and_uses_those_there_are() -> None:
    assert Access.decide(LOOPBACK, "master", None) == Access()
    with pytest.raises(ValueError, match="open to other users and hosts"):
        Access.decide(LOOPBACK, "master", None, allow_plaintext_loopback=False)
    made = Keys.create()
    assert Access.decide(LOOPBACK, "master", None) == Access(made)
    assert Access.decide(LOOPBACK, "worker", None, allow_plaintext_loopback=False) == Access(made)


def test_keys_that_are_no_use_are_refused_early(made: Keys) -> None:
    worker = add_worker(made.directory, "alpha")
    with pytest.raises(FileNotFoundError, match="a master"):
        Access.decide(LOOPBACK, "master", worker)
    with pytest.raises(ValueError, match="contradict"):
        Access.decide(LOOPBACK, "worker", worker, allow_plaintext_tcp_from_anyone=True)
    made.directory.chmod(0o755)
    with pytest.raises(PermissionError, match="chmod 700"):
        Access.decide(LOOPBACK, "master", made.directory)
    assert Access.decide("ipc:///x", "master", made.directory) == Access(), "not needed there"


def test_workpoints(made: Keys) -> None:
    for access in (Access(made), Access(anyone=True)):
        assert access.check_workpoint("tcp://192.0.2.1:5") == "tcp://192.0.2.1:5"
        for address in ("tcp://0.0.0.0:5", "tcp://[::]:5"):
            with pytest.raises(ValueError, match="at which the master reaches this worker"):
                access.check_workpoint(address)
    with pytest.raises(ValueError, match="other hosts"):
        Access().check_workpoint("tcp://192.0.2.1:5")
    assert Access().check_workpoint("ipc:///x") == "ipc:///x"


def test_all_interfaces_are_reached_where_the_endpoint_is() -> None:
    assert reachable("tcp://0.0.0.0:7", "tcp://example.org:5") == "tcp://example.org:7"
    assert reachable("tcp://[::]:7", "tcp://[fe80::1]:5") == "tcp://[fe80::1]:7"
    assert reachable("tcp://192.0.2.1:7", "tcp://example.org:5") == "tcp://192.0.2.1:7"
    assert reachable("ipc:///x.work", "ipc:///x") == "ipc:///x.work"


def test_without_keys_an_address_is_checked_as_ever() -> None:
    assert check_address(LOOPBACK, "endpoint") == LOOPBACK
    with pytest.raises(ValueError, match="other hosts"):
        check_address("tcp://192.0.2.1:5", "endpoint")
