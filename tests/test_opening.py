"""The first executor of a program is opened in a thread while its modules are imported."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import textwrap
import uuid
from collections.abc import Callable

import psutil
import pytest

from tests.conftest import eventually
from zmqexecutor import ZmqExecutor
from zmqexecutor.opening import Opening

Run = Callable[..., subprocess.CompletedProcess[str]]

HOOK = textwrap.dedent(
    """
    import os, signal, sys, threading, time, warnings
    from importlib.abc import MetaPathFinder
    from zmqexecutor import ZmqExecutor

    warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads

    def while_it_opens(action):
        \"\"\"Have this done by the thread that opens the first executor.\"\"\"

        class Finder(MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "zmqexecutor.pool":
                    sys.meta_path.remove(self)
                    action()

        sys.meta_path.insert(0, Finder())

    """
)


@pytest.fixture
def run_program(run_script: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a program with `while_it_opens`, of which no process may be left."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("MARK_OF_THE_TEST", mark)

    def marked() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and mark in process.environ().values():
                    found.append(process)
        return found

    def run_it(source: str) -> subprocess.CompletedProcess[str]:
        done = run_script(HOOK + textwrap.dedent(source))
        assert eventually(lambda: not marked()), marked()
        return done

    return run_it


@pytest.fixture
def run(run_program: Run) -> Callable[[str], str]:
    """Run a program with `while_it_opens`; return what it prints."""

    def run_it(source: str) -> str:
        done = run_program(source)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run_it


def test_the_constructor_does_not_wait(run: Callable[[str], str]) -> None:
    assert run(
        """
        go_on = threading.Event()
        while_it_opens(go_on.wait)
        executor = ZmqExecutor(1)
        assert "zmq" not in sys.modules
        threading.Timer(0.05, go_on.set).start()
        print(executor.submit(pow, 2, 10).result())
        print(*executor.map(abs, [-1, -2]), len(executor.workers))
        executor.shutdown()
        """
    ) == ("1024\n1 2 1\n")


@pytest.mark.parametrize(
    "use",
    [
        "",
        "del executor",
        "executor.shutdown()",
        "executor.shutdown(wait=False)",
        "executor.kill_workers()",
        "executor.terminate_workers()",
        "with executor: pass",
    ],
)
def test_an_executor_that_is_not_used(run: Callable[[str], str], use: str) -> None:
    """`no_leaks` sees to it that nothing is left of it."""
    source = "while_it_opens(lambda: time.sleep(0.1))\nexecutor = ZmqExecutor(2)\n"
    assert run(source + use + "\nprint('end')") == "end\n"


def test_a_forgotten_one_ends_before_the_program_does(run: Callable[[str], str]) -> None:
    run(
        """
        while_it_opens(lambda: dropped.wait())
        dropped = threading.Event()
        executor = ZmqExecutor(1)
        pid = executor._opening  # what is left when the executor has gone
        del executor
        dropped.set()
        pid.result()
        del pid
        deadline = time.monotonic() + 30
        while threading.active_count() > 1:
            assert time.monotonic() < deadline, threading.enumerate()
            time.sleep(0.01)
        """
    )


def test_many_threads_that_submit_at_once(run: Callable[[str], str]) -> None:
    assert (
        run(
            """
            executor = ZmqExecutor(2)
            results = []

            def use(number):
                results.append(executor.submit(abs, -number).result())

            threads = [threading.Thread(target=use, args=(number,)) for number in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            print(sorted(results) == list(range(16)))
            executor.shutdown()
            """
        )
        == "True\n"
    )


def test_a_fork_while_it_opens(run: Callable[[str], str]) -> None:
    """The child finds all or nothing, and no lock that nobody will release."""
    assert (
        run(
            """
            from zmqexecutor import ForkedExecutorError
            while_it_opens(lambda: time.sleep(0.2))
            executor = ZmqExecutor(1)
            child = os.fork()
            if child == 0:
                try:
                    executor.submit(abs, -1)
                except ForkedExecutorError:
                    with ZmqExecutor(1) as own:
                        os._exit(own.submit(abs, -7).result())
                os._exit(1)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            print(executor.submit(abs, -2).result())
            executor.shutdown()
            """
        )
        == "7\n2\n"
    )


def test_a_thread_that_opens_it_may_fork(run: Callable[[str], str]) -> None:
    """An import may: it does not wait for itself."""
    assert (
        run(
            """
            def fork():
                child = os.fork()
                if child == 0:
                    os._exit(3)
                statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

            statuses = []
            while_it_opens(fork)
            with ZmqExecutor(1) as executor:
                print(executor.submit(abs, -2).result(), statuses)
            """
        )
        == "2 [3]\n"
    )


def test_a_signal_handler_that_submits_while_it_opens(run: Callable[[str], str]) -> None:
    assert (
        run(
            """
            handled = []
            signal.signal(signal.SIGUSR1, lambda *_: handled.append(executor.submit(abs, -3)))

            def interrupt():
                made.wait()
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.1)

            made = threading.Event()
            while_it_opens(interrupt)
            with ZmqExecutor(1) as executor:
                made.set()
                print(executor.submit(abs, -2).result())
                print(*(future.result() for future in handled))
            """
        )
        == "2\n3\n"
    )


def test_a_finalizer_in_the_thread_that_opens_it(run: Callable[[str], str]) -> None:
    """It cannot wait for what its own thread is to do."""
    assert (
        run(
            """
            refused = []

            def finalize():
                made.wait()
                try:
                    executor.submit(abs, -1)
                except RuntimeError as error:
                    refused.append(str(error))
                executor.shutdown()  # nothing that could be waited for

            made = threading.Event()
            while_it_opens(finalize)
            executor = ZmqExecutor(1)
            made.set()
            print(executor.submit(abs, -2).result(), refused)
            executor.shutdown()
            """
        )
        == "2 ['a finalizer cannot use an executor that is still being opened']\n"
    )


def test_what_prevents_it_is_told_by_each_use(run: Callable[[str], str]) -> None:
    assert (
        run(
            """
            import resource
            from concurrent.futures import Future

            before = resource.getrlimit(resource.RLIMIT_NOFILE)
            while_it_opens(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (20, before[1])))
            with ZmqExecutor(1) as executor:
                for use in (
                    lambda: executor.submit(abs, -1),
                    lambda: executor.map(abs, [-1]),
                    lambda: executor.wait_for_workers(1),
                    lambda: executor.workers,
                ):
                    try:
                        use()
                    except OSError as error:
                        print("open files" in str(error))
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            try:
                print(os.waitpid(-1, os.WNOHANG))
            except ChildProcessError:
                print("no child")
            with ZmqExecutor(1) as executor:
                print(executor.submit(abs, -2).result())
            """
        )
        == "True\nTrue\nTrue\nTrue\nno child\n2\n"
    )


def test_ctrl_c_while_it_opens(run_program: Run) -> None:
    done = run_program(
        """
            def interrupt():
                made.wait()
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)

            made = threading.Event()
            while_it_opens(interrupt)
            executor = ZmqExecutor(1)
            made.set()
            executor.submit(abs, -1)
            executor.submit(time.sleep, 1000).result()
            """
    )
    assert done.returncode in (1, -signal.SIGINT)  # CPython forgets why, if a thread evaluates text
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("initializer=print, initargs=(threading.Lock(),)", "SerializationError"),
        ("endpoint='tcp://nowhere'", "ValueError"),
        ("endpoint='ipc:///no/such/folder/at/all'", "OSError"),
    ],
)
def test_arguments_that_only_the_engine_can_check(
    run: Callable[[str], str], arguments: str, error: str
) -> None:
    """The constructor raises it, also of the first executor."""
    source = f"""
        import zmqexecutor
        try:
            ZmqExecutor(1, {arguments})
        except (ValueError, OSError, zmqexecutor.SerializationError) as error:
            print([kind.__name__ for kind in type(error).__mro__])
        """
    assert error in run(source)


def test_an_executor_that_a_module_makes_when_it_is_imported(run: Callable[[str], str]) -> None:
    """It is used there too, with the module's import lock held by the thread that waits."""
    assert (
        run(
            """
            from pathlib import Path

            Path(__file__).with_name("makes_one.py").write_text(
                "from zmqexecutor import ZmqExecutor\\n"
                "executor = ZmqExecutor(1)\\n"
                "value = executor.submit(abs, -5).result()\\n"
            )
            import makes_one

            print(makes_one.value)
            """
        )
        == "5\n"
    )


def test_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    assert Opening(lambda: 5, at_once=False).result() == 5
    with pytest.raises(ZeroDivisionError):
        Opening(lambda: 1 // 0, at_once=False).result()


def test_later_executors_are_opened_by_the_constructor() -> None:
    with ZmqExecutor(1) as first:
        first.submit(abs, -1).result(60)
        with ZmqExecutor(1) as executor:
            assert executor._opening._thread is None
            assert executor.submit(abs, -1).result(60) == 1
