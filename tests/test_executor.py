"""The executor's contract, with real workers and real crashes."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import pytest

from zmqexecutor import (
    BrokenPoolError,
    ForkedExecutorError,
    SerializationError,
    WorkerLostError,
    ZmqExecutor,
)
from zmqexecutor.master.tasks import Task
from zmqexecutor.system.descriptors import check_threads

from .conftest import eventually


def die(signum: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), signum)


def pid_after(seconds: float) -> int:
    time.sleep(seconds)  # the task's own work, not a wait of the test
    return os.getpid()


def stay(directory: str) -> None:
    Path(directory, str(os.getpid())).touch()
    time.sleep(60)


def touch_and_wait_for(mine: str, other: str) -> bool:
    Path(mine).touch()
    return eventually(lambda: Path(other).exists())


def _one_when_there_is(path: str) -> int:
    while not os.path.exists(path):
        time.sleep(0.005)
    return 1


class TestSubmit:
    def test_result(self, executor: ZmqExecutor) -> None:
        future = executor.submit(pow, 2, 10)
        assert isinstance(future, concurrent.futures.Future)
        assert future.result(30) == 1024

    def test_keyword_arguments_of_any_name(self, executor: ZmqExecutor) -> None:
        def collect(**kwargs: int) -> dict[str, int]:
            return kwargs

        assert executor.submit(collect, fn=1, self=2, args=3).result(30) == {
            "fn": 1,
            "self": 2,
            "args": 3,
        }

    def test_lambda_and_closure(self, executor: ZmqExecutor) -> None:
        offset = 7

        def add(x: int) -> int:
            return x + offset

        assert executor.submit(lambda: 42).result(30) == 42
        assert executor.submit(add, 3).result(30) == 10
        offset = 8
        assert executor.submit(add, 3).result(30) == 11, "a stale closure"

    def test_it_runs_in_another_process_and_its_main_thread(self, executor: ZmqExecutor) -> None:
        def where() -> tuple[int, bool]:
            return os.getpid(), threading.current_thread() is threading.main_thread()

        pid, in_main = executor.submit(where).result(30)
        assert pid != os.getpid()
        assert in_main

    def test_exception_with_remote_traceback(self, executor: ZmqExecutor) -> None:
        def fail_here() -> None:
            raise KeyError("what")

        error = executor.submit(fail_here).exception(30)
        assert isinstance(error, KeyError)
        assert error.args == ("what",)
        assert type(error.__cause__).__name__ == "_RemoteTraceback"
        assert "in fail_here" in str(error.__cause__)

    @pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, GeneratorExit])
    def test_exceptions_that_end_programs_are_results(
        self, executor: ZmqExecutor, raised: type[BaseException]
    ) -> None:
        def leave() -> None:
            raise raised

        assert isinstance(executor.submit(leave).exception(30), raised)
        assert executor.submit(pow, 2, 2).result(30) == 4

    @pytest.mark.parametrize(
        "call",
        [
            (lambda x: x, threading.Lock()),
            (lambda: threading.Lock(),),
            (lambda: (i for i in range(3)),),
        ],
        ids=["argument", "result", "generator"],
    )
    def test_what_cannot_be_pickled_fails_its_future(
        self, executor: ZmqExecutor, call: tuple[Any, ...]
    ) -> None:
        future = executor.submit(*call)
        with pytest.raises(SerializationError, match="pickle"):
            future.result(30)
        assert executor.submit(pow, 2, 3).result(30) == 8

    def test_many_threads(self, executor: ZmqExecutor) -> None:
        results: list[int] = []

        def submit_some(start: int) -> None:
            futures = [executor.submit(pow, i, 2) for i in range(start, start + 200)]
            results.extend(f.result(60) for f in futures)

        threads = [threading.Thread(target=submit_some, args=(1000 * n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == sorted(
            i * i for n in range(8) for i in range(1000 * n, 1000 * n + 200)
        )

    def test_results_up_to_large(self, executor: ZmqExecutor) -> None:
        sizes = [0, 1, 60_000, 65_536, 70_000, 300_000, 5_000_000]
        futures = [executor.submit(bytes, size) for size in sizes * 3]
        assert [len(f.result(60)) for f in futures] == sizes * 3

    def test_a_callback_that_raises_or_submits(
        self, executor: ZmqExecutor, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        more: Future[Future[int]] = Future()

        def submit_more(_: object) -> None:
            more.set_result(executor.submit(pow, 3, 3))

        executor.submit(pow, 1, 1).add_done_callback(submit_more)
        assert more.result(30).result(30) == 27
        for raised in (ValueError, SystemExit):

            def explode(_: object, raised: type[BaseException] = raised) -> None:
                raise raised("in a callback")

            gate = tmp_path / raised.__name__
            future = executor.submit(_one_when_there_is, str(gate))
            future.add_done_callback(explode)  # before it is done: or it is called here
            gate.touch()
            assert future.result(30) == 1
        assert executor.submit(pow, 2, 2).result(30) == 4
        assert eventually(lambda: len(caplog.records) >= 1)
        assert {record.name for record in caplog.records} == {"concurrent.futures"}

    def test_nothing_keeps_arguments_and_results(self, executor: ZmqExecutor) -> None:
        class Payload:
            pass

        payload = Payload()
        sent = weakref.ref(payload)
        future = executor.submit(lambda p: p, payload)
        returned = weakref.ref(future.result(30))
        del payload, future
        assert eventually(lambda: gc.collect() >= 0 and sent() is None and returned() is None)


class TestMap:
    @pytest.mark.parametrize("chunksize", [1, 3, 100])
    def test_order(self, executor: ZmqExecutor, chunksize: int) -> None:
        assert list(executor.map(pow, range(50), [2] * 50, chunksize=chunksize)) == [
            i * i for i in range(50)
        ]

    def test_shortest_iterable_ends_it(self, executor: ZmqExecutor) -> None:
        assert list(executor.map(pow, [2, 3], [3, 3, 3])) == [8, 27]
        assert list(executor.map(pow, [], [])) == []

    def test_exception_comes_in_its_place(self, executor: ZmqExecutor) -> None:
        results = executor.map(divmod, [1, 1, 1], [1, 0, 1])
        assert next(results) == (1, 0)
        with pytest.raises(ZeroDivisionError):
            next(results)

    def test_timeout(self, executor: ZmqExecutor) -> None:
        results = executor.map(time.sleep, [0, 3], timeout=1.5)
        assert next(results) is None
        with pytest.raises(concurrent.futures.TimeoutError):
            next(results)

    def test_buffersize_is_lazy(self, executor: ZmqExecutor) -> None:
        taken = []

        def numbers() -> Iterator[int]:
            for i in range(1_000_000):
                taken.append(i)
                yield i

        results = executor.map(abs, numbers(), buffersize=4)
        assert len(taken) == 4
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        assert len(taken) == 7
        del results

    @pytest.mark.parametrize("chunksize", [1, 2, 3, 100])
    def test_arguments_are_taken_in_turns_and_the_shortest_ends_it(
        self, executor: ZmqExecutor, chunksize: int
    ) -> None:
        def several(*arguments: object) -> tuple[object, ...]:
            return arguments

        numbers = iter(range(7))
        pairs = executor.map(several, numbers, numbers, chunksize=chunksize)
        assert list(pairs) == [(0, 1), (2, 3), (4, 5)]
        assert list(executor.map(several, [1, 2], [3], [4, 5], chunksize=chunksize)) == [(1, 3, 4)]
        assert list(executor.map(several, [(1, 2), ()], chunksize=chunksize)) == [((1, 2),), ((),)]
        assert list(executor.map(several, [], chunksize=chunksize)) == []
        assert list(executor.map(several, chunksize=chunksize)) == []

    @pytest.mark.parametrize("chunksize", [1, 3])
    def test_a_stop_iteration_is_no_end_of_results(
        self, executor: ZmqExecutor, chunksize: int
    ) -> None:
        results = executor.map(next, [iter([1]), iter([]), iter([2])], chunksize=chunksize)
        with pytest.raises((StopIteration, RuntimeError)):  # a generator makes one of the other
            [next(results) for _ in range(3)]

    @pytest.mark.parametrize("buffersize", [None, 2])
    @pytest.mark.parametrize("chunksize", [1, 7])
    def test_unordered(self, executor: ZmqExecutor, chunksize: int, buffersize: int | None) -> None:
        results = executor.map(
            abs, range(-50, 0), chunksize=chunksize, buffersize=buffersize, unordered=True
        )
        assert sorted(results) == list(range(1, 51))

    def test_unordered_results_come_as_they_are_ready(
        self, executor: ZmqExecutor, tmp_path: Path
    ) -> None:
        gate = tmp_path / "gate"

        def wait_for_gate(first: bool) -> bool:
            return eventually(gate.exists) if first else first

        results = executor.map(wait_for_gate, [True, False, False], unordered=True)
        assert [next(results), next(results)] == [False, False]
        gate.touch()
        assert list(results) == [True]

    def test_unordered_timeout(self, executor: ZmqExecutor) -> None:
        results = executor.map(time.sleep, [3, 0], timeout=1.5, unordered=True)
        assert next(results) is None
        with pytest.raises(concurrent.futures.TimeoutError):
            next(results)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"chunksize": 0}, ValueError),
            ({"chunksize": -1}, ValueError),
            ({"buffersize": 0}, ValueError),
            ({"buffersize": "1"}, TypeError),
        ],
    )
    def test_bad_arguments(
        self, executor: ZmqExecutor, arguments: dict[str, Any], error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            executor.map(abs, [1], **arguments)


class TestConstructor:
    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"max_workers": 0}, ValueError),
            ({"max_workers": -1}, ValueError),
            ({"max_workers": "2"}, TypeError),
            ({"initializer": 5}, TypeError),
            ({"max_tasks_per_child": 0}, ValueError),
            ({"max_tasks_per_child": "1"}, TypeError),
        ],
    )
    def test_bad_arguments(self, arguments: dict[str, Any], error: type[Exception]) -> None:
        with pytest.raises(error):
            ZmqExecutor(**arguments)

    def test_positional_signature_of_the_standard_library(self) -> None:
        with ZmqExecutor(1, None, os.putenv, ("A_VARIABLE", "x")) as executor:
            assert executor.submit(pow, 2, 2).result(30) == 4

    def test_initializer_runs_once_per_worker(self, tmp_path: Path) -> None:
        def note(directory: str) -> None:
            Path(directory, str(os.getpid())).touch()

        with ZmqExecutor(2, initializer=note, initargs=(str(tmp_path),)) as executor:
            pids = set(executor.map(pid_after, [0.05] * 10))
            assert pids <= {int(path.name) for path in tmp_path.iterdir()}

    def test_failing_initializer_breaks_the_pool(self, capfd: pytest.CaptureFixture[str]) -> None:
        def fail() -> None:
            raise ValueError("no model")

        with ZmqExecutor(2, initializer=fail) as executor:
            future = executor.submit(pow, 2, 2)
            with pytest.raises(BrokenProcessPool, match="ValueError: no model"):
                future.result(30)
            with pytest.raises(BrokenPoolError, match="no model"):
                executor.submit(pow, 2, 2)
        assert "Exception in initializer:" in capfd.readouterr().err

    def test_workers_that_die_at_the_start_break_the_pool(self) -> None:
        def quit_at_once() -> None:
            print("cannot load", file=sys.stderr)
            os._exit(3)

        with ZmqExecutor(2, initializer=quit_at_once) as executor:
            future = executor.submit(pow, 2, 2)
            with pytest.raises(BrokenProcessPool, match=r"exit code 3.*\n.*\ncannot load"):
                future.result(60)

    def test_max_tasks_per_child(self) -> None:
        with ZmqExecutor(2, max_tasks_per_child=3) as executor:
            pids = Counter(executor.map(pid_after, [0.0] * 20))
        assert max(pids.values()) <= 3
        assert sum(pids.values()) == 20

    def test_workers_start_on_demand(self) -> None:
        with ZmqExecutor(2) as executor:
            for _ in range(5):
                executor.submit(pow, 2, 2).result(30)
            assert len({executor.submit(os.getpid).result(30) for _ in range(5)}) == 1

    def test_environment_of_workers(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SOME_VARIABLE", "some value")
        monkeypatch.setattr(sys, "argv", ["program", "argument"])
        monkeypatch.syspath_prepend("some-directory")

        def environment() -> tuple[Any, ...]:
            return os.getcwd(), os.environ["SOME_VARIABLE"], sys.argv, sys.path

        with ZmqExecutor(1) as executor:
            cwd, variable, argv, path = executor.submit(environment).result(30)
        assert os.path.samefile(cwd, tmp_path)
        assert variable == "some value"
        assert argv == ["program", "argument"]
        assert path == [os.path.abspath(entry) for entry in sys.path]


class TestCrash:
    @pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
    def test_a_dead_worker_costs_its_task_and_no_other(
        self, executor: ZmqExecutor, signum: signal.Signals
    ) -> None:
        for _ in range(5):
            before = [executor.submit(pow, 2, i) for i in range(40)]
            crash = executor.submit(die, signum)
            after = [executor.submit(pow, 3, i) for i in range(40)]
            with pytest.raises(WorkerLostError, match=signum.name) as caught:
                crash.result(30)
            assert isinstance(caught.value, BrokenProcessPool)
            assert caught.value.exitcode == -signum
            assert caught.value.signal == signum.name
            assert caught.value.pid not in (None, os.getpid())
            assert caught.value.job == "die"
            assert [f.result(30) for f in before] == [2**i for i in range(40)]
            assert [f.result(30) for f in after] == [3**i for i in range(40)]

    def test_last_words(self, executor: ZmqExecutor) -> None:
        def last_words() -> None:
            print("disk on fire", file=sys.stderr)
            os._exit(7)

        error = executor.submit(last_words).exception(30)
        assert isinstance(error, WorkerLostError)
        assert error.exitcode == 7
        assert "disk on fire" in error.stderr
        assert "disk on fire" in str(error)

    def test_results_before_a_crash_survive_it(self, executor: ZmqExecutor) -> None:
        # Short tasks whose results travel together with what kills the worker.
        wait([executor.submit(abs, i) for i in range(2000)])
        for _ in range(20):
            futures = [executor.submit(abs, -i) for i in range(100)]
            crash = executor.submit(os._exit, 1)
            futures += [executor.submit(abs, -i) for i in range(100)]
            assert isinstance(crash.exception(30), WorkerLostError)
            assert [f.result(30) for f in futures] == [*range(100), *range(100)]

    def test_no_task_runs_twice(self, executor: ZmqExecutor, tmp_path: Path) -> None:
        def note(i: int) -> None:
            with open(tmp_path / str(i), "a") as file:
                file.write("x")
            if i % 50 == 25:
                os._exit(1)

        futures = [executor.submit(note, i) for i in range(200)]
        lost = [i for i, f in enumerate(futures) if f.exception(60)]
        assert lost == [25, 75, 125, 175]
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
            str(i): "x" for i in range(200)
        }

    def test_an_idle_worker_is_replaced(self, executor: ZmqExecutor) -> None:
        pid = executor.submit(os.getpid).result(30)
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not psutil.pid_exists(pid))
        assert executor.submit(os.getpid).result(30) != pid

    def test_a_dead_supervisor_is_replaced(self, executor: ZmqExecutor) -> None:
        pid = executor.submit(os.getppid).result(30)
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: _ppid_or_none(executor) not in (None, pid))

    def test_all_workers_at_once(self, executor: ZmqExecutor, tmp_path: Path) -> None:
        running = [executor.submit(stay, str(tmp_path)) for _ in range(2)]
        queued = [executor.submit(pow, 2, i) for i in range(20)]
        assert eventually(lambda: len(os.listdir(tmp_path)) == 2)
        for pid in os.listdir(tmp_path):
            os.kill(int(pid), signal.SIGKILL)
        assert [f.result(30) for f in queued] == [2**i for i in range(20)]
        for future in running:
            assert isinstance(future.exception(30), WorkerLostError)


def _ppid_or_none(executor: ZmqExecutor) -> int | None:
    try:
        return executor.submit(os.getppid).result(30)
    except WorkerLostError:
        return None


class TestFairness:
    def test_two_tasks_that_wait_for_each_other(self, tmp_path: Path) -> None:
        a, b = str(tmp_path / "a"), str(tmp_path / "b")
        with ZmqExecutor(2) as executor:
            futures = [
                executor.submit(touch_and_wait_for, a, b),
                executor.submit(touch_and_wait_for, b, a),
            ]
            assert [f.result(60) for f in futures] == [True, True]

    def test_short_tasks_do_not_wait_behind_a_long_one(
        self, executor: ZmqExecutor, tmp_path: Path
    ) -> None:
        gate = tmp_path / "gate"

        def short_or_long(i: int) -> int:
            if i == 10 and not eventually(gate.exists, 60):
                raise TimeoutError
            return i

        wait([executor.submit(short_or_long, 0) for _ in range(2000)])  # known as short
        futures = [executor.submit(short_or_long, i) for i in range(500)]
        others = [f for i, f in enumerate(futures) if i != 10]
        assert not wait(others, 30).not_done
        assert not futures[10].done()
        gate.touch()
        assert futures[10].result(30) == 10

    def test_cancel_until_sent(self, executor: ZmqExecutor, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        blockers = [executor.submit(eventually, gate.exists) for _ in range(2)]
        assert eventually(lambda: all(f.running() for f in blockers))
        queued = [executor.submit(pow, 2, 2) for _ in range(10)]
        assert all(f.cancel() for f in queued)
        assert not blockers[0].cancel()
        gate.touch()
        assert [f.result(30) for f in blockers] == [True, True]
        assert list(as_completed(queued, 30))
        assert executor.submit(pow, 2, 2).result(30) == 4


class TestEnd:
    def test_submit_after_shutdown(self) -> None:
        executor = ZmqExecutor(1)
        executor.shutdown()
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.submit(pow, 1, 1)
        with pytest.raises(RuntimeError):
            executor.map(abs, [1])
        executor.shutdown()
        executor.shutdown(wait=False, cancel_futures=True)

    def test_a_task_that_crosses_the_end_of_the_pool_is_completed(self) -> None:
        executor = ZmqExecutor(1)
        executor.shutdown()
        executor._engine._closed = False  # as it was when the check before the submit was made
        future = executor.submit(abs, -1)
        assert isinstance(future.exception(10), CancelledError)

    def test_shutdown_finishes_pending_tasks(self) -> None:
        executor = ZmqExecutor(2)
        futures = [executor.submit(pid_after, 0.05) for _ in range(8)]
        executor.shutdown(wait=True)
        assert all(f.done() and not f.exception() for f in futures)

    def test_shutdown_without_waiting(self) -> None:
        executor = ZmqExecutor(2)
        futures = [executor.submit(pid_after, 0.05) for _ in range(8)]
        executor.shutdown(wait=False)
        assert not all(f.done() for f in futures)
        assert len([f.result(30) for f in futures]) == 8

    def test_shutdown_cancels_futures(self, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        executor = ZmqExecutor(1)
        first = executor.submit(eventually, gate.exists)
        assert eventually(first.running)
        queued = [executor.submit(pow, 2, 2) for _ in range(5)]
        executor.shutdown(wait=False, cancel_futures=True)
        assert eventually(lambda: all(f.cancelled() for f in queued))
        gate.touch()
        assert first.result(30) is True
        executor.shutdown()

    @pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
    def test_ending_the_workers(self, how: str) -> None:
        executor = ZmqExecutor(1)
        running = executor.submit(pid_after, 60)
        assert eventually(running.running)
        queued = executor.submit(pow, 2, 2)
        getattr(executor, how)()
        with pytest.raises(BrokenProcessPool, match=how):
            running.result(30)
        assert eventually(queued.cancelled)
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(pow, 2, 2)

    def test_a_forgotten_executor_finishes_and_goes(self) -> None:
        executor = ZmqExecutor(2)
        pid = executor.submit(os.getpid).result(30)
        futures = [executor.submit(pid_after, 0.02) for _ in range(10)]
        gone = weakref.ref(executor)
        del executor
        assert gone() is None, "something keeps the executor alive"
        assert len([f.result(30) for f in futures]) == 10
        assert eventually(lambda: not psutil.pid_exists(pid))

    def test_a_forked_child_is_told(self, executor: ZmqExecutor) -> None:
        executor.submit(pow, 2, 2).result(30)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:  # in the child; whatever happens, it must not go on with the tests
            try:
                executor.submit(pow, 2, 2)
            except ForkedExecutorError:
                executor.shutdown()
                os.write(write, b"told")
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(read, 10) == b"told"
        os.close(read)
        os.close(write)
        assert executor.submit(pow, 2, 2).result(30) == 4


class TestHost:
    def test_the_host_process_is_unharmed(self, tmp_path: Path) -> None:
        import logging
        import subprocess
        import warnings

        def state() -> tuple[Any, ...]:
            return (
                [signal.getsignal(number) for number in range(1, signal.NSIG)],
                list(logging.root.handlers),
                list(warnings.filters),
                sys.excepthook,
                threading.excepthook,
                os.getcwd(),
            )

        before, modules = state(), set(sys.modules)
        with ZmqExecutor(2) as executor:
            futures = [executor.submit(pow, 2, i) for i in range(500)]
            codes = [
                subprocess.run([sys.executable, "-c", f"exit({i})"]).returncode for i in (0, 5)
            ]
            assert codes == [0, 5]
            assert all(f.result(30) for f in futures)
            connections = [
                c
                for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
                for c in process.net_connections("inet")
            ]
            assert connections == []
        assert state() == before
        assert not {"circus", "tornado"} & (set(sys.modules) - modules)

    def test_a_task_that_forks_and_comes_back(self, executor: ZmqExecutor) -> None:
        def fork_and_return() -> int:
            pid = os.fork()
            if pid:
                os.waitpid(pid, 0)
            return os.getpid()

        pid = executor.submit(fork_and_return).result(30)
        assert executor.submit(os.getpid).result(30) == pid


def test_a_module_that_makes_an_executor_when_imported(
    tmp_path: Path, run_script: Callable[..., Any]
) -> None:
    """Each worker imports it and would make another; that ends, with the reason."""
    (tmp_path / "helper.py").write_text(
        "from zmqexecutor import ZmqExecutor\n"
        "def work(): return 1\n"
        "with ZmqExecutor(1) as executor: print(executor.submit(work).result())\n"
    )
    result = run_script("import helper", timeout=110)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("zmqexecutor.errors.SerializationError: The call cannot be unpickled in")
    assert "worker: RuntimeError: executors are nested more than 6 deep" in last, "once"


def test_an_executor_of_a_module_starts_nothing_in_workers(
    tmp_path: Path, run_script: Callable[..., Any]
) -> None:
    (tmp_path / "helper.py").write_text(
        "from zmqexecutor import ZmqExecutor\n"
        "executor = ZmqExecutor(1)\n"
        "def work(): return executor._opening._supervisor is None\n"
    )
    result = run_script(
        "import helper\n"
        "with helper.executor as executor:\n"
        "    print(helper.work(), executor.submit(helper.work).result())"
    )
    assert result.stdout == "False True\n"


def square(number: int) -> int:
    return number * number


def test_a_frozen_program_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its executable is not Python: it would run the program itself, again and again."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(RuntimeError, match=r"in a frozen program .* use a ProcessPoolExecutor"):
        ZmqExecutor(1)


def test_without_epoll(monkeypatch: pytest.MonkeyPatch) -> None:
    """gevent takes it out of the module."""
    monkeypatch.delattr(select, "epoll", raising=False)
    with ZmqExecutor(1) as executor:
        assert list(executor.map(square, range(5))) == [0, 1, 4, 9, 16]
        with pytest.raises(WorkerLostError):
            executor.submit(os._exit, 3).result(60)
        assert executor.submit(square, 3).result(60) == 9


def test_too_few_threads_are_told_before_zeromq_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    check_threads()
    count = threading.active_count()
    left = iter([True, True])
    start = threading.Thread.start

    def start_few(thread: threading.Thread) -> None:
        if not next(left, False):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_few)
    with pytest.raises(RuntimeError, match=r"can't start new thread: fewer than 3 .*ulimit -u"):
        check_threads()
    assert threading.active_count() == count


def test_the_words_of_an_assert(executor: ZmqExecutor) -> None:
    """pytest rewrites it, with names that its module has not where pytest does not import it."""

    def fail() -> None:
        assert [1, 2] == [1, 3]

    with pytest.raises(AssertionError, match=r"assert \[1, 2\] == \[1, 3\]"):
        executor.submit(fail).result(60)


def test_modules_of_the_user_do_not_stand_for_the_standard_librarys(
    tmp_path: Path, run_script: Callable[..., Any]
) -> None:
    """Neither the supervisor nor a worker's start imports what is beside the script."""
    for name in ("glob", "selectors", "uuid", "platform", "shlex"):
        (tmp_path / f"{name}.py").write_text(f"print('imported the wrong {name}')")
    result = run_script(
        """
        import sys
        own = sys.path.pop(0)
        from zmqexecutor import ZmqExecutor
        with ZmqExecutor(1) as first:
            first.submit(pow, 2, 2).result()
            sys.path.insert(0, own)
            with ZmqExecutor(1) as executor:
                print(executor.submit(pow, 2, 10).result())
        """
    )
    assert result.stdout == "1024\n"


def test_a_pool_that_has_ended_leaves_nothing_to_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        executor = ZmqExecutor(1)
        assert executor.submit(abs, -1).result(30) == 1
        executor.shutdown()
        master = weakref.ref(executor._engine.master)
        del executor
        assert master() is None
    finally:
        gc.enable()


def test_a_task_that_is_refused_while_it_is_pickled_leaves_nothing() -> None:
    class ShutsDown:
        def __reduce__(self) -> tuple[type[int], tuple[()]]:
            executor.shutdown(wait=False)
            return int, ()

    with ZmqExecutor(1) as executor:
        gc.collect()
        gc.disable()
        before = sum(isinstance(found, Task) for found in gc.get_objects())
        try:
            with pytest.raises(RuntimeError, match="after shutdown"):
                executor.submit(repr, ShutsDown())
            assert sum(isinstance(found, Task) for found in gc.get_objects()) == before
        finally:
            gc.enable()


# --------------------------------------------------------------- globals and map


def test_a_map_sees_globals_as_they_were_when_it_was_called(
    run_script: Callable[..., Any],
) -> None:
    done = run_script(
        """
        from functools import partial
        from unittest.mock import Mock, patch

        from zmqexecutor import ZmqExecutor
        from zmqexecutor.master.tasks import PLAIN

        table = [1]

        def times(x):
            return x * table[0]

        class Scale:
            def by(self, x):
                return x * table[0]

        def changing(executor, seen):
            for number in (5, 6, 7):
                table[0] = number
                seen.append(executor.submit(times, 1).result())
                yield 1

        def call(fn):
            return fn()

        def redefined():
            for number in range(3):
                exec(f"def passed(): return {number}", globals())
                yield passed

        numbers = []

        def add(numbers, number):
            return sum(numbers) + number

        def growing():
            for number in (1, 2, 3):
                numbers.append(number)
                yield 1

        class Counting(ZmqExecutor):
            submitted = 0

            def submit(self, fn, /, *args, **kwargs):
                self.submitted += 1
                return super().submit(fn, *args, **kwargs)

        with ZmqExecutor(1) as pool:
            for executor in (pool, pool.options(name="view")):
                for value in (2, 3):
                    table[0] = value
                    assert list(executor.map(times, [1, 2])) == [value, 2 * value]
                    assert list(executor.map(times, [1, 2], chunksize=2)) == [value, 2 * value]
                    assert list(executor.map(Scale().by, [1, 2])) == [value, 2 * value]
                seen = []
                # Submitted at once: as at the first. Other calls see what has changed.
                assert list(executor.map(times, changing(executor, seen))) == [5, 5, 5]
                assert seen == [5, 6, 7]
                # What is passed counts as it is when it is passed, under the same name too.
                assert list(executor.map(call, redefined())) == [0, 1, 2]
                assert list(executor.map(partial(add, numbers), growing())) == [2, 4, 7]
                numbers.clear()
                # Submitted as results are consumed: each sees what has changed.
                seen = []
                mapped = executor.map(times, changing(executor, seen), buffersize=1)
                assert (list(mapped), seen) == ([5, 6, 7], [5, 6, 7])
        with Counting(1) as pool:
            assert list(pool.map(times, [1, 2, 3])) == [7, 14, 21]
            assert list(pool.map(times, [1, 2, 3], chunksize=2)) == [7, 14, 21]
            assert pool.submitted == 5
            pool.submit = wrapped = Mock(side_effect=pool.submit)
            assert list(pool.map(times, [1, 2])) == [7, 14]
            assert wrapped.call_count == 2
        with ZmqExecutor(1) as pool, patch.object(ZmqExecutor, "submit", autospec=True) as submit:
            submit.side_effect = lambda self, fn, *args: pool._submit(fn, args, {})
            assert list(pool.map(times, [1, 2])) == [7, 14]
            assert submit.call_count == 2
        print("done")
        """
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_an_executor_cannot_be_sent() -> None:
    class Holder:
        def __init__(self, executor: ZmqExecutor) -> None:
            self.executor = executor

        def work(self) -> None:
            pass

    with ZmqExecutor(1) as executor:
        for call in ((print, executor), (print, executor.options(retries=1))):
            with pytest.raises(SerializationError, match="an executor cannot be sent"):
                executor.submit(*call).result(30)
        with pytest.raises(SerializationError, match="__getstate__"):
            executor.submit(Holder(executor).work).result(30)


def test_an_executor_that_cannot_have_its_threads_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    with ZmqExecutor(1) as executor:
        assert executor.submit(square, 3).result(60) == 9
    monkeypatch.setattr("zmqexecutor.master.channels.check_threads", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        ZmqExecutor(1)
