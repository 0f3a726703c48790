"""An executor that workers join which something else has started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from zmqexecutor import (
    RegistrationError,
    TaskKilledError,
    TaskTimeoutError,
    Worker,
    WorkerLostError,
    ZmqExecutor,
)
from zmqexecutor import pool as pool_module
from zmqexecutor.wire import protocol

from .conftest import alive, eventually

WORKER = """
    import sys
    from zmqexecutor.worker.calls import serve

    try:
        print("lost" if serve(sys.argv[1], sys.argv[2:], patience=20) else "left")
    except ConnectionError as error:
        print(error)
"""
WITH_JOURNAL = """
    import sys
    from zmqexecutor.worker.calls import CallHandler
    from zmqexecutor.worker.worker import Worker

    handler = CallHandler(None, {}, ["python"])
    Worker.with_handler(sys.argv[1], handler, journals=sys.argv[2], patience=20, once=True).run()
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/e"


@pytest.fixture
def start_worker(endpoint: str) -> Iterator[Start]:
    """Start a worker process that joins at the endpoint; it is killed after the test."""
    with ExitStack() as stack:

        def start(*words: str, code: str = WORKER, **options: Any) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", textwrap.dedent(code), endpoint, *words]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def test_a_pool_of_workers_that_join(endpoint: str, start_worker: Start) -> None:
    first, second = start_worker(), start_worker()
    with ZmqExecutor(0, endpoint=endpoint) as executor:
        executor.wait_for_workers(2, 60)
        assert {worker.pid for worker in executor.workers} == {first.pid, second.pid}
        offset = 3
        assert list(executor.map(lambda x: x + offset, range(500))) == list(range(3, 503))
        with pytest.raises(ZeroDivisionError):
            executor.submit(lambda: 1 // 0).result(60)
        array = np.arange(300_000)
        assert (executor.submit(np.negative, array).result(60) == -array).all()
        handle = executor.share(array)
        assert executor.submit(np.sum, handle).result(60) == array.sum()  # type: ignore[arg-type]


def test_workers_join_a_pool_that_has_its_own(endpoint: str, start_worker: Start) -> None:
    def where() -> int:
        time.sleep(0.01)
        return os.getpid()

    with ZmqExecutor(1, endpoint=endpoint) as executor:
        executor.wait_for_workers(1, 60)
        (own,) = executor.workers
        assert executor.submit(where).result(60) == own.pid
        joined = start_worker()
        executor.wait_for_workers(2, 60)
        pids = {future.result(60) for future in [executor.submit(where) for _ in range(100)]}
        assert pids == {own.pid, joined.pid}


@pytest.mark.parametrize("journal", [False, True])
def test_what_is_shared_reaches_both(
    endpoint: str, start_worker: Start, tmp_path: Path, journal: bool
) -> None:
    """The pool's own workers map a file of its private directory, which others do not see.

    Nor can they if they have a journal that the master maps, as any worker of this host may.
    """

    def add(array: np.ndarray[Any, Any], shared: np.ndarray[Any, Any]) -> tuple[int, Any]:
        time.sleep(0.02)
        return os.getpid(), array + shared

    joined = start_worker(str(tmp_path), code=WITH_JOURNAL) if journal else start_worker()
    with ZmqExecutor(1, endpoint=endpoint) as executor:
        executor.wait_for_workers(2, 60)
        array = np.arange(200_000)
        handle: Any = executor.share(array)
        results = [executor.submit(add, array, handle).result(60) for _ in range(3)]
        futures = [executor.submit(add, array, handle) for _ in range(20)]
        results += [future.result(60) for future in futures]
        assert all((total == 2 * array).all() for _, total in results)
        assert joined.pid in {pid for pid, _ in results}
        assert len({pid for pid, _ in results}) == 2


def test_large_variables_reach_both(endpoint: str, start_worker: Start) -> None:
    table = np.arange(200_000)

    def get(index: int) -> tuple[int, int]:
        time.sleep(0.02)
        table[index] += 1  # of the worker
        return os.getpid(), int(table[index])

    joined = start_worker()
    with ZmqExecutor(1, endpoint=endpoint) as executor:
        executor.wait_for_workers(2, 60)
        results = [executor.submit(get, index) for index in range(30)]
        pids, values = zip(*[future.result(60) for future in results], strict=True)
        assert values == tuple(range(1, 31))
        assert len(set(pids)) == 2
        assert joined.pid in pids


def test_workers_come_and_go(endpoint: str, start_worker: Start, tmp_path: Path) -> None:
    with ZmqExecutor(0, endpoint=endpoint) as executor:
        waiting = [executor.submit(abs, -number) for number in range(100)]
        first = start_worker()
        assert [future.result(60) for future in waiting] == list(range(100))
        begun, gate = tmp_path / "begun", tmp_path / "gate"

        def hold() -> bool:
            begun.touch()
            return eventually(gate.exists)

        running = executor.submit(hold)
        assert eventually(begun.exists)
        first.terminate()  # it finishes what it runs
        gate.touch()
        assert running.result(60)
        assert first.wait(60) == 0
        assert first.stdout
        assert first.stdout.read() == "left\n"
        assert eventually(lambda: not executor.workers)
        later = executor.submit(abs, -5)
        start_worker()
        assert later.result(60) == 5


def test_the_death_of_a_worker_that_joined(endpoint: str, start_worker: Start) -> None:
    start_worker()
    with ZmqExecutor(0, endpoint=endpoint) as executor:
        executor.wait_for_workers(1, 60)
        lost = executor.submit(os.kill, executor.workers[0].pid, signal.SIGKILL)
        kept = executor.submit(abs, -1)
        with pytest.raises(WorkerLostError, match=f"on {socket.gethostname()}.*network"):
            lost.result(60)
        retried = executor.options(retries=1).submit(abs, -2)
        start_worker()
        assert (kept.result(60), retried.result(60)) == (1, 2)


def test_a_worker_joins_the_next_executor_as_another(endpoint: str, start_worker: Start) -> None:
    worker = start_worker()
    with ZmqExecutor(0, endpoint=endpoint) as executor:
        assert executor.submit(abs, -1).result(60) == 1
    assert worker.stdout
    assert worker.stdout.read() == "lost\n"
    assert worker.wait(60) == 0


def test_it_waits_for_its_executor_and_gives_up(endpoint: str) -> None:
    code = (
        "from zmqexecutor.worker.calls import serve; import sys; serve(sys.argv[1], patience=0.3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, endpoint], capture_output=True, text=True, timeout=60
    )
    assert "RegistrationError: no master answered" in done.stderr


def test_it_keeps_what_is_its_own(
    endpoint: str, start_worker: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Environment and directory; modules come from the parent's folders that it has too."""
    (tmp_path / "its").mkdir()
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "module_of_both.py").write_text("def name(): return __name__")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("SECRET", "of the parent")
    import module_of_both  # type: ignore[import-not-found]

    start_worker(cwd=tmp_path / "its", env={**os.environ, "SECRET": "its own"})
    with ZmqExecutor(0, endpoint=endpoint) as executor:
        assert executor.submit(os.getcwd).result(60) == str(tmp_path / "its")
        assert executor.submit(os.getenv, "SECRET").result(60) == "its own"
        assert executor.submit(module_of_both.name).result(60) == "module_of_both"


def test_modules_that_it_has_not_travel_by_value(
    endpoint: str, start_worker: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "only_here.py").write_text("FACTOR = 3\n\ndef triple(x): return FACTOR * x\n")
    monkeypatch.syspath_prepend(str(folder))
    import only_here  # type: ignore[import-not-found]

    start_worker()
    with ZmqExecutor(0, endpoint=endpoint) as executor:
        executor.wait_for_workers(1, 60)
        (folder / "only_here.py").unlink()
        cloudpickle.register_pickle_by_value(only_here)
        try:
            assert executor.submit(only_here.triple, 5).result(60) == 15
        finally:
            cloudpickle.unregister_pickle_by_value(only_here)


def test_the_initializer_runs_there_too(endpoint: str, start_worker: Start) -> None:
    def prepare(value: int) -> None:
        globals()["prepared"] = value

    start_worker()
    with ZmqExecutor(0, initializer=prepare, initargs=(7,), endpoint=endpoint) as executor:
        assert executor.submit(lambda: globals()["prepared"]).result(60) == 7


def test_a_failing_initializer_costs_that_worker(
    endpoint: str, start_worker: Start, caplog: pytest.LogCaptureFixture
) -> None:
    def prepare() -> None:
        if "BAD" in os.environ:
            raise OSError("no such device")

    with ZmqExecutor(0, initializer=prepare, endpoint=endpoint) as executor:
        bad = start_worker(env={**os.environ, "BAD": "1"}, stderr=subprocess.DEVNULL)
        assert bad.wait(60) != 0
        assert eventually(lambda: "no such device" in caplog.text)
        start_worker()
        assert executor.submit(abs, -1).result(60) == 1


def test_it_may_join_before_the_first_task(endpoint: str, start_worker: Start) -> None:
    joined = start_worker()
    with ZmqExecutor(1, endpoint=endpoint) as executor:
        assert eventually(lambda: joined.pid in {worker.pid for worker in executor.workers}, 60)
        assert executor.submit(abs, -1).result(60) == 1
        (there,) = (worker.id for worker in executor.workers if worker.pid == joined.pid)
        executor.wait_for_workers(2, 60)
        assert there in {worker.id for worker in executor.workers}


def test_a_cancelled_task_that_no_worker_has_seen_keeps_nobody(endpoint: str) -> None:
    with ZmqExecutor(0, endpoint=endpoint) as executor:
        assert executor.submit(abs, -1).cancel()
    executor = ZmqExecutor(0, endpoint=endpoint)
    future = executor.submit(abs, -1)
    executor.shutdown(wait=False)
    assert future.cancel()
    assert eventually(lambda: not executor._engine.master._thread.is_alive(), 60)


# ------------------------------------------------------------ special workers


def test_tasks_for_special_workers(endpoint: str, start_worker: Start) -> None:
    plain, special = start_worker(), start_worker("gpu", "big")
    with ZmqExecutor(0, endpoint=endpoint) as executor:
        executor.wait_for_workers(2, 60)
        on_gpu = executor.options(service="gpu")
        pids = {on_gpu.submit(os.getpid).result(60) for _ in range(20)}
        pids.add(executor.options(service="big").submit(os.getpid).result(60))
        assert pids == {special.pid}
        assert {executor.submit(os.getpid).result(60) for _ in range(20)} == {plain.pid}


def test_nobody_is_special_enough(
    endpoint: str,
    start_worker: Start,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "PATIENCE", 0.2)
    with ZmqExecutor(1, endpoint=endpoint) as executor:
        future = executor.options(service="gpu").submit(abs, -1)
        assert executor.submit(abs, -2).result(60) == 2
        assert eventually(lambda: "1 tasks wait for service 'gpu'" in caplog.text)
        assert endpoint in caplog.text
        assert not future.done()
        start_worker("gpu")
        assert future.result(60) == 1


# ----------------------------------------------------------------- ending tasks


def test_a_task_over_its_time_is_ended_there(
    endpoint: str, start_worker: Start, tmp_path: Path
) -> None:
    first = start_worker()
    with ZmqExecutor(0, endpoint=endpoint) as executor:
        executor.wait_for_workers(1, 60)
        stuck = executor.options(timeout=0.2).submit(time.sleep, 600)
        after = executor.submit(abs, -3)
        with pytest.raises(TaskTimeoutError, match=r"timeout is 0\.2 s"):
            stuck.result(60)
        assert first.wait(60) == -signal.SIGKILL
        start_worker()
        assert after.result(60) == 3
        unwanted = executor.submit(time.sleep, 600)
        assert eventually(unwanted.running)
        unwanted.kill()
        with pytest.raises(TaskKilledError):
            unwanted.result(60)


def test_kill_workers_ends_what_runs_elsewhere(endpoint: str, start_worker: Start) -> None:
    worker = start_worker()
    executor = ZmqExecutor(0, endpoint=endpoint)
    running = executor.submit(time.sleep, 600)
    assert eventually(running.running)
    assert eventually(lambda: executor.workers[0].state == "busy")
    executor.kill_workers()
    assert running.exception(60) is not None
    assert worker.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize("leads", [False, True])
def test_what_a_task_has_started_ends_with_a_worker_that_leads_a_session(
    endpoint: str, start_worker: Start, tmp_path: Path, leads: bool
) -> None:
    """In another's session it may not be the only one."""

    def work(note: Path) -> None:
        with subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL) as process:
            note.write_text(str(process.pid))

    note = tmp_path / "note"
    worker = start_worker(start_new_session=leads)
    with ZmqExecutor(0, endpoint=endpoint) as executor:
        running = executor.submit(work, note)
        assert eventually(lambda: note.exists() and note.read_text(), 60)
        pid = int(note.read_text())
        running.kill()
        assert worker.wait(60) == -signal.SIGKILL
    try:
        assert eventually(lambda: not alive(pid)) if leads else alive(pid)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --------------------------------------------------------------------- refusals


def test_another_version_of_python_is_refused(endpoint: str) -> None:
    import zmq

    context = zmq.Context()
    with ZmqExecutor(0, endpoint=endpoint), context.socket(zmq.DEALER) as dealer:
        dealer.routing_id = b"w"
        dealer.connect(endpoint)
        hello = protocol.Hello(1, "w", 1, "h", "", None, None, "2.7.18", ["python"])
        dealer.send(protocol.encode(hello))
        assert dealer.poll(60_000)
        answer = protocol.decode_control_from_master(dealer.recv())
        assert isinstance(answer, protocol.Refused)
        assert "not to 2.7.18; start the worker with Python 3" in answer.reason
    context.term()


def test_a_job_runner_has_no_work_for_it(endpoint: str, start_worker: Start) -> None:
    from zmqexecutor import JobRunner

    worker = start_worker()
    with JobRunner(endpoint):
        assert worker.stdout
        assert "is a JobRunner, and has no calls" in worker.stdout.read()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_workers": 0}, ValueError, "must be greater than 0"),
        ({"endpoint": "nowhere"}, ValueError, "expected ipc"),
        ({"endpoint": 5}, TypeError, "endpoint must be text"),
        ({"work_address": "ipc:///tmp/w"}, ValueError, "give that too"),
        ({"endpoint": "ipc:///tmp/e", "lost_after": 0}, ValueError, "lost_after must be"),
        ({"endpoint": "ipc:///tmp/e", "lost_after": "1"}, TypeError, "number of seconds"),
        ({"endpoint": "ipc:///nowhere/at/all"}, OSError, "cannot bind"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ZmqExecutor(**arguments)


def test_what_can_never_be_is_refused() -> None:
    with ZmqExecutor(1) as executor:
        with pytest.raises(ValueError, match="give the pool an endpoint"):
            executor.options(service="gpu")
        with pytest.raises(ValueError, match="give the pool an endpoint"):
            executor.options(retries=1).options(service="gpu")
        with pytest.raises(ValueError, match="at most 1 workers"):
            executor.wait_for_workers(2)
        with pytest.raises(TypeError, match="must be an integer"):
            executor.wait_for_workers("1")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="number of seconds"):
            executor.wait_for_workers(1, "1")  # type: ignore[arg-type]
        assert executor.submit(abs, -1).result(60) == 1


def test_a_worker_of_another_kind_is_refused(endpoint: str) -> None:
    worker = Worker(endpoint, target=print, patience=20)
    refused = pytest.raises(RegistrationError, match="it needs a JobRunner")
    with ZmqExecutor(0, endpoint=endpoint), refused:
        worker.run()


def test_waiting_for_workers_in_vain(endpoint: str) -> None:
    late = pytest.raises(TimeoutError, match=r"0 of 2 workers were ready after 0\.2 s")
    with ZmqExecutor(0, endpoint=endpoint) as executor, late:
        executor.wait_for_workers(2, 0.2)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.wait_for_workers(1, 5)


def test_a_pool_can_be_warmed() -> None:
    with ZmqExecutor(3) as executor:
        executor.wait_for_workers(3, 60)
        assert len(executor.workers) == 3
