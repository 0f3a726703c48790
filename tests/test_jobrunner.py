"""The seed's system: a master, workers of their own processes, and what goes wrong."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from zmqexecutor import (
    JobFailedError,
    JobRunner,
    NoWorkerError,
    RegistrationError,
    TaskTimeoutError,
    Worker,
    WorkerLostError,
)
from zmqexecutor.master import roster

from .conftest import eventually

WORKER = """
    import os, signal, sys, time
    from zmqexecutor import Worker

    def target(job):
        job_id, data = job
        if data == "fail":
            raise ZeroDivisionError("in the target")
        if data == "die":
            os._exit(9)
        if isinstance(data, str) and data.startswith(("fork", "leave a fork")):
            if os.fork():
                if data.startswith("fork"):
                    os._exit(9)
                return str(os.getpid())
            os.close(1)
            while os.path.exists(data.split()[-1]):
                time.sleep(0.02)
            os._exit(0)
        if data == "wrong":
            return 42
        if data == "pid":
            return str(os.getpid())
        if isinstance(data, str) and data.startswith("sleep"):
            print("started", flush=True)
            time.sleep(float(data.split()[1]))
        if data == "large":
            return "x" * 1_000_000
        return data

    worker = Worker(*sys.argv[1:], target=target, patience=20)
    worker.run()
    print("left", flush=True)
"""

StartWorker = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[StartWorker]:
    """Start a worker process with these arguments; it is killed after the test."""
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(params=["ipc", "tcp"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/m" if request.param == "ipc" else f"tcp://127.0.0.1:{free_port()}"


@pytest.fixture(params=["connects", "binds"])
def workpoint(request: pytest.FixtureRequest, tmp_path: Path, endpoint: str) -> list[str]:
    """The arguments that name a worker's workpoint: none, or one."""
    if request.param == "connects":
        return []
    if endpoint.startswith("ipc"):
        return [f"ipc://{tmp_path}/w"]
    return [f"tcp://127.0.0.1:{free_port()}"]


@contextmanager
def running(endpoint: str, workers: int = 1, patience: float = 20) -> Iterator[JobRunner]:
    with JobRunner(endpoint, patience=patience) as runner:
        assert eventually(lambda: len(runner.workers) >= workers), "no worker registered"
        yield runner


def test_jobs_text_and_bytes(
    endpoint: str, workpoint: list[str], start_worker: StartWorker
) -> None:
    process = start_worker(endpoint, *workpoint)
    with running(endpoint) as runner:
        assert runner.execute("1", "text é", 20) == "text é"
        assert runner.execute("2", b"\x00bytes", 20) == b"\x00bytes"
        assert len(runner.execute("3", "large", 20)) == 1_000_000
        assert len(runner.execute("4", b"x" * 5_000_000, 20)) == 5_000_000
        assert [f.result(20) for f in [runner.submit("n", str(i)) for i in range(50)]] == [
            str(i) for i in range(50)
        ]
        [worker] = runner.workers
        assert worker.pid == process.pid
        assert worker.host == socket.gethostname()


def test_two_workers_with_one_workpoint(tmp_path: Path, start_worker: StartWorker) -> None:
    endpoint, workpoint = f"ipc://{tmp_path}/m", f"ipc://{tmp_path}/w"
    first = start_worker(endpoint, workpoint)
    with running(endpoint) as runner:
        second = start_worker(endpoint, workpoint)
        assert second.wait(60) == 1
        assert [worker.pid for worker in runner.workers] == [first.pid]
        assert runner.execute("a", "text", 20) == "text"
        worker = Worker(endpoint, workpoint, target=lambda job: "", patience=20)
        with pytest.raises(RegistrationError, match="another worker has the workpoint"):
            worker.run()
        first.kill()
        assert eventually(lambda: not runner.workers)
        start_worker(endpoint, workpoint)
        assert runner.execute("b", "pid", 20) != str(first.pid)


def test_errors_of_a_job(endpoint: str, start_worker: StartWorker) -> None:
    start_worker(endpoint)
    with running(endpoint) as runner:
        with pytest.raises(JobFailedError, match=r"(?s)job 'a' failed.*ZeroDivisionError: in the"):
            runner.execute("a", "fail", 20)
        with pytest.raises(JobFailedError, match="str or bytes, not int"):
            runner.execute("b", "wrong", 20)
        with pytest.raises(TaskTimeoutError, match=r"'c'.*still running") as caught:
            runner.execute("c", "sleep 1", 0.2)
        assert isinstance(caught.value, TimeoutError)
        with pytest.raises(TaskTimeoutError, match=r"'d'.*no worker was free"):
            runner.execute("d", "text", 0.1)
        assert runner.execute("e", "text", 20) == "text"


def test_a_worker_that_dies_is_told(endpoint: str, start_worker: StartWorker) -> None:
    start_worker(endpoint)
    with running(endpoint, patience=0.5) as runner:
        with pytest.raises(WorkerLostError, match="job 'a'"):
            runner.execute("a", "die", 20)
        assert eventually(lambda: len(runner.workers) == 0)
        with pytest.raises(NoWorkerError, match=r"within 0.5 s"):
            runner.execute("b", "text", 20)


def test_a_worker_whose_connection_outlives_it(
    tmp_path: Path,
    endpoint: str,
    start_worker: StartWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roster, "LAST_WORDS", 0.5)
    start_worker(endpoint)
    alive = tmp_path / "alive"
    alive.touch()
    try:
        with running(endpoint) as runner:
            with pytest.raises(WorkerLostError, match="job 'a'"):
                runner.execute("a", f"fork {alive}", 20)
            assert eventually(lambda: len(runner.workers) == 0)
    finally:
        alive.unlink()


def test_an_idle_worker_that_is_dead_is_sent_nothing_although_its_connection_is_there(
    tmp_path: Path,
    endpoint: str,
    start_worker: StartWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roster, "LAST_WORDS", 1000.0)
    for _ in range(2):
        start_worker(endpoint)
    alive = tmp_path / "alive"
    alive.touch()
    try:
        with running(endpoint, workers=2) as runner:
            pid = runner.execute("a", f"leave a fork {alive}", 20)
            os.kill(int(pid), signal.SIGKILL)
            assert eventually(lambda: len(runner.workers) == 1)
            assert runner.execute("b", "pid", 20) != pid
    finally:
        alive.unlink()


def test_a_worker_killed_while_idle(endpoint: str, start_worker: StartWorker) -> None:
    process = start_worker(endpoint)
    with running(endpoint) as runner:
        process.kill()
        assert eventually(lambda: len(runner.workers) == 0)
        start_worker(endpoint)
        assert runner.execute("a", "text", 20) == "text"


def test_workers_outlive_their_master(
    endpoint: str, workpoint: list[str], start_worker: StartWorker
) -> None:
    process = start_worker(endpoint, *workpoint)
    for _ in range(3):
        with running(endpoint) as runner:
            assert runner.execute("1", "pid", 20) == str(process.pid)


def test_a_job_running_when_the_master_stops(endpoint: str, start_worker: StartWorker) -> None:
    start_worker(endpoint)
    with running(endpoint) as runner:
        future = runner.submit("a", "sleep 0.5")
        queued = runner.submit("b", "text")
        assert eventually(future.running)
    with pytest.raises(JobFailedError, match="the master was stopped"):
        future.result(0)
    assert queued.cancelled()
    with running(endpoint) as runner:
        assert runner.execute("c", "text", 20) == "text"


def test_sigterm_lets_a_worker_finish(endpoint: str, start_worker: StartWorker) -> None:
    process = start_worker(endpoint)
    with running(endpoint) as runner:
        future = runner.submit("a", "sleep 0.5")
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.terminate()
        assert future.result(20) == "sleep 0.5"
        assert process.wait(20) == 0
        assert process.stdout.read() == "left\n"
        assert eventually(lambda: len(runner.workers) == 0)


def test_interrupt_in_a_job_loses_the_job(endpoint: str, start_worker: StartWorker) -> None:
    process = start_worker(endpoint)
    with running(endpoint) as runner:
        future = runner.submit("a", "sleep 20")
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(WorkerLostError, match="other workers go on"):
            future.result(15)


def test_no_socket_file_is_left(tmp_path: Path, start_worker: StartWorker) -> None:
    process = start_worker(f"ipc://{tmp_path}/m", f"ipc://{tmp_path}/w")
    with running(f"ipc://{tmp_path}/m"):
        process.terminate()
        assert process.wait(20) == 0
    assert not [path for path in tmp_path.iterdir() if path.is_socket()]


def test_interrupt_ends_a_worker(endpoint: str, start_worker: StartWorker) -> None:
    process = start_worker(endpoint)
    with running(endpoint) as runner:
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert eventually(lambda: len(runner.workers) == 0)


def test_a_worker_in_a_thread_can_be_stopped(endpoint: str) -> None:
    worker = Worker(endpoint, target=lambda job: f"{job[0]} {job[1]}")
    thread = threading.Thread(target=worker.run)
    thread.start()
    with running(endpoint) as runner:
        assert runner.execute("id", "data", 20) == "id data"
        worker.stop()
        thread.join(20)
        assert not thread.is_alive()
        assert eventually(lambda: len(runner.workers) == 0)


def test_a_worker_without_a_master_gives_up(endpoint: str) -> None:
    worker = Worker(endpoint, target=lambda job: "", patience=0.3)
    with pytest.raises(RegistrationError, match=r"no master answered .* within 0.3 s"):
        worker.run()


def test_an_endpoint_in_use(endpoint: str) -> None:
    with JobRunner(endpoint):
        second = JobRunner(endpoint)
        with pytest.raises(OSError, match="in use"):
            second.start()
    second.start()
    second.stop()


def test_start_and_stop_again(endpoint: str) -> None:
    runner = JobRunner(endpoint)
    with pytest.raises(RuntimeError, match="call start"):
        runner.execute("1", "x")
    for _ in range(2):
        runner.start()
        with pytest.raises(RuntimeError, match="has been started"):
            runner.start()
        runner.stop()
        runner.stop()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("tcp://*:5555", "other hosts"),
        ("tcp://0.0.0.0:5555", "other hosts"),
        ("tcp://127.0.0.1", "port"),
        ("http://localhost:80", "expected ipc"),
        ("ipc://" + "x" * 200, "shorter"),
    ],
)
def test_addresses_that_cannot_be_used(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JobRunner(address)
    with pytest.raises(ValueError, match=message):
        Worker(address, target=print)


def test_arguments_are_checked(endpoint: str) -> None:
    with pytest.raises(TypeError, match="target must be callable"):
        Worker(endpoint)
    with JobRunner(endpoint) as runner:
        with pytest.raises(TypeError, match="job_id must be str"):
            runner.submit(1, "x")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="expected str or bytes, not int"):
            runner.submit("1", 5)
        with pytest.raises(ValueError, match="surrogates"):
            runner.submit("\ud800", "x")


LEAVER = """
    import sys
    from zmqexecutor import Worker

    def target(job):
        sys.stdin.readline()
        worker.stop()
        return job[0]

    worker = Worker(sys.argv[1], target=target)
    worker.run()
"""


@contextmanager
def slow_sockets() -> Iterator[None]:
    """ZeroMQ's threads in this process only run when one processor has nothing else to do."""
    cpu = min(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):
        if Path(f"/proc/self/task/{thread}/comm").read_text().startswith("ZMQbg/IO"):
            os.sched_setaffinity(int(thread), {cpu})
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    code = f"import os; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as hog:
        try:
            yield
        finally:
            hog.kill()


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="no such scheduling on this system")
def test_the_last_result_of_a_worker_that_ends_is_not_lost(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/master"
    command = [sys.executable, "-c", textwrap.dedent(LEAVER), endpoint]
    with JobRunner(endpoint) as runner, slow_sockets():
        for number in range(6):
            with subprocess.Popen(command, stdin=subprocess.PIPE) as worker:
                future = runner.submit(str(number), "x")
                assert eventually(future.running)
                # That it has ended is known here before its result is.
                worker.communicate(b"\n", timeout=30)
                assert future.result(30) == str(number)
