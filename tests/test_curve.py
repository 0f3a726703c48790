"""Masters and workers over TCP with keys: who is admitted, who is not, what can be read."""

from __future__ import annotations

import logging
import re
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from zmq.utils import z85

from zmqexecutor import JobRunner, RegistrationError, Worker, ZmqExecutor
from zmqexecutor.keys import Keys, add_worker
from zmqexecutor.master.channels import Channels, Handle
from zmqexecutor.wire import handshakes, protocol, security
from zmqexecutor.wire.handshakes import Connections, Handshakes
from zmqexecutor.wire.protocol import Frame
from zmqexecutor.worker.calls import serve

from .conftest import eventually
from .test_jobrunner import free_port


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys.create(tmp_path / "keys")


@pytest.fixture
def endpoint() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


class Thread(threading.Thread):
    """A worker that says what ended it."""

    def __init__(self, endpoint: str, workpoint: str | None = None, **options: Any) -> None:
        super().__init__()
        self.error: BaseException | None = None
        options = {"target": lambda job: job[1], "patience": 20, **options}
        self.worker = Worker(endpoint, workpoint, **options)
        self.start()

    def run(self) -> None:
        try:
            self.worker.run()
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        self.worker.stop()
        self.join(20)
        assert not self.is_alive()


StartWorker = Callable[..., Thread]


@pytest.fixture
def start_worker() -> Iterator[StartWorker]:
    """Start a worker with these arguments; it is ended after the test."""
    with ExitStack() as stack:

        def start(*arguments: str, **options: Any) -> Thread:
            thread = Thread(*arguments, **options)
            stack.callback(thread.end)
            return thread

        yield start


def failure(endpoint: str, **options: Any) -> str:
    """What a worker says that cannot register."""
    thread = Thread(endpoint, **options)
    thread.join(30)
    assert isinstance(thread.error, RegistrationError)
    return str(thread.error)


@contextmanager
def serving(runner: JobRunner, workers: int = 1) -> Iterator[JobRunner]:
    with runner:
        assert eventually(lambda: len(runner.workers) >= workers), "no worker registered"
        yield runner


def work_address(runner: JobRunner) -> str:
    assert runner._master is not None
    [channels] = runner._master._coordinator.channels
    return channels.work_address


# ------------------------------------------------------------------- who is admitted


@pytest.mark.parametrize("workpoint", [False, True], ids=["connects", "binds"])
def test_jobs_of_a_worker_with_keys(
    endpoint: str, keys: Keys, start_worker: StartWorker, workpoint: bool
) -> None:
    at = [f"tcp://127.0.0.1:{free_port()}"] if workpoint else []
    start_worker(endpoint, *at, keys=keys.directory)
    with serving(JobRunner(endpoint, keys=keys.directory)) as runner:
        assert runner.execute("1", "text é", 20) == "text é"
        assert runner.execute("2", b"\x00bytes", 20) == b"\x00bytes"
        assert len(runner.execute("3", b"x" * 5_000_000, 20)) == 5_000_000
        assert [runner.submit("n", str(i)).result(20) for i in range(50)] == [
            str(i) for i in range(50)
        ]
        assert runner.refused == {}


def test_a_worker_with_a_workpoint_beside_one_without(
    endpoint: str, keys: Keys, start_worker: StartWorker
) -> None:
    """The master's work socket is bound for one, and connected to the other."""
    start_worker(endpoint, keys=keys)
    start_worker(endpoint, f"tcp://127.0.0.1:{free_port()}", keys=keys)
    with serving(JobRunner(endpoint, keys=keys), 2) as runner:
        futures = [runner.submit("n", str(i)) for i in range(100)]
        assert [f.result(20) for f in futures] == [str(i) for i in range(100)]


def test_a_worker_outlives_its_master(endpoint: str, keys: Keys, start_worker: StartWorker) -> None:
    start_worker(endpoint, keys=keys)
    for _ in range(3):
        with serving(JobRunner(endpoint, keys=keys)) as runner:
            assert runner.execute("1", "text", 20) == "text"


def test_a_master_on_all_interfaces(keys: Keys, start_worker: StartWorker) -> None:
    port = free_port()
    start_worker(f"tcp://127.0.0.1:{port}", keys=keys)
    with serving(JobRunner(f"tcp://0.0.0.0:{port}", keys=keys)) as runner:
        assert work_address(runner).startswith("tcp://0.0.0.0:")
        assert runner.execute("1", "text", 20) == "text"


def test_plain_text_from_anyone_if_the_user_says_so(start_worker: StartWorker) -> None:
    port = free_port()
    start_worker(f"tcp://127.0.0.1:{port}", allow_plaintext_tcp_from_anyone=True)
    runner = JobRunner(f"tcp://0.0.0.0:{port}", allow_plaintext_tcp_from_anyone=True)
    with serving(runner):
        assert runner.execute("1", "text", 20) == "text"


def test_keys_of_the_default_directory_are_used(
    endpoint: str, keys: Keys, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Worker(endpoint, target=print, patience=2)
    monkeypatch.setenv("ZMQEXECUTOR_KEYS", str(keys.directory))
    start_worker(endpoint)
    with serving(JobRunner(endpoint)) as runner:
        assert runner.execute("1", "text", 20) == "text"
        with pytest.raises(RegistrationError, match=r"this worker has no keys|it wants keys"):
            plain.run()


# --------------------------------------------------------------------- executors

JOINING = """
import sys
from zmqexecutor.worker.calls import serve
try:
    serve(sys.argv[1], patience=20, keys=sys.argv[2])
except ConnectionError as error:
    print(error)
"""


@pytest.fixture
def start_joining(endpoint: str) -> Iterator[Callable[[Keys], subprocess.Popen[str]]]:
    """Start a process with these keys that joins an executor; it is killed after the test."""
    with ExitStack() as stack:

        def start(keys: Keys) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", JOINING, endpoint, str(keys.directory)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def test_an_executor_admits_workers_with_keys_only(
    endpoint: str,
    keys: Keys,
    tmp_path: Path,
    start_joining: Callable[[Keys], subprocess.Popen[str]],
) -> None:
    moved = add_worker(keys.directory, "alpha").rename(tmp_path / "alpha")
    stranger = Keys.load(add_worker(keys.directory, "beta"))
    (keys.directory / "authorized" / "beta.public").unlink()
    with ZmqExecutor(1, endpoint=endpoint, keys=keys.directory) as executor:
        executor.wait_for_workers(1, 60)  # its own, over ipc and without keys
        joined = start_joining(Keys.load(moved))
        refused = start_joining(stranger)
        executor.wait_for_workers(2, 60)
        assert joined.pid in [worker.pid for worker in executor.workers]
        assert list(executor.map(abs, range(-50, 0))) == list(range(50, 0, -1))
        out, _ = refused.communicate(timeout=60)
        assert f"the master at {endpoint} refused this worker's key" in out
        assert len(executor.workers) == 2
        assert executor._engine.master is not None
        assert sum(executor._engine.master.refused.values()) == 1


def test_calls_do_not_travel_without_keys(endpoint: str, keys: Keys, tmp_path: Path) -> None:
    """They are pickles: who can forge one runs code."""
    with pytest.raises(ValueError, match="open to other users and hosts without auth"):
        ZmqExecutor(0, endpoint=endpoint)
    with pytest.raises(ValueError, match="open to other users and hosts without auth"):
        serve(endpoint)
    with pytest.raises(ValueError, match=r"work_address .* open to other users and hosts"):
        ZmqExecutor(0, endpoint=f"ipc://{tmp_path}/e", work_address="tcp://127.0.0.1:5555")
    with pytest.raises(ValueError, match="keys are for an endpoint"):
        ZmqExecutor(1, keys=keys)
    with pytest.raises(ValueError, match="contradict"):
        ZmqExecutor(0, endpoint=endpoint, keys=keys, allow_plaintext_tcp_from_anyone=True)
    with ZmqExecutor(0, endpoint=endpoint, allow_plaintext_tcp_from_anyone=True) as executor:
        assert not executor.workers  # it is as the user has asked


# --------------------------------------------------------------------- who is refused

Rogue = Callable[[str], object]


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(0)


Dealer = Callable[[bytes | None], "zmq.Socket[bytes]"]


@pytest.fixture
def dealer(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Dealer]:
    """Make a stranger's socket, which believes that this is the master's key, or has none."""
    opened = []

    def make(server: bytes | None) -> zmq.Socket[bytes]:
        made = context.socket(zmq.DEALER)
        made.routing_id = b"rogue"
        if server is not None:
            made.curve_serverkey = server
            made.curve_publickey, made.curve_secretkey = zmq.curve_keypair()
        opened.append(made)
        return made

    yield make
    for made in opened:
        made.close(0)


GREETING = b"\xff" + bytes(8) + b"\x7f"
CURVE = GREETING + b"\x03\x00CURVE" + bytes(48)
RAW = {
    "http": b"GET / HTTP/1.1\r\nHost: master\r\n\r\n",
    "zeros": bytes(1000),
    "half a greeting": GREETING + b"\x03",
    "ZMTP 1": b"\x06\x00rogue\x06\x00hello",
    "ZMTP 2": GREETING + b"\x01\x05\x00\x05rogue\x00\x05hello",
    "ZMTP 3 with plain text": GREETING + b"\x03\x00NULL" + bytes(49) + b"\x04\x06\x05READY",
    "ZMTP 3 with a password": GREETING + b"\x03\x00PLAIN" + bytes(48) + b"\x04\x08\x05HELLO\x01a",
    "CURVE with a forged hello": CURVE + b"\x04\xc8\x05HELLO" + bytes(194),
    "CURVE without a hello": CURVE + b"\x04\x0c\x08INITIATE" + bytes(3),
    "CURVE with a message at once": CURVE + b"\x00\x05hello",
}

REASONS = {
    "wrong server key": "its master.public is not that of this master",
    "unauthorized key": "is not in .*/authorized",
    "no keys": "has no keys: it speaks plain text|went away",  # who is the first to notice?
    **dict.fromkeys(RAW, "ZeroMQ's protocol|went away|no keys|broke the rules|expects a master"),
}


@pytest.fixture(params=REASONS)
def rogue(request: pytest.FixtureRequest, dealer: Dealer, keys: Keys) -> Iterator[Rogue]:
    """Let this one knock at an address; what it returns may hear an answer."""
    opened: list[socket.socket] = []

    def knock(address: str) -> object:
        if request.param in RAW:
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            opened.append(socket.create_connection((host, int(port))))
            opened[-1].sendall(RAW[request.param])
            with suppress(OSError):  # the master has been faster
                opened[-1].shutdown(socket.SHUT_WR)
            return opened[-1]
        server = {"wrong server key": zmq.curve_keypair()[0], "no keys": None}
        made = dealer(server.get(request.param, keys.master_public))
        made.connect(address)
        made.send(b"hello")
        return made

    yield knock
    for one in opened:
        one.close()


@pytest.mark.parametrize("channel", ["endpoint", "work"])
def test_refused(
    endpoint: str,
    keys: Keys,
    start_worker: StartWorker,
    rogue: Rogue,
    request: pytest.FixtureRequest,
    channel: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is counted and told once, is heard by nobody, and disturbs nobody."""
    caplog.set_level(logging.DEBUG, "zmqexecutor")
    heard: list[object] = []
    read = Channels.read

    def read_and_note(self: Channels, socket: zmq.Socket[bytes], handle: Handle) -> None:
        def note(identity: bytes, message: Frame, buffers: list[Frame]) -> None:
            heard.append(identity)
            handle(identity, message, buffers)

        read(self, socket, note)

    monkeypatch.setattr(Channels, "read", read_and_note)
    start_worker(endpoint, keys=keys)
    with serving(JobRunner(endpoint, keys=keys)) as runner:
        address = endpoint if channel == "endpoint" else work_address(runner)
        for count in (1, 2, 3):
            rogue(address)
            assert eventually(lambda: sum(runner.refused.values()) >= count), runner.refused  # noqa: B023
            assert runner.execute("1", "text", 20) == "text"
        assert len(runner.workers) == 1
        kinds = len(runner.refused)
    [worker] = set(heard)
    assert worker != b"rogue"
    records = [r for r in caplog.records if r.name == "zmqexecutor.master.gatekeeper"]
    assert len(records) >= 3
    assert len([r for r in records if r.levelno == logging.WARNING]) == kinds
    kind = request.node.callspec.params["rogue"]
    assert kinds == 1 or kind == "no keys"
    reason = REASONS[kind]
    for record in records:
        assert re.search(reason, record.getMessage())
    secrets = [p.read_text().strip() for p in keys.directory.rglob("*.secret")]
    assert len(secrets) == 2
    assert not any(text in caplog.text for text in secrets)


def test_many_who_are_refused_at_once(
    endpoint: str,
    keys: Keys,
    start_worker: StartWorker,
    dealer: Dealer,
) -> None:
    start_worker(endpoint, keys=keys)
    with serving(JobRunner(endpoint, keys=keys)) as runner:
        for number in range(100):
            server = (keys.master_public, zmq.curve_keypair()[0], None)[number % 3]
            made = dealer(server)
            made.connect(endpoint)
            made.connect(work_address(runner))
        with socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2]))) as raw:
            raw.sendall(bytes(1000))
            while sum(runner.refused.values()) < 200:
                assert runner.execute("1", "text", 20) == "text"
        assert len(runner.workers) == 1


def test_a_key_that_is_removed_and_put_back_while_the_master_runs(
    endpoint: str, keys: Keys, start_worker: StartWorker
) -> None:
    start_worker(endpoint, keys=keys)
    with serving(JobRunner(endpoint, keys=keys)) as runner:
        other = Keys.load(add_worker(keys.directory, "other"))
        second = start_worker(endpoint, keys=other)
        assert eventually(lambda: len(runner.workers) == 2), "added to a master that runs"
        second.end()
        assert eventually(lambda: len(runner.workers) == 1)
        authorized = keys.directory / "authorized" / "other.public"
        authorized.rename(keys.directory / "other.public")
        assert f"{endpoint} refused this worker's key" in failure(endpoint, keys=other)
        assert sum(runner.refused.values()) == 1
        assert runner.execute("1", "text", 20) == "text"
        (keys.directory / "other.public").rename(authorized)
        start_worker(endpoint, keys=other)
        assert eventually(lambda: len(runner.workers) == 2)


def test_nobody_is_admitted_while_the_authorized_cannot_be_read(
    endpoint: str, keys: Keys, start_worker: StartWorker
) -> None:
    folder = keys.directory / "authorized"
    start_worker(endpoint, keys=keys)
    with serving(JobRunner(endpoint, keys=keys)) as runner:
        folder.rename(keys.directory / "away")
        assert "refused this worker's key" in failure(endpoint, keys=keys)
        assert any("cannot be looked up" in reason for reason in runner.refused)
        assert runner.execute("1", "text", 20) == "text"
        (keys.directory / "away").rename(folder)
        start_worker(endpoint, keys=keys)
        assert eventually(lambda: len(runner.workers) == 2)


def test_nobody_is_admitted_without_a_gatekeeper(
    keys: Keys, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    """ZeroMQ admits everybody if nobody can be asked, unless it is told not to."""
    master = security.socket(context, zmq.ROUTER, "tcp://127.0.0.1:*", keys=keys)
    address = security.bind(master, "tcp://127.0.0.1:*")
    worker = security.socket(context, zmq.DEALER, address, keys=keys)
    monitor = worker.get_monitor_socket(handshakes.WATCHED)
    worker.connect(address)
    events: list[int] = []

    def decided() -> bool:
        while monitor.poll(0):
            events.append(handshakes.read_event(monitor.recv_multipart())[0])
        return bool(set(events) - {zmq.Event.CONNECTED})

    assert eventually(decided)
    assert zmq.Event.HANDSHAKE_SUCCEEDED not in events
    worker.disable_monitor()
    for made in (monitor, worker, master):
        made.close()


# ------------------------------------------------------------ what a worker is told


def test_a_worker_whose_key_is_not_authorized(endpoint: str, keys: Keys, tmp_path: Path) -> None:
    stranger = Keys.create(tmp_path / "stranger")
    (stranger.directory / "master.secret").unlink()
    (stranger.directory / "master.public").write_bytes(keys.master_public)
    with JobRunner(endpoint, keys=keys):
        told = failure(endpoint, keys=stranger.directory, patience=60)
    assert f"the master at {endpoint} refused this worker's key" in told
    assert stranger.worker_public is not None
    assert stranger.worker_public.decode() in told, "the line to be added is there"


def test_a_worker_that_knows_another_master(endpoint: str, keys: Keys, tmp_path: Path) -> None:
    stranger = Keys.create(tmp_path / "stranger")
    with JobRunner(endpoint, keys=keys) as runner:
        told = failure(endpoint, keys=stranger, patience=3)
        assert sum(runner.refused.values()) < 20, "it does not try all the time"
    assert "it is not the master whose key is" in told
    assert f"{stranger.directory}/master.public" in told
    assert "tried for 3 s" in told


def test_a_worker_without_keys(endpoint: str, keys: Keys) -> None:
    with JobRunner(endpoint, keys=keys):
        told = failure(endpoint, patience=3)
    # The first, if the worker has noticed before the master, in one of its attempts.
    assert f"the master at {endpoint} speaks CURVE, and this worker has no keys" in told or (
        f"{endpoint} ended the handshake: it wants keys, which this worker does not have" in told
    )


def test_a_worker_with_keys_and_a_master_without(endpoint: str, keys: Keys) -> None:
    with JobRunner(endpoint):
        told = failure(endpoint, keys=keys, patience=3)
    assert f"the master at {endpoint} has no keys and speaks plain text" in told or (
        f"{endpoint} ended the handshake" in told and "or that one has no keys" in told
    )


@pytest.mark.parametrize("has_keys", [True, False])
@pytest.mark.parametrize(
    "says",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(100)],
    ids=["nothing", "http", "zeros"],
)
def test_a_worker_at_something_that_is_no_master(
    endpoint: str, keys: Keys, has_keys: bool, says: bytes
) -> None:
    connections = 0
    with socket.create_server(("127.0.0.1", int(endpoint.rpartition(":")[2]))) as server:
        thread = Thread(endpoint, keys=keys if has_keys else None, patience=1)
        while thread.is_alive():
            if select.select([server], [], [], 0.05)[0]:
                with server.accept()[0] as connection:
                    connection.sendall(says)
                connections += 1
    assert isinstance(thread.error, RegistrationError)
    assert endpoint in str(thread.error)
    assert 1 <= connections < 20


def test_a_worker_can_be_stopped_while_it_is_refused(
    endpoint: str, keys: Keys, tmp_path: Path
) -> None:
    with JobRunner(endpoint, keys=keys) as runner:
        thread = Thread(endpoint, keys=Keys.create(tmp_path / "stranger"), patience=60)
        assert eventually(lambda: runner.refused)
        thread.end()
        assert thread.error is None


# ------------------------------------------------------------------------ workpoints


@pytest.mark.parametrize(
    "who", ["plain master", "plain worker", "other worker", "other master", "http"]
)
def test_strangers_at_a_workpoint(
    endpoint: str,
    keys: Keys,
    start_worker: StartWorker,
    context: zmq.Context[zmq.Socket[bytes]],
    dealer: Dealer,
    who: str,
) -> None:
    """Nobody but the master can give a worker jobs, or take its results."""
    workpoint = f"tcp://127.0.0.1:{free_port()}"
    start_worker(endpoint, workpoint, keys=keys)
    if who == "http":
        with serving(JobRunner(endpoint, keys=keys)) as runner:
            for number in range(20):
                with socket.create_connection(("127.0.0.1", int(workpoint.split(":")[2]))) as raw:
                    raw.sendall(RAW["http"])
                    assert runner.execute("1", str(number), 20) == str(number)
        return
    if who.endswith("worker"):
        stranger = dealer(keys.master_public if who == "other worker" else None)
    else:
        stranger = context.socket(zmq.ROUTER)
        stranger.linger = 0
        if who == "other master":
            stranger.curve_server = True
            stranger.curve_secretkey = zmq.curve_keypair()[1]
    monitor = stranger.get_monitor_socket(handshakes.WATCHED)
    events: list[int] = []

    def failed() -> bool:
        while monitor.poll(0):
            events.append(handshakes.read_event(monitor.recv_multipart())[0])
        return any(event & handshakes.FAILED for event in events)

    with serving(JobRunner(endpoint, keys=keys)) as runner:
        stranger.connect(workpoint)
        assert eventually(failed)
        assert zmq.Event.HANDSHAKE_SUCCEEDED not in events
        for number in range(20):
            assert runner.execute("1", str(number), 20) == str(number)
        assert not stranger.poll(0)
    stranger.disable_monitor()
    monitor.close()
    stranger.close()


def test_a_workpoint_where_somebody_else_listens(
    endpoint: str, keys: Keys, start_worker: StartWorker
) -> None:
    """The master gives no job to whoever answers at an address that a worker has named."""
    start_worker(endpoint, keys=keys)
    with (
        serving(JobRunner(endpoint, keys=keys)) as runner,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        assert runner._master is not None
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        liar = security.socket(context, zmq.DEALER, endpoint, keys=keys)
        liar.routing_id = b"liar"
        liar.connect(endpoint)
        workpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        hello = protocol.Hello(protocol.VERSION, "liar", 1, "elsewhere", "", workpoint, None)
        liar.send(protocol.encode(hello))
        with server.accept()[0] as connection:
            connection.sendall(GREETING + b"\x03\x00NULL" + bytes(49) + b"\x04\x06\x05READY")
            assert eventually(lambda: runner.refused)
            assert runner.execute("1", "text", 20) == "text"
        liar.close()
        context.term()


# ------------------------------------------------------------------- what can be read


class Proxy(threading.Thread):
    """Hands on what two peers of TCP say to each other, and notes it."""

    def __init__(self, target: str) -> None:
        super().__init__(daemon=True)
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self.seen = bytearray()
        self._end, self._ended = socket.socketpair()
        self.start()

    def run(self) -> None:
        other: dict[socket.socket, socket.socket] = {}
        while True:
            for ready in select.select([self._server, self._ended, *other], [], [])[0]:
                if ready is self._ended:
                    for one in (self._server, self._ended, *other):
                        one.close()
                    return
                if ready is self._server:
                    host, _, port = self._target.removeprefix("tcp://").rpartition(":")
                    near, far = ready.accept()[0], socket.create_connection((host, int(port)))
                    other[near], other[far] = far, near
                elif ready in other:
                    self._hand_on(ready, other)

    def _hand_on(self, ready: socket.socket, other: dict[socket.socket, socket.socket]) -> None:
        try:
            data = ready.recv(100_000)
            self.seen += data
            other[ready].sendall(data)
        except OSError:
            data = b""
        if not data:
            for one in (ready, other[ready]):
                del other[one]
                one.close()

    def end(self) -> None:
        self._end.close()
        self.join(20)


@pytest.mark.parametrize("has_keys", [True, False])
def test_what_a_listener_on_the_way_reads(
    endpoint: str,
    keys: Keys,
    start_worker: StartWorker,
    monkeypatch: pytest.MonkeyPatch,
    has_keys: bool,
) -> None:
    used = keys if has_keys else None
    with JobRunner(endpoint, keys=used) as runner:
        control, work = Proxy(endpoint), Proxy(work_address(runner))
        monkeypatch.setattr(security, "reachable", lambda *_: work.address)
        worker = start_worker(control.address, keys=used, target=lambda job: job[1][::-1])
        assert eventually(lambda: runner.workers)
        assert (
            runner.execute("the-number", "the-patient-has" * 100, 20)
            == ("the-patient-has" * 100)[::-1]
        )
        worker.end()
        control.end()
        work.end()
    clear = {
        "greeting": b"CURVE" in control.seen and b"CURVE" in work.seen,
        # As it is encoded: two letters alone are found by chance.
        "name of the host": msgspec.msgpack.encode(socket.gethostname()) in control.seen,
        "message": b"Welcome" in control.seen,
        "job": b"the-number" in work.seen,
        "data": b"the-patient-has" in work.seen,
        "result": b"sah-tneitap-eht" in work.seen,
    }
    assert clear == {what: has_keys == (what == "greeting") for what in clear}
    assert len(work.seen) > 3000
    public = keys.worker_public
    assert public is not None
    for key in (public, keys.master_public):
        assert key not in control.seen
        assert z85.decode(key) not in control.seen


# ------------------------------------------------------------------------ beginning and end


def test_a_master_ends_while_many_are_coming(endpoint: str, keys: Keys, dealer: Dealer) -> None:
    for number in range(30):
        server = (keys.master_public, None)[number % 2]
        made = dealer(server)
        made.setsockopt(zmq.RECONNECT_IVL, 1)
        made.connect(endpoint)
    threads = [Thread(endpoint, keys=keys, patience=30) for _ in range(3)]
    for _ in range(15):
        with JobRunner(endpoint, keys=keys) as runner:
            assert runner.execute("1", "text", 20) == "text"
    for thread in threads:
        thread.end()


def test_an_endpoint_in_use_leaves_no_gatekeeper(endpoint: str, keys: Keys) -> None:
    with JobRunner(endpoint, keys=keys), pytest.raises(OSError, match="cannot bind"):
        JobRunner(endpoint, keys=keys).start()
    assert not [t for t in threading.enumerate() if "gatekeeper" in t.name]


PROGRAM = """
import sys, threading
from zmqexecutor import JobRunner
with JobRunner(sys.argv[1], keys=sys.argv[2]) as runner:
    loaded = {"asyncio", "tornado", "circus"} & set(sys.modules)
    try:
        print(*loaded, "ready", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
print([t.name for t in threading.enumerate()])
"""


def test_a_program_ends_by_an_interrupt_and_loads_no_asyncio(endpoint: str, keys: Keys) -> None:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), endpoint, str(keys.directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        try:
            assert p.stdout is not None
            assert p.stdout.readline() == "ready\n"
            p.send_signal(signal.SIGINT)
            out, err = p.communicate(timeout=30)
        finally:
            p.kill()
    assert (out, err, p.returncode) == ("interrupted\n['MainThread']\n", "", 0)


@pytest.mark.parametrize("tcp", [False, True])
def test_no_keys_no_thread(tmp_path: Path, endpoint: str, keys: Keys, tcp: bool) -> None:
    address = endpoint if tcp else f"ipc://{tmp_path}/m"
    with JobRunner(address, keys=None if tcp else keys) as runner:
        assert not [t for t in threading.enumerate() if "gatekeeper" in t.name]
        assert runner.refused == {}


def test_a_filter_of_logs_that_raises_does_not_end_the_gatekeeper(
    endpoint: str, keys: Keys, start_worker: StartWorker, capfd: pytest.CaptureFixture[str]
) -> None:
    def explode(_: logging.LogRecord) -> bool:
        raise ZeroDivisionError("in a filter")

    logger = logging.getLogger("zmqexecutor.master.gatekeeper")
    logger.addFilter(explode)
    try:
        with JobRunner(endpoint, keys=keys) as runner:
            failure(endpoint, patience=1)
            start_worker(endpoint, keys=keys)
            assert runner.execute("1", "text", 20) == "text"
    finally:
        logger.removeFilter(explode)
    assert "ZeroDivisionError: in a filter" in capfd.readouterr().err


# ------------------------------------------------------ what the events of ZeroMQ mean


E = zmq.Event
MISMATCH = (E.HANDSHAKE_FAILED_PROTOCOL, 0x11000002)


@pytest.mark.parametrize(
    ("events", "refusals"),
    [
        ([(E.ACCEPTED, 5), (E.HANDSHAKE_SUCCEEDED, 0), (E.DISCONNECTED, 5)], 0),
        ([(E.CONNECTED, 5), (E.HANDSHAKE_SUCCEEDED, 0), (E.DISCONNECTED, 5)], 0),
        ([(E.ACCEPTED, 5), MISMATCH, (E.DISCONNECTED, 5)], 1),
        ([(E.ACCEPTED, 5), (E.HANDSHAKE_FAILED_AUTH, 400), (E.DISCONNECTED, 5)], 0),
        ([(E.ACCEPTED, 5), (E.DISCONNECTED, 5)], 1),
        ([(E.ACCEPTED, 5), (E.ACCEPTED, 6), (E.DISCONNECTED, 6), (E.HANDSHAKE_SUCCEEDED, 0)], 1),
        # Which of the two has succeeded?
        ([(E.ACCEPTED, 5), (E.ACCEPTED, 6), (E.HANDSHAKE_SUCCEEDED, 0), (E.DISCONNECTED, 6)], 0),
        ([MISMATCH, (E.ACCEPTED, 5), (E.DISCONNECTED, 5)], 2),
        ([(E.CLOSED, 5), (E.CONNECT_RETRIED, 5), (E.MONITOR_STOPPED, 0)], 0),
    ],
)
def test_which_connections_count_as_refused(events: list[tuple[int, int]], refusals: int) -> None:
    followed = Handshakes()
    reasons = [followed.happened(int(event), value) for event, value in events]
    assert len([reason for reason in reasons if reason]) == refusals


@pytest.mark.parametrize(
    ("events", "lost"),
    [
        ([(E.ACCEPTED, 5), (E.HANDSHAKE_SUCCEEDED, 0), (E.DISCONNECTED, 5)], True),
        ([(E.CONNECTED, 5), (E.HANDSHAKE_SUCCEEDED, 0), (E.DISCONNECTED, 5)], True),
        ([(E.ACCEPTED, 5), (E.DISCONNECTED, 5)], False),
        (
            [(E.ACCEPTED, 5), (E.HANDSHAKE_SUCCEEDED, 0), (E.ACCEPTED, 6),
             (E.DISCONNECTED, 6)],
            False,
        ),
        # It is not said which of the two has succeeded, but which has failed.
        (
            [(E.ACCEPTED, 5), (E.ACCEPTED, 6), (E.HANDSHAKE_SUCCEEDED, 0), MISMATCH,
             (E.DISCONNECTED, 6)],
            False,
        ),
        (
            [(E.ACCEPTED, 5), (E.ACCEPTED, 6), (E.HANDSHAKE_SUCCEEDED, 0), MISMATCH,
             (E.DISCONNECTED, 6), (E.DISCONNECTED, 5)],
            True,
        ),
        (
            [(E.CONNECTED, 5), (E.HANDSHAKE_SUCCEEDED, 0), (E.DISCONNECTED, 5), (E.CONNECTED, 5),
             (E.DISCONNECTED, 5)],
            False,
        ),
    ],
)  # fmt: skip
def test_which_end_of_a_connection_is_a_loss(events: list[tuple[int, int]], lost: bool) -> None:
    followed = Connections()
    *_, last = [followed.lost(int(event), value) for event, value in events]
    assert last is lost
