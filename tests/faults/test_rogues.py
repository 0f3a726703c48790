"""Peers that do not keep to the protocol, on every socket that a master has."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from zmqexecutor import JobRunner, WorkerLostError, ZmqExecutor
from zmqexecutor.master import coordinator
from zmqexecutor.master.master import Master
from zmqexecutor.system.machine import machine_id
from zmqexecutor.wire import protocol

from ..conftest import _private_directories, eventually

Parts = list[bytes]

RUBBISH: dict[str, list[Parts]] = {
    "nothing": [[b""], [b"", b""]],
    "random bytes": [[random.Random(n).randbytes(n)] for n in (1, 2, 10, 1000, 100_000)],
    "10 MB": [[bytes(10_000_000)]] * 3,
    "many parts": [[b"x"] * 10_000, [b""] * 10_000],
    "not for a master": [
        [protocol.encode(message)]
        for message in (
            protocol.Welcome(1, "ipc:///x"),
            protocol.Jobs(0, []),
            protocol.Drain(),
            protocol.Quit(1.0),
        )
    ],
    "from a stranger": [
        [protocol.encode(message)]
        for message in (
            protocol.Ready("stranger"),
            protocol.Results(2**60, [protocol.Result(n, True, b"x") for n in range(100)]),
            protocol.Results(5, [protocol.Result(1, True, b"", "", 0.0, 9)], True),
            protocol.Goodbye(1),
            protocol.Worn("of what?"),
            protocol.Unready("you are broken"),
        )
    ],
    "other versions": [
        [protocol.encode(protocol.Hello(version, "rogue", 1, "h", "m", None, None))]
        for version in (0, 2, 99, -1)
    ],
    "a message and more": [[protocol.encode(protocol.Ready("rogue")), b"more"] * 3],
}
"""What a rogue named "rogue" sends, by kind. All of it is dropped."""


def square_after(number: int, gate: str | None = None) -> int:
    if gate is not None:
        Path(f"{gate}.reached").touch()
        if not eventually(lambda: os.path.exists(gate), 60):
            raise TimeoutError
    return number * number


WORKER = """
import os, sys, time
from zmqexecutor import Worker
def target(job):
    number, gate = job[1].split()
    if gate != "-":
        open(gate + ".reached", "w").close()
        while not os.path.exists(gate): time.sleep(0.005)
    return str(int(number) ** 2)
Worker(sys.argv[1], target=target, patience=30).run()
"""


class Target:
    """A master with a worker, whichever kind of master it is."""

    endpoint: str
    work: str
    master: Master

    def submit(self, number: int, gate: Path | None = None) -> Future[Any]:
        raise NotImplementedError

    def check(self) -> None:
        """It answers."""
        futures = [self.submit(number) for number in range(20)]
        assert [int(f.result(60)) for f in futures] == [n * n for n in range(20)]


class Executor(Target):
    def __init__(self, executor: ZmqExecutor, directory: str) -> None:
        self.executor = executor
        self.master = executor._engine.master
        self.endpoint, self.work = f"ipc://{directory}/control", f"ipc://{directory}/work"

    def submit(self, number: int, gate: Path | None = None) -> Future[Any]:
        return self.executor.submit(square_after, number, None if gate is None else str(gate))


class Runner(Target):
    def __init__(self, runner: JobRunner, endpoint: str) -> None:
        self.runner = runner
        assert runner._master is not None
        self.master = runner._master
        self.endpoint, self.work = endpoint, endpoint + ".work"

    def submit(self, number: int, gate: Path | None = None) -> Future[Any]:
        return self.runner.submit("1", f"{number} {gate or '-'}")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "PINGED_AFTER", 0.01)


@pytest.fixture(params=["executor", "job runner"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    if request.param == "executor":
        before = _private_directories()
        with ZmqExecutor(1) as executor:
            (directory,) = _private_directories() - before
            made: Target = Executor(executor, directory)
            made.check()
            yield made
        return
    endpoint = f"ipc://{tmp_path}/m"
    with subprocess.Popen([sys.executable, "-c", WORKER, endpoint]) as process:
        try:
            with JobRunner(endpoint, patience=30) as runner:
                made = Runner(runner, endpoint)
                made.check()
                yield made
        finally:
            process.kill()


Rogue = Callable[..., "zmq.Socket[bytes]"]


@pytest.fixture
def rogue() -> Iterator[Rogue]:
    """Make a DEALER with this name, connected to this address."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = []

    def connect(address: str, name: str = "rogue") -> zmq.Socket[bytes]:
        dealer = context.socket(zmq.DEALER)
        dealer.routing_id = name.encode()
        dealer.linger = 0
        dealer.connect(address)
        made.append(dealer)
        return dealer

    yield connect
    for dealer in made:
        dealer.close()
    context.term()


def hello(name: str, pid: int | None = None, **fields: Any) -> bytes:
    values = {
        "version": protocol.VERSION,
        "worker": name,
        "pid": os.getpid() if pid is None else pid,
        "host": "h",
        "machine": machine_id(),
        "workpoint": None,
        "journal": None,
        **fields,
    }
    return protocol.encode(protocol.Hello(**values))


def until_sent(dealer: zmq.Socket[bytes], target: Target) -> None:
    """Until the master has read what this one has sent: it refuses another version."""
    name = dealer.routing_id
    assert isinstance(name, bytes)
    dealer.send(hello(name.decode(), version=77))
    while True:
        assert dealer.poll(30_000), "no answer"
        if isinstance(protocol.decode_control_from_master(dealer.recv()), protocol.Refused):
            break
    target.check()


@pytest.mark.parametrize("channel", ["endpoint", "work"])
def test_rubbish(
    target: Target, rogue: Rogue, channel: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is dropped, and told once; the pool goes on answering."""
    caplog.set_level(logging.DEBUG, "zmqexecutor.master.channels")
    for messages in RUBBISH.values():
        dealer = rogue(getattr(target, channel))
        for parts in messages:
            dealer.send_multipart(parts)
        target.check()
        dealer.close(linger=5000)
    target.check()
    assert eventually(lambda: len(caplog.records) >= 1)
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    assert len(target.master.workers) == 1


@pytest.mark.parametrize("channel", ["endpoint", "work"])
def test_what_is_not_even_zeromq(target: Target, channel: str) -> None:
    path = getattr(target, channel).removeprefix("ipc://")
    sockets = []
    half_a_greeting = b"\xff" + bytes(8) + b"\x7f\x03"
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(1000), half_a_greeting):
        sockets.append(socket.socket(socket.AF_UNIX))
        sockets[-1].connect(path)
        sockets[-1].send(data)
    target.check()
    for one in sockets:
        one.close()
    target.check()


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "a workpoint that is no address": {"workpoint": "nowhere"},
    "a workpoint with a null": {"workpoint": "ipc:///tmp/a\0b"},
    "a workpoint on another host": {"workpoint": "tcp://192.0.2.1:5555"},
    "a workpoint that nobody listens at": {"workpoint": "ipc:///tmp/nobody-listens-here"},
    "a huge pid": {"pid": 2**40},
    "a negative pid": {"pid": -5},
    "no pid": {"pid": 0},
    "a pid that is gone": {"pid": 4_194_303},
    "a journal that is not there": {"journal": "/nowhere/at/all"},
    "a journal that is none": {"journal": "/etc/passwd"},
    "a journal that is a device": {"journal": "/dev/zero"},
    "a journal with a null": {"journal": "a\0b"},
    "another machine": {"machine": "elsewhere"},
}


def test_impossible_hellos(target: Target, rogue: Rogue) -> None:
    """Some of them are registered: not as ready, and so without effect."""
    for number, fields in enumerate(IMPOSSIBLE.values()):
        dealer = rogue(target.endpoint, f"rogue-{number}")
        dealer.send(hello(f"rogue-{number}", **fields))
        until_sent(dealer, target)
    assert len(target.master.workers) == 1


def test_a_stranger_is_no_worker_of_an_executor(target: Target, rogue: Rogue) -> None:
    """It cannot break the pool, get a task, or have the segments of a process removed."""
    if isinstance(target, Runner):
        pytest.skip("a job runner takes any worker of this user")
    control, work = rogue(target.endpoint), rogue(target.work)
    for pid in (os.getpid(), 1, os.getppid()):
        control.send(hello("rogue", pid))
        work.send(protocol.encode(protocol.Ready("rogue")))
        until_sent(control, target)
    control.send(protocol.encode(protocol.Unready("the initializer failed")))
    until_sent(control, target)
    assert not work.poll(0), "it was sent something"
    assert len(target.master.workers) == 1


def test_the_name_of_a_living_worker(target: Target, rogue: Rogue, tmp_path: Path) -> None:
    (worker,) = target.master.workers
    running = target.submit(7, tmp_path / "gate")
    queued = target.submit(8)
    assert eventually(running.running)
    control, work = rogue(target.endpoint, worker.id), rogue(target.work, worker.id)
    for _ in range(3):
        control.send(hello(worker.id, worker.pid))
        control.send(protocol.encode(protocol.Worn("says somebody else")))
        control.send(protocol.encode(protocol.Unready("says somebody else")))
        results = [protocol.Result(seq, True, b"not its own") for seq in range(1, 100)]
        work.send(protocol.encode(protocol.Results(0, results)))
        work.send(protocol.encode(protocol.Goodbye()))
    until_sent(rogue(target.endpoint, "another"), target=Silent())
    assert not running.done()
    (tmp_path / "gate").touch()
    assert (int(running.result(60)), int(queued.result(60))) == (49, 64)
    assert [there.id for there in target.master.workers] == [worker.id]


class Silent(Target):
    def check(self) -> None:
        """Its only worker is busy."""


def test_the_pid_of_a_living_worker(target: Target, rogue: Rogue, tmp_path: Path) -> None:
    """The master still learns of the worker's death."""
    (worker,) = target.master.workers
    running = target.submit(7, tmp_path / "gate")
    assert eventually((tmp_path / "gate.reached").exists)
    dealer = rogue(target.endpoint)
    dealer.send(hello("rogue", worker.pid))
    until_sent(dealer, Silent())
    assert not running.done()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerLostError):
        running.result(60)


def test_a_worker_that_leaves_without_a_word(target: Target, rogue: Rogue) -> None:
    """Its process lives, but its connection is gone: what it was given is lost, and told."""
    if isinstance(target, Executor):
        pytest.skip("a worker of an executor ends with its connection")
    (real,) = target.master.workers
    control, work = rogue(target.endpoint), rogue(target.work)
    control.send(hello("rogue"))
    assert control.poll(30_000)
    work.send(protocol.encode(protocol.Ready("rogue")))
    assert eventually(lambda: len(target.master.workers) == 2)
    futures = [target.submit(number) for number in range(10)]
    assert work.poll(30_000), "it is given a job"
    work.close()
    control.close()
    errors = [future.exception(60) for future in futures]
    assert [type(error) for error in errors if error] == [WorkerLostError]
    assert [there.id for there in target.master.workers] == [real.id]


# ---------------------------------------------------------------- replayed conversations


def record(directory: Path) -> list[tuple[str, Parts]]:
    """All that a real worker says to a master, from its Hello to its Goodbye."""
    said: list[tuple[str, Parts]] = []
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    control, work = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    endpoint, workpoint = f"ipc://{directory}/fake", f"ipc://{directory}/fake.work"
    control.bind(endpoint)
    work.bind(workpoint)

    def hear(channel: zmq.Socket[bytes], name: str) -> bytes:
        assert channel.poll(60_000)
        identity, *parts = channel.recv_multipart()
        said.append((name, parts))
        return identity

    with subprocess.Popen([sys.executable, "-c", WORKER, endpoint]) as process:
        worker = hear(control, "endpoint")
        control.send_multipart([worker, protocol.encode(protocol.Welcome(1, workpoint))])
        hear(work, "work")
        for seq in (1, 2, 3):
            job = protocol.Job(seq, "id", b"%d -" % seq, "text")
            work.send_multipart([worker, protocol.encode(protocol.Jobs(0, [job]))])
            hear(work, "work")
        control.send_multipart([worker, protocol.encode(protocol.ShowStack())])
        hear(control, "endpoint")
        control.send_multipart([worker, protocol.encode(protocol.Drain())])
        hear(work, "work")
        assert process.wait(60) == 0
    context.destroy(linger=0)
    return said


def test_a_real_conversation_replayed(target: Target, rogue: Rogue, tmp_path: Path) -> None:
    """In its order, backwards, shuffled, and each message twice; of a worker that is gone."""
    said = record(tmp_path)
    first = protocol.decode_control_to_master(said[0][1][0])
    assert isinstance(first, protocol.Hello)
    name = first.worker
    dealers = {
        "endpoint": rogue(target.endpoint, name),
        "work": rogue(target.work, name),
    }
    twice = [message for message in said for _ in range(2)]
    orders = [said, said[::-1], twice]
    orders += [random.Random(seed).sample(said, len(said)) for seed in range(20)]
    for order in orders:
        for channel, parts in order:
            dealers[channel].send_multipart(parts)
        target.check()
    last = rogue(target.endpoint, "last")
    until_sent(last, target)
    assert len(target.master.workers) == 1


# ---------------------------------------------------------------- floods

FLOOD = """
import sys, zmq
context = zmq.Context()
dealer = context.socket(zmq.DEALER)
dealer.routing_id = b"flood"
dealer.sndhwm = 100
dealer.connect(sys.argv[1])
print("begun", flush=True)
for number in range(int(sys.argv[2])):
    dealer.send(b"\\x92\\xa5Ready" + b"x" * 4000)
dealer.close(linger=-1)
context.term()
"""
MESSAGES = 50_000  # to each socket
ROOM = 64 * 2**20
"""Bytes by which the master's process may grow; the flood is six times that."""


def test_a_flood(target: Target) -> None:
    """It is read no faster than it can be dropped, and the pool is answering meanwhile."""
    process = psutil.Process()
    before = peak = process.memory_info().rss
    rogues = [
        subprocess.Popen([sys.executable, "-c", FLOOD, address, str(MESSAGES)])
        for address in (target.endpoint, target.work)
    ]
    try:
        deadline = time.monotonic() + 100
        while any(rogue.poll() is None for rogue in rogues):
            assert time.monotonic() < deadline
            target.check()
            peak = max(peak, process.memory_info().rss)
    finally:
        for one in rogues:
            one.kill()
            one.wait()
    target.check()
    assert [one.returncode for one in rogues] == [0, 0]
    assert peak - before < ROOM
