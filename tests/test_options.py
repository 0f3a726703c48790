"""What `ZmqExecutor.options` promises: time limits, retries, priorities, kills."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from pathlib import Path
from typing import Any

import pytest

from zmqexecutor import (
    SerializationError,
    TaskFuture,
    TaskKilledError,
    TaskTimeoutError,
    WorkerLostError,
    ZmqExecutor,
)
from zmqexecutor.master import stops

from .conftest import alive, eventually

LONG = 60.0


def touch(path: Path) -> None:
    with open(path, "a") as file:
        file.write("x")


def runs(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def run_long(started: Path) -> None:
    touch(started)
    time.sleep(LONG)


def own_pid() -> int:
    """Run first where times are short: it takes a worker a while to import this file."""
    return os.getpid()


# ---------------------------------------------------------------------- timeouts


def test_a_task_over_its_time_is_ended_and_tells_where_it_was(executor: ZmqExecutor) -> None:
    def linger() -> None:
        time.sleep(LONG)

    before = executor.submit(own_pid).result(30)
    future = executor.options(timeout=0.3).submit(linger)
    with pytest.raises(TaskTimeoutError) as caught:
        future.result(30)
    error = caught.value
    assert isinstance(error, TimeoutError)
    assert error.seconds is not None
    assert error.seconds >= 0.3
    assert "linger" in error.job
    assert "time.sleep(LONG)" in error.stack
    assert "zmqexecutor/worker/" not in error.stack
    assert "linger was ended after" in str(error)
    assert "its timeout is 0.3 s" in str(error)
    assert error.stack.rstrip() in str(error)
    assert eventually(lambda: not alive(before))
    assert executor.submit(pow, 2, 3).result(30) == 8


def test_a_timeout_error_travels() -> None:
    error = TaskTimeoutError("too long", job="f", seconds=1.5, stack="here")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.job, copy.seconds, copy.stack) == ("too long", "f", 1.5, "here")


@pytest.mark.parametrize("name", ["<string>", "script.py", "./script.py"])
def test_the_stack_shows_a_script_in_the_working_directory(
    executor: ZmqExecutor, name: str
) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(f"def linger():\n  import time\n  time.sleep({LONG})", name, "exec"), namespace)
    executor.submit(own_pid).result(30)
    with pytest.raises(TaskTimeoutError) as caught:
        executor.options(timeout=0.5).submit(namespace["linger"]).result(30)
    assert f'File "{name}", line 3, in linger' in caught.value.stack


def test_a_stack_may_have_names_that_are_not_utf8(executor: ZmqExecutor) -> None:
    executor.submit(own_pid).result(30)

    def linger() -> None:
        code = compile(f"import time\ntime.sleep({LONG})", "/odd-\udcff.py", "exec")
        exec(code)

    with pytest.raises(TaskTimeoutError) as caught:
        executor.options(timeout=0.3).submit(linger).result(30)
    assert "odd-?.py" in caught.value.stack


def test_the_time_counts_from_the_start_of_a_task() -> None:
    with ZmqExecutor(1) as executor:
        first = executor.submit(time.sleep, 1.0)
        limited = executor.options(timeout=0.8).submit(pow, 2, 5)
        assert limited.result(30) == 32
        first.result(30)


def test_a_task_that_holds_the_interpreter_is_ended_too(executor: ZmqExecutor) -> None:
    executor.submit(own_pid).result(30)

    def hold() -> None:
        ctypes.PyDLL(None).sleep(int(LONG))  # with the GIL

    with pytest.raises(TaskTimeoutError) as caught:
        executor.options(timeout=0.2).submit(hold).result(30)
    assert caught.value.stack == ""


def test_a_task_with_a_limit_that_a_stopped_worker_does_not_begin_runs_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stops, "SILENT", 1.0)
    with ZmqExecutor(1) as executor:
        stopped = executor.submit(own_pid).result(60)
        os.kill(stopped, signal.SIGSTOP)
        try:
            limited = executor.options(timeout=1.0)
            # A directory can be made once. The next worker has nothing to import for that.
            tasks = [limited.submit(os.mkdir, f"{tmp_path}/{number}") for number in range(3)]
            assert not wait(tasks, 60).not_done
            assert [task.exception() for task in tasks] == [None] * 3
        finally:
            if alive(stopped):
                os.kill(stopped, signal.SIGKILL)
        assert executor.submit(own_pid).result(60) != stopped


def test_short_tasks_with_limits_run_undisturbed(executor: ZmqExecutor) -> None:
    limited = executor.options(timeout=30)
    assert list(limited.map(abs, range(3000))) == list(range(3000))


def test_only_the_slow_ones_of_many_are_ended(tmp_path: Path) -> None:
    """Also those that were sent ahead behind others run once, or are ended once."""
    ran = tmp_path / "ran"

    def work(number: int) -> int:
        with open(ran, "a") as file:
            file.write(f"{number}\n")
        if number % 200 == 50:
            time.sleep(LONG)
        return number

    # This file is imported before the time counts.
    with ZmqExecutor(2, initializer=importlib.import_module, initargs=(__name__,)) as executor:
        limited = executor.options(timeout=1.5)
        futures = [limited.submit(work, number) for number in range(600)]
        for number, future in enumerate(futures):
            if number % 200 == 50:
                assert isinstance(future.exception(60), TaskTimeoutError)
            else:
                assert future.result(60) == number
    lines = ran.read_text().split()
    assert sorted(map(int, lines)) == list(range(600))


def test_tasks_about_to_end_at_their_limit_end_one_way_or_the_other(
    executor: ZmqExecutor,
) -> None:
    """The limit is where the tasks are done: a race, in which no other task may be hit."""
    limited = executor.options(timeout=0.05)
    for _ in range(5):
        racing = [limited.submit(time.sleep, 0.05 + 0.0005 * i) for i in range(-4, 4)]
        others = [executor.submit(abs, i) for i in range(200)]
        assert [future.result(60) for future in others] == list(range(200))
        for future in racing:
            assert future.exception(60) is None or isinstance(future.exception(), TaskTimeoutError)


@pytest.mark.parametrize("forever", [3e6, 1e300, 10**400, float("inf")])
def test_a_limit_may_be_as_large_as_one_likes(executor: ZmqExecutor, forever: float) -> None:
    patient = executor.options(timeout=forever, retries=1, retry_delay=0)
    assert patient.submit(time.sleep, 0.05).result(30) is None
    waiting = executor.options(retries=1, retry_delay=forever).submit(int, "x")
    assert eventually(lambda: executor._engine.master._coordinator._retries)
    assert waiting.kill()
    assert executor.submit(abs, -1).result(30) == 1


def test_what_a_task_started_ends_with_it(executor: ZmqExecutor, tmp_path: Path) -> None:
    def start_another() -> None:
        child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({LONG})"])
        (tmp_path / "pid.new").write_text(str(child.pid))
        (tmp_path / "pid.new").rename(tmp_path / "pid")
        child.wait()

    future = executor.submit(start_another)
    assert eventually((tmp_path / "pid").exists)
    assert isinstance(future, TaskFuture)
    assert future.kill()
    with pytest.raises(TaskKilledError):
        future.result(30)
    pid = int((tmp_path / "pid").read_text())
    assert eventually(lambda: not alive(pid))


# ------------------------------------------------------------------------- kills


def test_a_running_task_is_killed_alone(executor: ZmqExecutor, tmp_path: Path) -> None:
    started = tmp_path / "started"
    doomed = executor.submit(run_long, started)
    other = executor.submit(time.sleep, 0.5)
    assert eventually(lambda: runs(started) == 1)
    assert doomed.kill()
    with pytest.raises(CancelledError) as caught:
        doomed.result(30)
    assert isinstance(caught.value, TaskKilledError)
    assert "run_long" in str(caught.value)
    assert other.result(30) is None
    assert executor.submit(pow, 2, 3).result(30) == 8
    assert not doomed.kill()


def test_a_queued_task_is_cancelled(tmp_path: Path) -> None:
    with ZmqExecutor(1) as executor:
        started = tmp_path / "started"
        running = executor.submit(run_long, started)
        queued = executor.submit(touch, tmp_path / "ran")
        assert eventually(lambda: runs(started) == 1)
        assert queued.kill()
        assert queued.cancelled()
        assert running.kill()
        assert isinstance(running.exception(30), TaskKilledError)
    assert runs(tmp_path / "ran") == 0


def test_a_task_sent_ahead_is_killed_without_waiting_for_the_one_before(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def work(wait: bool) -> None:
        while wait and not gate.exists():
            time.sleep(0.005)

    with ZmqExecutor(1) as executor:
        for _ in executor.map(work, [False] * 200):
            pass  # known to be short now: two are sent together
        first, second = executor.submit(work, True), executor.submit(work, False)
        deadline = time.monotonic() + 1  # on a busy machine it may not be sent ahead
        while not second.running() and time.monotonic() < deadline:
            pass
        assert second.kill()
        try:
            assert second.cancelled() or isinstance(second.exception(10), TaskKilledError)
            assert not first.done()
        finally:
            gate.touch()


def test_killing_what_is_done_or_was_never_sent_does_nothing(executor: ZmqExecutor) -> None:
    done = executor.submit(abs, -1)
    assert done.result(30) == 1
    assert not done.kill()
    unsendable: TaskFuture[str] = executor.submit(repr, threading.Lock())
    assert isinstance(unsendable.exception(0), SerializationError)
    assert not unsendable.kill()


def test_killing_many_at_any_moment_hits_no_other(executor: ZmqExecutor) -> None:
    """Tasks sent ahead, running and finished ones are killed; all others have results."""
    for _ in range(5):
        futures = [executor.submit(time.sleep, 0.0005) for _ in range(150)]
        marked = futures[::10]
        time.sleep(0.01)  # some run, some have been sent ahead, some wait
        for future in marked:
            future.kill()
        for future in futures:
            error = None if future.cancelled() else future.exception(60)
            assert error is None or (future in marked and isinstance(error, TaskKilledError))
    assert executor.submit(abs, -1).result(30) == 1


def test_cancelling_in_asyncio_can_kill(executor: ZmqExecutor, tmp_path: Path) -> None:
    started = tmp_path / "started"

    async def main() -> None:
        loop = asyncio.get_running_loop()
        killing = executor.options(kill_on_cancel=True)
        awaited = asyncio.ensure_future(loop.run_in_executor(killing, run_long, started))
        assert await asyncio.to_thread(eventually, lambda: runs(started) == 1)
        awaited.cancel()
        with pytest.raises(asyncio.CancelledError):
            await awaited

    with ZmqExecutor(1) as executor:
        before = executor.submit(os.getpid).result(30)
        asyncio.run(main())
        assert executor.submit(os.getpid).result(30) != before


def test_a_timeout_of_asyncio_leaves_the_task_without_the_option(
    executor: ZmqExecutor,
) -> None:
    future = executor.submit(time.sleep, 0.3)
    assert eventually(future.running)
    assert not future.cancel()
    assert future.result(30) is None


# ----------------------------------------------------------------------- retries


def fail_until(path: Path, times: int, how: Callable[[], object]) -> int:
    touch(path)
    if runs(path) <= times:
        how()
    return runs(path)


def raise_error() -> None:
    raise OSError("not now")


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FAILURES: list[Any] = [
    pytest.param(raise_error, OSError, id="exception"),
    pytest.param(kill_self, WorkerLostError, id="worker lost"),
    pytest.param(lambda: time.sleep(LONG), TaskTimeoutError, id="timeout"),
]


def limit_for(error: type[Exception]) -> float:
    """Short only where it should strike: each new worker imports this file first."""
    return 2.0 if error is TaskTimeoutError else LONG


@pytest.mark.parametrize(("how", "error"), FAILURES)
def test_a_failure_is_tried_again(
    executor: ZmqExecutor, tmp_path: Path, how: Callable[[], object], error: type[Exception]
) -> None:
    patient = executor.options(timeout=limit_for(error), retries=3, retry_on=error, retry_delay=0)
    assert patient.submit(fail_until, tmp_path / "tries", 2, how).result(60) == 3


@pytest.mark.parametrize(("how", "error"), FAILURES)
def test_never_more_often_than_asked(
    executor: ZmqExecutor, tmp_path: Path, how: Callable[[], object], error: type[Exception]
) -> None:
    tries = tmp_path / "tries"
    patient = executor.options(
        timeout=limit_for(error), retries=2, retry_on=(KeyError, error), retry_delay=0
    )
    with pytest.raises(error):
        patient.submit(fail_until, tries, 99, how).result(60)
    assert runs(tries) == 3


def test_other_failures_are_not_tried_again(executor: ZmqExecutor, tmp_path: Path) -> None:
    tries = tmp_path / "tries"
    patient = executor.options(retries=2, retry_on=WorkerLostError, retry_delay=0)
    with pytest.raises(OSError, match="not now"):
        patient.submit(fail_until, tries, 99, raise_error).result(30)
    assert runs(tries) == 1


def unpicklable_result(tries: Path) -> Any:
    touch(tries)
    return threading.Lock()


@pytest.mark.parametrize(
    ("retry_on", "expected"),
    [
        (Exception, 1),
        ((OSError, pickle.PicklingError), 1),
        (SerializationError, 3),
        ((OSError, SerializationError), 3),
    ],
)
def test_what_cannot_be_pickled_is_tried_again_only_if_that_is_named(
    executor: ZmqExecutor, tmp_path: Path, retry_on: Any, expected: int
) -> None:
    tries = tmp_path / "tries"
    patient = executor.options(retries=2, retry_on=retry_on, retry_delay=0)
    with pytest.raises(SerializationError, match="result cannot be pickled") as caught:
        patient.submit(unpicklable_result, tries).result(60)
    assert not caught.value.task_raised
    assert runs(tries) == expected


class UnpicklableError(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("not this one")


class OneWayError(Exception):
    def __new__(cls, first: int, second: int) -> OneWayError:
        return super().__new__(cls, first, second)

    def __init__(self, first: int, second: int) -> None:
        super().__init__("two are needed")


def raise_unpicklable() -> None:
    raise UnpicklableError("not now")


def raise_one_way() -> None:
    raise OneWayError(1, 2)


@pytest.mark.parametrize("how", [raise_unpicklable, raise_one_way])
def test_a_task_is_tried_again_though_its_exception_cannot_travel(
    executor: ZmqExecutor, tmp_path: Path, how: Callable[[], object]
) -> None:
    patient = executor.options(retries=2, retry_delay=0)
    assert patient.submit(fail_until, tmp_path / "tries", 2, how).result(60) == 3
    with pytest.raises(SerializationError) as caught:
        executor.submit(how).result(60)
    assert caught.value.task_raised


def test_options_of_map_count_for_a_chunk(executor: ZmqExecutor, tmp_path: Path) -> None:
    tries = tmp_path / "tries"

    def fail_at_first(number: int) -> int:
        touch(tries)
        if runs(tries) == 2:
            raise_error()
        return number

    patient = executor.options(retries=1, retry_delay=0)
    assert list(patient.map(fail_at_first, range(3), chunksize=3)) == [0, 1, 2]
    assert runs(tries) == 2 + 3, "all calls of the chunk were made again"
    executor.submit(own_pid).result()
    hurried = executor.options(timeout=0.5)
    with pytest.raises(TaskTimeoutError, match=r"^sleep was ended"):
        list(hurried.map(time.sleep, [0.2] * 10, chunksize=10))


def test_retries_wait_longer_each_time(executor: ZmqExecutor, tmp_path: Path) -> None:
    times = tmp_path / "times"

    def note() -> None:
        with open(times, "a") as file:
            file.write(f"{time.monotonic()}\n")
        raise_error()

    with pytest.raises(OSError, match="not now"):
        executor.options(retries=3, retry_delay=0.1).submit(note).result(30)
    noted = [float(line) for line in times.read_text().split()]
    waits = [after - before for before, after in itertools.pairwise(noted)]
    assert len(waits) == 3
    for delay, waited in zip((0.1, 0.2, 0.4), waits, strict=True):
        assert waited >= delay


def test_a_task_that_waits_for_another_try_can_be_killed(
    executor: ZmqExecutor, tmp_path: Path
) -> None:
    tries = tmp_path / "tries"
    patient = executor.options(retries=5, retry_delay=LONG)
    future = patient.submit(fail_until, tries, 99, raise_error)
    assert eventually(lambda: runs(tries) == 1)
    assert eventually(lambda: executor._engine.master._coordinator._retries)
    assert future.kill()
    assert isinstance(future.exception(30), TaskKilledError)
    assert runs(tries) == 1


def test_big_arguments_are_sent_again(executor: ZmqExecutor, tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(300_000)

    def total(part: Any) -> int:
        touch(tmp_path / "tries")
        sum_ = int(part.sum())
        part[:] = 0
        if runs(tmp_path / "tries") < 3:
            kill_self() if runs(tmp_path / "tries") == 1 else raise_error()
        return sum_

    patient = executor.options(retries=3, retry_delay=0)
    assert patient.submit(total, array).result(60) == int(array.sum())


def test_shutdown_waits_for_the_tries_that_are_due(tmp_path: Path) -> None:
    with ZmqExecutor(1) as executor:
        patient = executor.options(retries=1, retry_delay=0.3)
        future = patient.submit(fail_until, tmp_path / "tries", 1, raise_error)
    assert future.result(0) == 2


def test_shutdown_that_cancels_tries_nothing_again(tmp_path: Path) -> None:
    executor = ZmqExecutor(1)
    patient = executor.options(retries=9, retry_delay=LONG)
    waiting = patient.submit(fail_until, tmp_path / "waiting", 99, raise_error)
    assert eventually(lambda: executor._engine.master._coordinator._retries)
    gate = tmp_path / "gate"

    def fail_later() -> None:
        while not gate.exists():
            time.sleep(0.005)
        raise_error()

    running = patient.submit(fail_later)
    assert eventually(running.running)
    executor.shutdown(wait=False, cancel_futures=True)
    assert isinstance(waiting.exception(10), CancelledError)
    gate.touch()
    assert isinstance(running.exception(10), OSError)
    executor.shutdown()


def test_termination_does_not(tmp_path: Path) -> None:
    executor = ZmqExecutor(1)
    tries = tmp_path / "tries"
    future = executor.options(retries=9, retry_delay=LONG).submit(
        fail_until, tries, 99, raise_error
    )
    assert eventually(lambda: executor._engine.master._coordinator._retries)
    executor.kill_workers()
    assert future.exception(30) is not None
    executor.shutdown()


# -------------------------------------------------------------------- priorities


def test_higher_priorities_leave_the_queue_first(tmp_path: Path) -> None:
    order = tmp_path / "order"

    def note(name: str) -> None:
        with open(order, "a") as file:
            file.write(name)

    gate = tmp_path / "gate"

    def hold() -> None:
        while not gate.exists():
            time.sleep(0.005)

    with ZmqExecutor(1) as executor:
        running = executor.submit(hold)
        assert eventually(running.running)
        futures = [executor.options(priority=-1).submit(note, "d")]
        futures += [executor.submit(note, name) for name in "bc"]
        futures += [executor.options(priority=10).submit(note, "a")]
        gate.touch()
        wait(futures, 30)
    assert order.read_text() == "abcd"


# -------------------------------------------------------------------------- views


def test_a_view_is_an_executor_of_the_same_pool(executor: ZmqExecutor) -> None:
    view = executor.options(name="the job")
    pids = set(view.map(lambda _: os.getpid(), range(20)))
    assert pids <= set(executor.map(lambda _: os.getpid(), range(20))) | pids
    with pytest.raises(WorkerLostError, match="that ran the job was killed by SIGKILL"):
        view.submit(kill_self).result(30)
    view.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)


def test_a_view_of_a_view_has_the_options_of_both(executor: ZmqExecutor) -> None:
    view = executor.options(name="first", retries=1, retry_delay=0).options(name="second")
    with pytest.raises(WorkerLostError, match="that ran second"):
        view.submit(kill_self).result(30)
    with pytest.raises(TypeError, match="retrys"):
        view.options(retrys=1)


def test_a_callback_that_ends_the_program_does_not_end_the_master(tmp_path: Path) -> None:
    with ZmqExecutor(1) as executor:
        started = tmp_path / "started"
        running = executor.submit(run_long, started)
        assert eventually(lambda: runs(started) == 1)
        queued = [executor.submit(abs, number) for number in range(3)]
        queued[0].add_done_callback(lambda _: sys.exit("no"))
        executor.kill_workers()
        assert not wait(queued, 30).not_done
        assert running.exception(30) is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"timeout": 0}, ValueError, "timeout must be more than 0 seconds"),
        ({"timeout": float("nan")}, ValueError, "timeout must be a number of seconds"),
        ({"timeout": "1"}, TypeError, "timeout must be a number"),
        ({"retries": -1}, ValueError, "retries must be 0 or more"),
        ({"retries": True}, TypeError, "retries must be an integer"),
        ({"retry_on": "OSError"}, TypeError, "must be exception classes"),
        ({"retry_on": (OSError, 1)}, TypeError, "must be exception classes"),
        ({"retry_delay": -1}, ValueError, "retry_delay must be 0 seconds or more"),
        ({"priority": 1.5}, TypeError, "priority must be an integer"),
        ({"name": 1}, TypeError, "name must be text"),
    ],
)
def test_bad_options_are_refused(
    executor: ZmqExecutor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        executor.options(**options)


# ---------------------------------------------------------------------- recycling


def test_a_worker_that_uses_too_much_memory_is_replaced(
    executor: ZmqExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    def grow(size: int) -> int:
        globals()["kept"] = bytearray(os.urandom(1024) * (size // 1024))
        return os.getpid()

    with (
        caplog.at_level("INFO", logger="zmqexecutor"),
        ZmqExecutor(1, max_worker_memory=150 * 2**20) as limited,
    ):
        first = limited.submit(grow, 1024).result(30)
        assert limited.submit(os.getpid).result(30) == first
        limited.submit(grow, 200 * 2**20).result(30)
        assert eventually(lambda: limited.submit(os.getpid).result(30) != first)
        assert eventually(lambda: not alive(first))
        assert len(limited._engine.master.workers) == 1
    assert "more than max_worker_memory (150 MiB)" in caplog.text


def test_successors_keep_to_the_number_of_workers(tmp_path: Path) -> None:
    """With `max_tasks_per_child` no more than `max_workers` tasks run at a time."""

    def overlap(number: int) -> tuple[int, int]:
        mark = tmp_path / f"running-{number}"
        mark.touch()
        time.sleep(0.01)
        together = len(list(tmp_path.glob("running-*")))
        mark.unlink()
        return os.getpid(), together

    with ZmqExecutor(2, max_tasks_per_child=5) as executor:
        seen = list(executor.map(overlap, range(60)))
    pids = [pid for pid, _ in seen]
    assert max(pids.count(pid) for pid in set(pids)) <= 5
    assert max(together for _, together in seen) <= 2
