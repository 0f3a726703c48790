"""The engine of a program's first executor is imported and opened when it is first used."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import textwrap
import threading
import uuid
from collections.abc import Callable

import psutil
import pytest

from tests.conftest import eventually
from zmqexecutor import ZmqExecutor

Run = Callable[..., subprocess.CompletedProcess[str]]

HOOK = textwrap.dedent(
    """
    import os, signal, sys, threading, time, warnings
    from importlib.abc import MetaPathFinder
    from zmqexecutor import ForkedExecutorError, ZmqExecutor

    warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads

    def while_it_opens(action):
        \"\"\"Have this done by the thread that opens the first executor, when it does.\"\"\"

        class Finder(MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "zmqexecutor.pool":
                    sys.meta_path.remove(self)
                    action()

        sys.meta_path.insert(0, Finder())

    def supervisor():
        \"\"\"The process id of this program's one child.\"\"\"
        with open(f"/proc/self/task/{os.getpid()}/children") as children:
            return int(children.read())

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


def test_the_constructor_opens_nothing(run: Callable[[str], str]) -> None:
    assert (
        run(
            """
            executor = ZmqExecutor(1)
            print("zmq" in sys.modules, *executor.workers)
            print(executor.submit(pow, 2, 10).result())
            print(*executor.map(abs, [-1, -2]), len(executor.workers))
            executor.shutdown()
            """
        )
        == "False\n1024\n1 2 1\n"
    )


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
        "keep = executor.submit",
    ],
)
def test_an_executor_that_is_not_used(run: Callable[[str], str], use: str) -> None:
    source = "executor = ZmqExecutor(2)\n" + use
    assert run(source + "\nprint('end', 'zmq' in sys.modules)") == "end False\n"


def test_one_that_is_dropped_leaves_no_process(run: Callable[[str], str]) -> None:
    run(
        """
        warnings.simplefilter("error")  # one of a process that was not waited for
        executor = ZmqExecutor(2)
        pid = supervisor()
        del executor
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            pass
        else:
            raise AssertionError("it is there")
        """
    )


@pytest.mark.parametrize("end", ["shutdown()", "kill_workers()"])
def test_one_that_was_ended_before_its_first_use(run: Callable[[str], str], end: str) -> None:
    source = f"""
        executor = ZmqExecutor(1)
        executor.{end}
        executor.{end}
        for use in (
            lambda: executor.submit(abs, -1),
            lambda: executor.map(abs, [-1]),
            lambda: executor.share(1),
            lambda: executor.wait_for_workers(1),
        ):
            try:
                use()
            except RuntimeError as error:
                print(error)
        """
    assert run(source) == 4 * "cannot schedule new futures after shutdown\n"


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


def test_a_fork_before_its_first_use(run: Callable[[str], str]) -> None:
    assert (
        run(
            """
            executor = ZmqExecutor(1)
            child = os.fork()
            if child == 0:
                executor.shutdown()  # has no effect
                try:
                    executor.submit(abs, -1)
                except ForkedExecutorError:
                    del executor
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


@pytest.mark.parametrize("view", ["", ".options(retries=1)"], ids=["submit", "options"])
def test_a_fork_while_another_thread_opens_it(run: Callable[[str], str], view: str) -> None:
    """The child must not find the import locks of a thread that is not there."""
    source = f"""
        def use():
            print(executor{view}.submit(abs, -2).result())

        opening = threading.Event()
        while_it_opens(lambda: opening.set() or time.sleep(0.1))
        executor = ZmqExecutor(1)
        thread = threading.Thread(target=use)
        thread.start()
        opening.wait()
        child = os.fork()
        if child == 0:
            with ZmqExecutor(1) as own:
                os._exit(own.submit(abs, -7).result())
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        thread.join()
        executor.shutdown()
        """
    assert sorted(run(source)) == ["\n", "\n", "2", "7"]


USES = {
    "submit": "print(executor.submit(abs, -3).result())",
    "another's": "print(ZmqExecutor(1).submit(abs, -3).result())",
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_finalizer_while_its_thread_opens_one(run: Callable[[str], str], use: str) -> None:
    """Or a signal handler: it cannot wait for what it has interrupted, and is told so."""
    source = f"""
        def finalize():
            try:
                {use}
            except RuntimeError as error:
                print(error)

        while_it_opens(finalize)
        with ZmqExecutor(1) as executor:
            print(executor.submit(abs, -2).result())
            {use}
        """
    said, *results = run(source).splitlines()
    assert "signal handler or a finalizer" in said
    assert results == ["2", "3"]


def test_an_executor_that_is_shut_down_while_its_thread_opens_it(run: Callable[[str], str]) -> None:
    assert (
        run(
            """
            while_it_opens(lambda: executor.shutdown())
            executor = ZmqExecutor(1)
            try:
                executor.submit(abs, -2)
            except RuntimeError as error:
                print(error)
            """
        )
        == "cannot schedule new futures after shutdown\n"
    )


def test_a_signal_handler_that_shuts_down_while_the_engine_is_made(
    run: Callable[[str], str],
) -> None:
    assert (
        run(
            """
            from zmqexecutor.system.directories import PrivateDirectory

            make = PrivateDirectory.__init__

            def interrupted(self):
                executor.shutdown()
                make(self)

            PrivateDirectory.__init__ = interrupted
            executor = ZmqExecutor(1)
            try:
                executor.submit(abs, -2)
            except RuntimeError as error:
                print(error)
            """
        )
        == "cannot schedule new futures after shutdown\n"
    )


def test_what_prevents_it_is_told_by_each_use_until_it_is_mended(
    run: Callable[[str], str],
) -> None:
    assert (
        run(
            """
            import resource

            before = resource.getrlimit(resource.RLIMIT_NOFILE)
            with ZmqExecutor(1) as executor:
                import zmqexecutor.pool
                resource.setrlimit(resource.RLIMIT_NOFILE, (20, before[1]))
                for use in (
                    lambda: executor.submit(abs, -1),
                    lambda: executor.map(abs, [-1]),
                    lambda: executor.wait_for_workers(1),
                ):
                    try:
                        use()
                    except OSError as error:
                        print("open files" in str(error))
                try:
                    print(os.waitpid(-1, os.WNOHANG))
                except ChildProcessError:
                    print("no child")
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
                print(executor.submit(abs, -2).result())
            """
        )
        == "True\nTrue\nTrue\nno child\n2\n"
    )


def test_a_signal_handler_that_ends_what_its_thread_is_ending(run: Callable[[str], str]) -> None:
    """SIGCHLD comes when the supervisor has ended, and is waited for."""
    assert (
        run(
            """
            executor = ZmqExecutor(1)
            signal.signal(signal.SIGCHLD, lambda *_: executor.shutdown())
            executor.shutdown()
            print("end")
            """
        )
        == "end\n"
    )


def test_initargs_whose_pickling_uses_another_executor(run: Callable[[str], str]) -> None:
    assert (
        run(
            """
            class Odd:
                def __reduce__(self):
                    return int, (other.submit(abs, -4).result(),)

            def initialize(value):
                global known
                known = value

            other = ZmqExecutor(1)
            with ZmqExecutor(1, initializer=initialize, initargs=(Odd(),)) as executor:
                print(executor.submit(lambda: known).result())
            other.shutdown()
            """
        )
        == "4\n"
    )


def test_an_import_that_was_interrupted_says_so_later(run: Callable[[str], str]) -> None:
    assert (
        run(
            """
            def interrupt():
                raise KeyboardInterrupt

            def fail():
                raise AttributeError("partially initialized")

            executor = ZmqExecutor(1)
            while_it_opens(interrupt)
            try:
                executor.submit(abs, -1)
            except KeyboardInterrupt:
                pass
            while_it_opens(fail)
            try:
                executor.submit(abs, -1)
            except RuntimeError as error:
                print(error)
            print(executor.submit(abs, -1).result())
            executor.shutdown()
            """
        )
        == "the import of what executors need was interrupted before; start the program again\n1\n"
    )


def test_a_parent_that_is_killed_before_its_supervisor_looks(run_program: Run) -> None:
    """It must see that, though a fork of the parent that lives on keeps the connection open."""
    done = run_program(
        """
        executor = ZmqExecutor(1)
        pid = supervisor()
        if os.fork() == 0:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                try:
                    os.kill(pid, 0)
                except ProcessLookupError:
                    os.write(1, b"gone")
                    break
                time.sleep(0.01)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "gone")


def test_a_supervisor_that_is_killed_before_it_is_needed(run: Callable[[str], str]) -> None:
    assert (
        run(
            """
            executor = ZmqExecutor(1)
            os.kill(supervisor(), signal.SIGKILL)
            print(executor.submit(abs, -2).result())
            executor.shutdown()
            """
        )
        == "2\n"
    )


def test_ctrl_c_while_it_opens(run_program: Run) -> None:
    done = run_program(
        """
        while_it_opens(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(60))
        with ZmqExecutor(1) as executor:
            executor.submit(abs, -1)
        """
    )
    assert done.returncode == -signal.SIGINT
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


LATE = {
    "a thread that outlives the main one": """
        def use():
            threading.main_thread().join()
            try:
                print(executor.submit(abs, -1).result())
            except RuntimeError as error:
                print(error)

        executor = ZmqExecutor(1)
        threading.Thread(target=use).start()
        """,
    "atexit": """
        import atexit

        def use():
            try:
                print(executor.submit(abs, -1).result())
            except RuntimeError as error:
                print(error)

        executor = ZmqExecutor(1)
        atexit.register(use)
        """,
}


@pytest.mark.parametrize("source", LATE.values(), ids=LATE)
def test_a_first_use_after_the_end_of_the_main_thread(
    run: Callable[[str], str], source: str
) -> None:
    """As with the standard library."""
    assert run(source) == "cannot schedule new futures after interpreter shutdown\n"


def test_the_end_of_the_main_thread_waits_for_one_that_opens(run: Callable[[str], str]) -> None:
    """What is submitted by then is done, or refused."""
    said = run(
        """
        def use():
            try:
                print(executor.submit(abs, -1).result())
            except RuntimeError as error:
                print(error)

        opening = threading.Event()
        while_it_opens(opening.set)
        executor = ZmqExecutor(1)
        threading.Thread(target=use).start()
        opening.wait()
        """
    )
    assert said in ("1\n", "cannot schedule new futures after interpreter shutdown\n")


def test_an_executor_that_a_module_makes_when_it_is_imported(run: Callable[[str], str]) -> None:
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


def test_later_executors_are_opened_by_the_constructor() -> None:
    with ZmqExecutor(1) as first:
        first.submit(abs, -1).result(60)
        with ZmqExecutor(1) as executor:
            assert executor._opening.opened


def test_an_interrupt_of_the_constructor_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`no_leaks` sees to it."""

    def interrupt(self: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ZmqExecutor(1)
