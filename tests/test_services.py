"""Workers that offer named services, codecs, and state that targets use."""

from __future__ import annotations

import asyncio
import datetime
import errno
import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from zmqexecutor import (
    Client,
    ForkedExecutorError,
    JobFailedError,
    JobRunner,
    NoWorkerError,
    RegistrationError,
    TaskTimeoutError,
    Worker,
    Workers,
    ZmqExecutor,
)
from zmqexecutor.wire import protocol
from zmqexecutor.worker import registration

from .conftest import eventually

StartWorker = Callable[..., Worker]


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/m"


@pytest.fixture
def start_worker(endpoint: str) -> Iterator[StartWorker]:
    """Run a worker in a thread of this process until the end of the test."""
    started: list[tuple[Worker, threading.Thread]] = []

    def start(**arguments: Any) -> Worker:
        worker = Worker(endpoint, patience=20, **arguments)
        thread = threading.Thread(target=worker.run, daemon=True)
        thread.start()
        started.append((worker, thread))
        return worker

    yield start
    while started:
        worker, thread = started.pop()
        worker.stop()
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def running(endpoint: str, workers: int, patience: float = 20) -> Iterator[JobRunner]:
    with JobRunner(endpoint, patience=patience) as runner:
        assert eventually(lambda: len(runner.workers) == workers), "no worker registered"
        yield runner


def square(job: list[Any]) -> str:
    return str(int(job[1]) ** 2)


def shout(job: list[Any]) -> str:
    return str(job[1]).upper()


def test_a_job_goes_to_who_offers_its_service(endpoint: str, start_worker: StartWorker) -> None:
    start_worker(target=square, service="square")
    start_worker(targets={"shout": shout, "name": lambda job: job[0]})
    start_worker(target=lambda job: f"plain {job[1]}")
    with running(endpoint, 3) as runner:
        for _ in range(20):
            assert runner.execute("1", "12", 20, service="square") == "144"
            assert runner.execute("2", "abc", 20, service="shout") == "ABC"
            assert runner.execute("three", "", 20, service="name") == "three"
            assert runner.execute("4", "x", 20) == "plain x"
        assert {worker.services for worker in runner.workers} == {
            ("square",),
            ("shout", "name"),
            ("default",),
        }


def test_who_asks_for_a_service_that_nobody_offers(
    endpoint: str, start_worker: StartWorker
) -> None:
    start_worker(target=square, service="square")
    with running(endpoint, 1, patience=0.3) as runner:
        lonely = runner.submit("1", "x", service="cube")
        others = [runner.submit("2", "3", service="square") for _ in range(100)]
        assert {future.result(20) for future in others} == {"9"}
        with pytest.raises(NoWorkerError, match=r"'cube'.*that are there offer square"):
            lonely.result(20)
        with pytest.raises(NoWorkerError, match="no worker registered at"):
            runner.execute("3", "4")


def test_a_service_waits_for_its_first_worker(endpoint: str, start_worker: StartWorker) -> None:
    with running(endpoint, 0) as runner:
        future = runner.submit("1", "5", service="square")
        start_worker(target=shout, service="shout")
        assert runner.execute("2", "a", 20, service="shout") == "A"
        assert not future.done()
        start_worker(target=square, service="square")
        assert future.result(20) == "25"


def test_many_jobs_of_one_service_do_not_hold_up_another_of_the_same_worker(
    endpoint: str, start_worker: StartWorker
) -> None:
    done: list[str] = []

    def note(job: list[Any]) -> str:
        done.append(job[0])
        return "ok"

    start_worker(targets={"a": note, "b": note})
    with running(endpoint, 1) as runner:
        many = [runner.submit("a", "", service="a") for _ in range(200)]
        few = [runner.submit("b", "", service="b") for _ in range(5)]
        for future in many + few:
            assert future.result(20) == "ok"
    last = max(number for number, name in enumerate(done) if name == "b")
    assert last < 200, "those of service b came last"


def test_workers_are_shown_as_they_are(endpoint: str, start_worker: StartWorker) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hold(_job: list[Any]) -> str:
        begun.set()
        assert go_on.wait(20)
        return "done"

    start_worker(target=hold, service="hold")
    with running(endpoint, 1) as runner:
        (info,) = runner.workers
        assert (info.state, info.jobs_done, info.pid) == ("idle", 0, os.getpid())
        future = runner.submit("1", "", service="hold")
        assert begun.wait(20)
        (info,) = runner.workers
        assert (info.state, info.jobs_done) == ("busy", 0)
        go_on.set()
        assert future.result(20) == "done"
        assert eventually(lambda: runner.workers[0].state == "idle")
        assert runner.workers[0].jobs_done == 1
        assert 0 <= runner.workers[0].age < 60


# ------------------------------------------------------------------- codecs


@pytest.mark.parametrize("codec", ["json", "msgpack", "pickle"])
def test_objects_by_codec(endpoint: str, start_worker: StartWorker, codec: str) -> None:
    def total(job: list[Any]) -> dict[str, Any]:
        return {"sum": sum(job[1]["numbers"]), "of": job[1]["numbers"]}

    start_worker(target=total, allow_pickle=True)
    with running(endpoint, 1) as runner:
        data = {"numbers": [1, 2.5, -3]}
        expected = {"sum": 0.5, "of": [1, 2.5, -3]}
        assert runner.execute("1", data, 20, codec=codec) == expected


def test_what_only_some_codecs_carry(endpoint: str, start_worker: StartWorker) -> None:
    start_worker(target=lambda job: job[1], allow_pickle=True)
    with running(endpoint, 1) as runner:
        binary = {1: b"\x00\xff", "none": None}
        assert runner.execute("1", binary, 20, codec="msgpack") == binary
        zone = datetime.timezone(datetime.timedelta(hours=3))
        assert runner.execute("2", zone, 20, codec="pickle") == zone
        with pytest.raises(TypeError, match="codec 'json' cannot carry"):
            runner.submit("3", {1: zone}, codec="json")
        with pytest.raises(TypeError, match="name a codec: json"):
            runner.submit("4", {"a": 1})
        with pytest.raises(ValueError, match="one of json, msgpack, pickle"):
            runner.submit("5", "x", codec="yaml")


def test_pickles_only_where_they_are_allowed(endpoint: str, start_worker: StartWorker) -> None:
    ran: list[int] = []

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return ran.append, (1,)

    start_worker(target=lambda _job: "unpickled")
    refused = pytest.raises(JobFailedError, match="allow_pickle=True")
    with running(endpoint, 1) as runner, refused:
        runner.execute("1", Bomb(), 20, codec="pickle")
    assert ran == []


def test_a_result_that_the_codec_cannot_carry(endpoint: str, start_worker: StartWorker) -> None:
    start_worker(target=lambda _job: object())
    with running(endpoint, 1) as runner:
        with pytest.raises(JobFailedError, match="codec 'json' cannot carry"):
            runner.execute("1", [], 20, codec="json")
        with pytest.raises(JobFailedError, match="str or bytes, not object"):
            runner.execute("2", "", 20)


# -------------------------------------------------------------------- state


def test_state_is_made_once_and_given_back(endpoint: str) -> None:
    made: list[list[str]] = []
    ended: list[list[str]] = []

    def connect(name: str) -> list[str]:
        made.append([name])
        return made[-1]

    def use(job: list[Any], connection: list[str]) -> str:
        connection.append(job[1])
        return ",".join(connection)

    worker = Worker(
        endpoint,
        target=use,
        initializer=connect,
        initargs=("db",),
        teardown=ended.append,
        patience=20,
    )
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    for expected in ("db,x", "db,x,x"):  # also for the next master
        with running(endpoint, 1) as runner:
            assert runner.execute("1", "x", 20) == expected
    assert ended == []
    worker.stop()
    thread.join(10)
    assert made == ended == [["db", "x", "x"]]


def test_an_initializer_that_raises(endpoint: str) -> None:
    def load() -> None:
        raise OSError("no such model")

    worker = Worker(endpoint, target=square, initializer=load, teardown=print, patience=20)
    with JobRunner(endpoint) as runner:
        with pytest.raises(OSError, match="no such model"):
            worker.run()
        assert runner.workers == ()


def test_no_master_means_no_teardown(endpoint: str) -> None:
    worker = Worker(
        endpoint, target=square, initializer=list, teardown=lambda _: 1 / 0, patience=0.1
    )
    with pytest.raises(RegistrationError, match="no master"):
        worker.run()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "target must be callable"),
        ({"target": 1}, TypeError, "target of 'default' must be callable"),
        ({"target": print, "targets": {"a": print}}, ValueError, "either target"),
        ({"targets": {}}, TypeError, "target must be callable"),
        ({"targets": {"a": print}, "service": "b"}, ValueError, "either target"),
        ({"target": print, "service": ""}, ValueError, "1 to 255"),
        ({"target": print, "service": 3}, TypeError, "named by text"),
        ({"target": print, "initializer": 1}, TypeError, "initializer must be callable"),
        ({"target": print, "teardown": print}, ValueError, "give both"),
    ],
)
def test_arguments_that_make_no_sense(
    endpoint: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Worker(endpoint, **arguments)


# ----------------------------------------------------- workers like those of other hosts


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of this process do not say on which machine they are."""
    monkeypatch.setattr(registration, "machine_id", str)


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_worker_that_registers_again_at_its_workpoint(
    tmp_path: Path,
    endpoint: str,
    start_worker: StartWorker,
    where: str,
    request: pytest.FixtureRequest,
) -> None:
    if where == "elsewhere":
        request.getfixturevalue("elsewhere")
    start_worker(workpoint=f"ipc://{tmp_path}/w", target=square)
    with running(endpoint, 1) as runner:
        (first,) = runner.workers
        assert runner._master is not None
        (peer,) = runner._master._coordinator.roster

        def expel() -> None:
            peer.tell(protocol.Expelled())  # while it is still there

        runner._master._call(expel)
        assert eventually(lambda: {w.id for w in runner.workers} not in ({first.id}, set()))
        assert [runner.execute("1", str(n), 20) for n in range(20)] == [
            str(n * n) for n in range(20)
        ]


@pytest.mark.usefixtures("elsewhere")
def test_a_job_that_could_not_be_sent_goes_to_another_worker(
    endpoint: str, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [start_worker(target=lambda job: job[1]) for _ in range(2)]
    with running(endpoint, 2) as runner:
        assert runner._master is not None
        assert runner.execute("1", "a", 20) == "a"
        peers = {peer.hello.worker: peer for peer in runner._master._coordinator.roster}
        warmest = max(runner.workers, key=lambda worker: worker.jobs_done)
        # As when its connection has just been lost, and nobody knows.
        monkeypatch.setattr(peers[warmest.id], "send_jobs", lambda *_: False)
        assert runner.execute("2", "b", 20) == "b"
    assert len(workers) == 2


def test_a_forked_child_cannot_use_the_runner(endpoint: str) -> None:
    with JobRunner(endpoint) as runner:
        child = os.fork()
        if child == 0:
            try:
                runner.execute("1", "x")
            except ForkedExecutorError:
                os._exit(7)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_teardown_that_raises(endpoint: str) -> None:
    worker = Worker(
        endpoint, target=square, initializer=list, teardown=lambda _: 1 // 0, patience=20
    )
    with JobRunner(endpoint) as runner:

        def stop() -> None:
            runner.wait_for_workers(1, 20)
            worker.stop()

        thread = threading.Thread(target=stop, daemon=True)
        thread.start()
        with pytest.raises(ZeroDivisionError):
            worker.run()
        thread.join(20)


# --------------------------------------------------------------- what is refused, and endings


def exit_or_cancel(job: list[str]) -> str:
    if job[1] == "exit":
        raise SystemExit("of the target")
    if job[1] == "cancel":
        raise asyncio.CancelledError
    return job[1]


def test_a_target_that_exits_fails_its_job_only(endpoint: str, start_worker: StartWorker) -> None:
    start_worker(target=exit_or_cancel)
    with running(endpoint, 1) as runner:
        for data, text in [("exit", "SystemExit: of the target"), ("cancel", "CancelledError")]:
            with pytest.raises(JobFailedError, match=text):
                runner.execute("1", data, 20)
        assert runner.execute("1", "goes on", 20) == "goes on"


@pytest.mark.parametrize(
    ("seconds", "error"), [("5", TypeError), (True, TypeError), (float("nan"), ValueError)]
)
def test_what_is_no_number_of_seconds(endpoint: str, seconds: Any, error: type[Exception]) -> None:
    for make in (
        lambda: JobRunner(endpoint, patience=seconds),
        lambda: JobRunner(endpoint, lost_after=seconds),
        lambda: Worker(endpoint, target=print, patience=seconds),
        lambda: Client(endpoint, patience=seconds),
        lambda: Workers("true", graceful_timeout=seconds),
    ):
        with pytest.raises(error, match="seconds"):
            make()
    with JobRunner(endpoint) as runner:
        with pytest.raises(error, match="timeout"):
            runner.wait_for_workers(1, seconds)
        with pytest.raises(error, match="timeout"):
            runner.execute("1", "text", seconds)
        with Client(endpoint) as client:
            assert client.status().jobs["queued"] == 0
            with pytest.raises(error, match="timeout"):
                client.call("1", "text", seconds)
            with pytest.raises(error, match="timeout"):
                client.status(seconds)


@pytest.mark.parametrize("seconds", [float("inf"), 1e300, 10**400, None])
def test_waiting_for_as_long_as_it_takes(
    endpoint: str, start_worker: StartWorker, seconds: Any
) -> None:
    start_worker(target=exit_or_cancel)
    with JobRunner(endpoint, patience=seconds) as runner:
        runner.wait_for_workers(1, seconds)
        assert runner.execute("1", "text", seconds) == "text"
        with Client(endpoint, patience=seconds) as client:
            assert client.status(seconds).jobs["queued"] == 0
            assert client.call("1", "text", seconds) == "text"


@pytest.mark.parametrize("seconds", [0, -1.5])
def test_not_waiting_at_all(endpoint: str, seconds: float) -> None:
    with JobRunner(endpoint) as runner:
        with pytest.raises(TimeoutError):
            runner.wait_for_workers(1, seconds)
        with pytest.raises(TaskTimeoutError):
            runner.execute("1", "text", seconds)


@pytest.mark.parametrize("service", ["", "x" * 256, "\ud800"])
def test_names_that_no_service_has(endpoint: str, service: str) -> None:
    with JobRunner(endpoint) as runner:
        with pytest.raises(ValueError):  # noqa: PT011  (UnicodeEncodeError says it in its own words)
            runner.submit("1", "text", service=service)
        with Client(endpoint) as client, pytest.raises(ValueError):  # noqa: PT011
            client.call("1", "text", service=service)


def test_a_worker_without_patience_gives_up(endpoint: str) -> None:
    """And only that: it is not one that ends its process with its master."""
    with pytest.raises(RegistrationError, match=r"no master answered .* within 0 s"):
        Worker(endpoint, target=print, patience=0).run()


def test_a_runner_that_is_dropped_gives_its_endpoint_back(endpoint: str) -> None:
    before = threading.active_count()
    runner = JobRunner(endpoint)
    runner.start()
    del runner
    gc.collect()
    assert eventually(lambda: threading.active_count() == before)
    with JobRunner(endpoint) as another:
        assert another.workers == ()


def test_a_forked_child_does_not_wait_for_a_thread_that_it_has_not(endpoint: str) -> None:
    with JobRunner(endpoint) as runner, ZmqExecutor(1) as executor:
        executor.submit(abs, 1).result(60)
        locked, done = threading.Event(), threading.Event()

        def hold() -> None:
            with runner._lock, executor._opening.pool()._lock:
                locked.set()
                done.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        assert locked.wait(60)
        child = os.fork()
        if not child:
            code = 1
            try:
                runner.stop()
                executor.shutdown()
                for refused in (runner.start, lambda: executor.wait_for_workers(1)):
                    with pytest.raises(ForkedExecutorError):
                        refused()
                code = 0
            finally:
                os._exit(code)
        done.set()
        thread.join()
        ended: list[int] = []

        def has_ended() -> bool:
            ended.extend(ends(child))
            return bool(ended)

        assert eventually(has_ended), "the child hangs"
        assert ended == [0]
        assert runner.refused == {}


def ends(child: int) -> list[int]:
    pid, status = os.waitpid(child, os.WNOHANG)
    return [os.waitstatus_to_exitcode(status)] if pid else []


def test_a_worker_that_cannot_open_its_socket(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise zmq.ZMQError(errno.EMFILE)

    tracebacks: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    monkeypatch.setattr("zmqexecutor.wire.security.socket", refuse)
    with pytest.raises(RegistrationError, match="the control thread failed"):
        Worker(endpoint, target=print, patience=20).run()
    assert not tracebacks
