"""Private directories, permitted addresses, and sockets that only the user can reach."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from zmqexecutor.system import directories
from zmqexecutor.system.descriptors import check_descriptors
from zmqexecutor.system.directories import IPC_PATH_LIMIT, PrivateDirectory
from zmqexecutor.wire import security
from zmqexecutor.wire.security import bind, check_address

from .conftest import eventually

Make = Callable[..., zmq.Socket[bytes]]

MAKE_ONE = """
import sys
from zmqexecutor.system import directories
directories._bases = lambda: iter(sys.argv[1:])
directory = directories.PrivateDirectory()
print(directory.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for that of a socket, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        yield Path(made)


@pytest.fixture
def base(short: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place for private directories during a test."""
    made = short / "base"
    made.mkdir()
    monkeypatch.setattr(directories, "_bases", lambda: iter([str(made)]))
    return made


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.fixture
def make() -> Iterator[Make]:
    """`security.socket`, with a context of the test's own."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = []

    def make_socket(kind: int = zmq.ROUTER, address: str = "ipc://x") -> zmq.Socket[bytes]:
        made.append(security.socket(context, kind, address))
        return made[-1]

    yield make_socket
    for one in made:
        one.close()
    context.term()


def mode(path: str | Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def root_of(base: Path) -> Path:
    return base / f"zmqexecutor-{os.geteuid()}"


class Owner:
    """Another process that has made a private directory."""

    def __init__(self, base: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAKE_ONE, str(base)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.path = Path(self.process.stdout.readline().strip())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=60)


@pytest.fixture
def owner(base: Path) -> Iterator[Owner]:
    made = Owner(base)
    yield made
    made.kill()


# -------------------------------------------------------------- private directories


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_only_the_user_can_enter_whatever_the_umask(
    base: Path, umask: Callable[[int], int], mask: int
) -> None:
    umask(mask)
    directory = PrivateDirectory()
    assert mode(directory.path) == 0o700
    assert mode(root_of(base)) == 0o700
    assert mode(Path(directory.path, "lock")) == 0o600
    directory.close()


def test_close_removes_the_directory_and_all_in_it(base: Path) -> None:
    directory = PrivateDirectory()
    Path(directory.path, "sub").mkdir()
    Path(directory.path, "sub", "file").write_text("x")
    directory.close()
    assert not os.path.exists(directory.path)
    directory.close()  # once more does no harm


def test_the_real_places_leave_room_for_a_socket() -> None:
    directory = PrivateDirectory()
    assert len(os.fsencode(os.path.join(directory.path, "x" * 20))) <= IPC_PATH_LIMIT
    directory.close()


def test_two_directories_of_one_process_do_not_sweep_each_other(base: Path) -> None:
    first, second = PrivateDirectory(), PrivateDirectory()
    assert first.path != second.path
    PrivateDirectory().close()
    assert os.path.isdir(first.path)
    assert os.path.isdir(second.path)
    first.close()
    assert os.path.isdir(second.path)
    second.close()


def test_the_next_start_sweeps_what_a_killed_process_left(base: Path, owner: Owner) -> None:
    owner.kill()
    assert owner.path.is_dir()
    directory = PrivateDirectory()
    assert not owner.path.exists()
    assert os.listdir(root_of(base)) == [os.path.basename(directory.path)]
    directory.close()


def test_the_directory_of_a_living_process_is_left_alone(base: Path, owner: Owner) -> None:
    for _ in range(2):
        PrivateDirectory().close()
        assert (owner.path / "lock").exists()


def test_another_process_leaves_our_directory_alone(base: Path) -> None:
    directory = PrivateDirectory()
    for _ in range(2):  # the first must not release our lock either
        Owner(base).kill()
        assert os.path.exists(os.path.join(directory.path, "lock"))
    directory.close()


def test_a_directory_that_is_just_being_made_is_left_alone(base: Path) -> None:
    PrivateDirectory().close()
    unlocked = root_of(base) / "4711-new"
    unlocked.mkdir()
    PrivateDirectory().close()
    assert unlocked.is_dir()


def test_it_is_left_alone_whatever_the_clock_says_here(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PrivateDirectory().close()
    unlocked = root_of(base) / "4711-new"
    unlocked.mkdir()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1_000_000)
    PrivateDirectory().close()
    assert unlocked.is_dir()


def test_what_was_never_locked_is_swept_when_it_is_old(base: Path) -> None:
    PrivateDirectory().close()
    unlocked = root_of(base) / "4711-dead"
    unlocked.mkdir()
    (unlocked / "lock.new").touch()
    old = time.time() - directories.UNLOCKED_FOR - 1
    os.utime(unlocked, (old, old))
    PrivateDirectory().close()
    assert os.listdir(root_of(base)) == []


def test_an_old_one_is_left_alone_whose_lock_cannot_be_opened(
    base: Path, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That no descriptor was left says nothing of its owner."""
    old = time.time() - directories.UNLOCKED_FOR - 1
    os.utime(owner.path, (old, old))
    open_ = os.open

    def refuse(path: str, *rest: Any, **more: Any) -> int:
        if path == str(owner.path / "lock"):
            raise OSError(errno.ENFILE, "too many open files", path)
        return open_(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    PrivateDirectory().close()
    monkeypatch.undo()
    assert (owner.path / "lock").exists()


@pytest.mark.parametrize("end", ["pass", "raise KeyboardInterrupt", "del directory; input()"])
def test_it_is_removed_without_a_close(base: Path, end: str) -> None:
    code = f"""
import sys
from zmqexecutor.system import directories
directories._bases = lambda: iter(sys.argv[1:])
directory = directories.PrivateDirectory()
{end}
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(base)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        if "input" in end:  # it lives on
            assert eventually(lambda: root_of(base).is_dir())
            assert eventually(lambda: os.listdir(root_of(base)) == [])
        process.communicate(timeout=60)
    assert os.listdir(root_of(base)) == []


def test_a_forked_child_removes_nothing_of_its_parents(base: Path) -> None:
    code = """
import os, sys
from zmqexecutor.system import directories
directories._bases = lambda: iter(sys.argv[1:])
directory = directories.PrivateDirectory()
child = os.fork()
if not child:
    directory.close()
    directories.PrivateDirectory().close()
    os._exit(0)
os.waitpid(child, 0)
print(os.path.exists(os.path.join(directory.path, "lock")), flush=True)
directory.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(base)], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_forked_child_that_lives_on_does_not_keep_its_parents_directory(base: Path) -> None:
    code = """
import os, sys
from zmqexecutor.system import directories
directories._bases = lambda: iter(sys.argv[1:])
directory = directories.PrivateDirectory()
print(directory.path, flush=True)
if os.fork():
    os.kill(os.getpid(), 9)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(base)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    path = parent.stdout.readline().strip()
    assert parent.wait(60) == -signal.SIGKILL
    assert os.path.isdir(path)
    PrivateDirectory().close()
    assert not os.path.exists(path)
    parent.communicate(timeout=60)  # the child ends with its input


def test_an_unusable_place_is_passed_over(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = short / "blocked"
    blocked.write_text("not a directory")
    missing = short / "missing"
    good = short / "good"
    good.mkdir()
    monkeypatch.setattr(
        directories, "_bases", lambda: iter([str(blocked), str(missing), str(good), "/never"])
    )
    directory = PrivateDirectory()
    assert Path(directory.path).parent == root_of(good)
    directory.close()


def test_a_place_without_room_for_the_directory_is_passed_over(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, good = short / "full", short / "good"
    full.mkdir()
    good.mkdir()
    monkeypatch.setattr(directories, "_bases", lambda: iter([str(full), str(good)]))
    mkdtemp = tempfile.mkdtemp

    def mkdtemp_or_full(prefix: str, **where: str) -> str:
        if where["dir"].startswith(str(full)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return mkdtemp(prefix=prefix, **where)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp_or_full)
    directory = PrivateDirectory()
    assert Path(directory.path).parent == root_of(good)
    directory.close()


def test_without_any_place_the_error_names_those_tried(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [str(short / "one"), str(short / "two")]
    monkeypatch.setattr(directories, "_bases", lambda: iter(places))
    with pytest.raises(OSError, match=r"set TMPDIR.*one.*two"):
        PrivateDirectory()


def test_a_root_that_is_a_link_is_refused(base: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    root_of(base).symlink_to(tmp_path)
    with pytest.raises(OSError, match="not a directory of this user"):
        PrivateDirectory()
    assert os.listdir(tmp_path) == []


def test_a_root_that_is_a_file_is_refused(base: Path) -> None:
    root_of(base).write_text("x")
    with pytest.raises(OSError, match="not a directory of this user"):
        PrivateDirectory()


@pytest.mark.parametrize("extra", [0o010, 0o001, 0o070, 0o007, 0o004])
def test_a_root_open_to_others_is_refused(base: Path, extra: int) -> None:
    root_of(base).mkdir()
    root_of(base).chmod(0o700 | extra)
    with pytest.raises(OSError, match="open to others"):
        PrivateDirectory()
    assert os.listdir(root_of(base)) == []


def test_a_root_of_another_user_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(OSError, match="not a directory of this user"):
        PrivateDirectory()


def test_a_temporary_directory_too_long_for_sockets_is_passed_over(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = short / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(directories, "_bases", lambda: iter([str(long), str(short)]))
    directory = PrivateDirectory()
    assert Path(directory.path).parent == root_of(short)
    directory.close()
    assert os.listdir(long) == []


def test_memory_comes_first_and_tmp_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/4711")
    bases = list(directories._bases())
    assert bases[0] == "/dev/shm"
    assert bases[1] == "/run/user/4711"
    assert bases[-1] == "/tmp"


def test_the_lock_is_not_inherited_by_programs_that_are_started(base: Path) -> None:
    directory = PrivateDirectory()
    assert fcntl.fcntl(directory._lock, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    directory.close()


# ------------------------------------------------------------------- addresses

LONGEST = "ipc:///" + "x" * (IPC_PATH_LIMIT - 1)


@pytest.mark.parametrize(
    "address",
    [
        "ipc:///tmp/master.ipc",
        "ipc://relative.ipc",
        LONGEST,
        "tcp://127.0.0.1:5555",
        "tcp://127.8.9.1:1",
        "tcp://localhost:65535",
        "tcp://[::1]:5555",
    ],
)
def test_local_addresses_are_permitted(address: str) -> None:
    assert check_address(address, "endpoint") == address


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("", "expected ipc"),
        ("ipc://", "expected ipc"),
        ("ipc:/tmp/x", "expected ipc"),
        ("/tmp/x", "expected ipc"),
        ("inproc://x", "expected ipc"),
        ("udp://127.0.0.1:5555", "expected ipc"),
        ("IPC:///tmp/x", "expected ipc"),
        ("tcp://127.0.0.1", "expected tcp://host:port"),
        ("tcp://127.0.0.1:", "expected tcp://host:port"),
        ("tcp://127.0.0.1:0", "expected tcp://host:port"),
        ("tcp://127.0.0.1:65536", "expected tcp://host:port"),
        ("tcp://127.0.0.1:-1", "expected tcp://host:port"),
        ("tcp://127.0.0.1:*", "expected tcp://host:port"),
        ("tcp://127.0.0.1:http", "expected tcp://host:port"),
        ("tcp://127.0.0.1:\N{SUPERSCRIPT TWO}", "expected tcp://host:port"),
        ("tcp://127.0.0.1:\N{ARABIC-INDIC DIGIT FIVE}", "expected tcp://host:port"),
        ("tcp://*:5555", "open to other hosts"),
        ("tcp://:5555", "with one host"),
        ("tcp://0.0.0.0:5555", "open to other hosts"),
        ("tcp://[::]:5555", "open to other hosts"),
        ("tcp://192.168.1.2:5555", "open to other hosts"),
        ("tcp://eth0:5555", "open to other hosts"),
        ("tcp://example.org:5555", "open to other hosts"),
        ("tcp://localhost.example.org:5555", "open to other hosts"),
        ("tcp://127.0.0.1:0;192.168.1.2:5555", "with one host"),
        ("ipc://*", "endpoint"),
    ],
)
def test_other_addresses_are_refused_with_the_reason(address: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        check_address(address, "endpoint")
    assert "endpoint" in str(caught.value)


def test_an_abstract_socket_is_refused_as_any_user_could_connect() -> None:
    with pytest.raises(ValueError, match="endpoint"):
        check_address("ipc://@name", "endpoint")


def test_a_path_too_long_for_a_socket_is_refused_in_bytes() -> None:
    with pytest.raises(ValueError, match="more than 107 bytes"):
        check_address(LONGEST + "x", "workpoint")
    with pytest.raises(ValueError, match="more than 107 bytes"):
        check_address("ipc:///" + "\N{LATIN SMALL LETTER E WITH ACUTE}" * 54, "workpoint")


@pytest.mark.parametrize("address", [None, 5555, b"ipc:///tmp/x", Path("/tmp/x")])
def test_an_address_must_be_text(address: object) -> None:
    with pytest.raises(TypeError, match="endpoint must be text"):
        check_address(address, "endpoint")  # type: ignore[arg-type]


# ------------------------------------------------------------------------ bind


def hears(server: zmq.Socket[bytes], client: zmq.Socket[bytes], address: str) -> bool:
    """Whether a client that connects to this address reaches this server."""
    client.connect(address)
    client.send(b"hello")
    return server.poll(10_000) == zmq.POLLIN


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_only_the_user_can_connect_to_a_local_socket(
    make: Make, short: Path, umask: Callable[[int], int], mask: int
) -> None:
    umask(mask)
    path = short / "s"
    assert bind(make(), f"ipc://{path}") == f"ipc://{path}"
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    assert mode(path) == 0o600


def test_nobody_can_connect_before_the_mode_is_set(
    make: Make, short: Path, umask: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    umask(0)
    chmod = os.chmod
    probed = []

    def probe_and_chmod(path: str, mode: int) -> None:
        with socket.socket(socket.AF_UNIX) as probe:
            probed.append(probe.connect_ex(path))
        chmod(path, mode)

    monkeypatch.setattr(os, "chmod", probe_and_chmod)
    address = f"ipc://{short / 's'}"
    made = make()
    bind(made, address)
    assert probed == [errno.ECONNREFUSED]
    assert hears(made, make(zmq.DEALER), address)


def test_a_socket_bound_to_a_path_can_be_bound_and_connected_elsewhere(
    make: Make, short: Path
) -> None:
    made, other = make(), make(zmq.DEALER)
    bind(made, f"ipc://{short / 's'}")
    assert hears(made, make(zmq.DEALER), bind(made, "tcp://127.0.0.1:*"))
    assert made.recv_multipart()[1] == b"hello"
    bind(other, f"ipc://{short / 'other'}")
    made.connect(f"ipc://{short / 'other'}")
    other.send(b"from the other")
    assert made.poll(10_000) == zmq.POLLIN
    assert made.recv_multipart()[1] == b"from the other"


def test_a_client_comes_back_to_a_path_that_is_bound_again(make: Make, short: Path) -> None:
    address = f"ipc://{short / 's'}"
    first, client = make(), make(zmq.DEALER)
    bind(first, address)
    assert hears(first, client, address)
    security.close(first, address)
    assert not (short / "s").exists()
    second = make()
    bind(second, address)

    def heard() -> bool:
        client.send(b"again")  # until it knows of the end, this goes to the first one
        return second.poll(50) == zmq.POLLIN

    assert eventually(heard)


def test_the_longest_permitted_path_can_be_bound(
    make: Make, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(short)
    name = "x" * IPC_PATH_LIMIT
    check_address(f"ipc://{name}", "endpoint")
    bind(make(), f"ipc://{name}")
    assert (short / name).is_socket()


def test_an_address_in_use_is_refused_and_its_listener_stays(make: Make, short: Path) -> None:
    address = f"ipc://{short / 's'}"
    first = make()
    bind(first, address)
    with pytest.raises(OSError, match="in use") as caught:
        bind(make(), address)
    assert caught.value.errno == errno.EADDRINUSE
    assert hears(first, make(zmq.DEALER), address), "the first has lost its address"


def test_a_tcp_port_in_use_is_refused(make: Make) -> None:
    address = bind(make(), "tcp://127.0.0.1:*")
    with pytest.raises(OSError, match="cannot bind tcp://") as caught:
        bind(make(), address)
    assert caught.value.errno == errno.EADDRINUSE


def test_the_socket_of_a_killed_process_is_replaced(make: Make, short: Path) -> None:
    path = short / "s"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
        left_behind.listen()
    assert path.is_socket()
    made = make()
    bind(made, f"ipc://{path}")
    assert hears(made, make(zmq.DEALER), f"ipc://{path}")


def test_a_file_that_is_no_socket_is_not_replaced(make: Make, short: Path) -> None:
    path = short / "thesis.txt"
    path.write_text("years of work")
    with pytest.raises(OSError, match=r"thesis\.txt"):
        bind(make(), f"ipc://{path}")
    assert path.read_text() == "years of work"


def test_a_directory_that_is_missing_is_an_error_that_names_the_address(
    make: Make, short: Path
) -> None:
    with pytest.raises(OSError, match=r"cannot bind ipc://.*missing"):
        bind(make(), f"ipc://{short}/missing/s")


def test_any_free_port_is_made_known(make: Make) -> None:
    made = make()
    address = bind(made, "tcp://127.0.0.1:*")
    assert check_address(address, "work") == address
    assert hears(made, make(zmq.DEALER), address)


def test_the_address_of_any_free_port_suits_sockets_without_ipv6(make: Make) -> None:
    # A worker in another language connects to it as it is told.
    assert bind(make(), "tcp://127.0.0.1:*").startswith("tcp://127.0.0.1:")


def test_an_ipv6_address_can_be_bound_where_there_is_ipv6(make: Make) -> None:
    if not socket.has_ipv6:
        pytest.skip("this system has no IPv6")
    try:
        address = bind(make(), "tcp://[::1]:*")
    except OSError as error:
        pytest.skip(f"no IPv6 loopback here: {error}")
    assert address.startswith("tcp://[::1]:")
    assert check_address(address, "work") == address


def test_sockets_drop_nothing_and_delay_no_exit(make: Make) -> None:
    for kind in (zmq.ROUTER, zmq.DEALER):
        made = make(kind)
        # A full receiving side makes the sender wait; a full sending one would drop.
        incoming = security.INCOMING if kind == zmq.ROUTER else 0
        assert (made.sndhwm, made.rcvhwm, made.linger) == (0, incoming, 0)


@pytest.mark.parametrize("bulk", [False, True])
def test_only_a_remote_peer_is_gone_when_it_is_silent(bulk: bool) -> None:
    """On this machine it may be stopped, by Ctrl-Z or a debugger; the kernel tells its end."""

    def watched(address: str) -> list[int | bytes]:
        with zmq.Context() as context:
            made = security.socket(context, zmq.ROUTER, address, lost_after=20, bulk=bulk)
            options = (zmq.HEARTBEAT_IVL, zmq.TCP_KEEPALIVE_IDLE, zmq.TCP_MAXRT)
            found = [made.getsockopt(option) for option in options]
            made.close()
            return found

    assert watched("ipc://x") == [0, -1, 0]
    assert watched("tcp://127.0.0.1:*") == ([0, 10, 20_000] if bulk else [3000, -1, 0])


def test_few_descriptors_are_told_before_zeromq_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    check_descriptors()

    def refuse(descriptor: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "dup", refuse)
    with pytest.raises(OSError, match="raise its limit") as caught:
        check_descriptors()
    assert caught.value.errno == errno.EMFILE


def test_a_router_says_when_a_peer_is_gone(make: Make, short: Path) -> None:
    made = make()
    bind(made, f"ipc://{short / 's'}")
    with pytest.raises(zmq.ZMQError) as caught:
        made.send_multipart([b"nobody", b"x"])
    assert caught.value.errno == zmq.EHOSTUNREACH
