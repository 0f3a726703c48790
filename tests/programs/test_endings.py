"""How programs end, and what then becomes of the work."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
import time

import pytest

from .conftest import Program


def test_exit_finishes_what_is_pending(both: Program) -> None:
    out = both("""
        import time
        def work(i):
            time.sleep(0.01)
            print(i, flush=True)
        pool = Pool(2)
        for i in range(10): pool.submit(work, i)
        print("end", flush=True)
    """)
    first, *rest = out.splitlines()
    assert first == "end" or "end" in rest
    assert sorted([first, *rest]) == sorted([*map(str, range(10)), "end"])


@pytest.mark.parametrize("end", ["raise ValueError('why')", "raise SystemExit(3)"])
def test_so_does_an_exit_with_an_error(both: Program, end: str) -> None:
    done = both.finish(f"""
        import time
        def work(i):
            time.sleep(0.01)
            print(i, flush=True)
        pool = Pool(2)
        for i in range(4): pool.submit(work, i)
        {end}
    """)
    assert sorted(done.stdout.split()) == list("0123")
    assert done.returncode == (3 if "Exit" in end else 1)
    assert done.stderr.count("Traceback") == (0 if "Exit" in end else 1)


def test_a_with_body_that_raises(both: Program) -> None:
    """What was submitted is done first."""
    done = both.finish("""
        import time
        def work(i):
            time.sleep(0.02)
            print(i, flush=True)
        try:
            with Pool(1) as pool:
                for i in range(4): pool.submit(work, i)
                raise ValueError("why")
        except ValueError:
            print("raised", flush=True)
        with Pool(1) as pool:
            pool.submit(work, 4)
            raise KeyError("and why")
    """)
    assert done.stdout.split() == [*"0123", "raised", "4"]
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert "KeyError: 'and why'" in done.stderr


def test_an_executor_dropped_without_shutdown(both: Program) -> None:
    """Its tasks are done, and its workers go while the program runs on."""
    out = both("""
        import gc, os, time
        def work(i): time.sleep(0.02); return i
        def drop():
            pool = Pool(2)
            pid = pool.submit(os.getpid).result()
            return pid, [pool.submit(work, i) for i in range(4)]
        def there(pid):
            try: os.kill(pid, 0)
            except ProcessLookupError: return False
            return True
        pid, futures = drop()
        gc.collect()
        print([future.result(30) for future in futures])
        end = time.monotonic() + 20
        while there(pid) and time.monotonic() < end: time.sleep(0.01)
        print(there(pid))
    """)
    assert out == "[0, 1, 2, 3]\nFalse\n"


def test_used_up_to_the_very_end(both: Program) -> None:
    """In an exit handler it works as long as nothing was shut down before."""
    out = both("""
        import atexit
        def last():
            try: print(pool.submit(pow, 2, 2).result(5))
            except RuntimeError as error: print(error)
        pool = Pool(1)
        pool.submit(pow, 2, 2).result()
        atexit.register(last)
    """)
    assert out == "cannot schedule new futures after interpreter shutdown\n" or (
        not both.ours and out == "cannot schedule new futures after shutdown\n"
    )


FOREVER = {
    "with": """
        def forever():
            print("begun", flush=True)
            while True: time.sleep(100)
        with Pool(2) as pool:
            pool.submit(forever).result()
    """,
    "busy": """
        def forever():
            print("begun", flush=True)
            while True: pass
        with Pool(2) as pool:
            futures = [pool.submit(forever) for _ in range(3)]
            for future in as_completed(futures): pass
    """,
    "map": """
        def forever(i):
            if not i: print("begun", flush=True)
            while True: time.sleep(100)
        with Pool(2) as pool:
            for result in pool.map(forever, range(5)): pass
    """,
    "no with": """
        def forever():
            print("begun", flush=True)
            while True: time.sleep(100)
        pool = Pool(2)
        pool.submit(forever).result()
    """,
    "at exit": """
        def forever():
            print("begun", flush=True)
            while True: time.sleep(100)
        pool = Pool(2)
        pool.submit(forever)
    """,
    "in asyncio": """
        import asyncio
        def forever():
            print("begun", flush=True)
            while True: time.sleep(100)
        async def main():
            with Pool(2) as pool:
                await asyncio.get_running_loop().run_in_executor(pool, forever)
        asyncio.run(main())
    """,
}


@pytest.mark.parametrize("how", FOREVER)
def test_ctrl_c_while_a_task_runs_for_ever(ours: Program, how: str) -> None:
    """It ends promptly, with one traceback. (The standard library's hangs, or shows several.)

    asyncio makes the first one a CancelledError, for which `with` waits for its tasks, in the
    standard library's pool too: there it takes another.
    """
    process = ours.start(
        "import time\nfrom concurrent.futures import as_completed\n" + textwrap.dedent(FOREVER[how])
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    pressed = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    while True:
        try:
            _, stderr = process.communicate(timeout=1 if how == "in asyncio" else 20)
            break
        except subprocess.TimeoutExpired:
            assert how == "in asyncio"
            assert time.monotonic() - pressed < 20
            os.killpg(process.pid, signal.SIGINT)
    # While the interpreter shuts down, it ignores the exception, after it has shown it.
    assert process.returncode == (0 if how == "at exit" else -signal.SIGINT), stderr
    if how != "in asyncio":
        assert stderr.count("Traceback") == 1, stderr
        assert time.monotonic() - pressed < 10, stderr
    assert stderr.rstrip(": \n").endswith("KeyboardInterrupt"), stderr


def test_ctrl_c_that_the_program_handles(ours: Program) -> None:
    """The pool goes on, and the task too: workers ignore Ctrl-C."""
    process = ours.start("""
        import time
        def work():
            print("begun", flush=True)
            time.sleep(0.5)
            return "done"
        with Pool(1) as pool:
            future = pool.submit(work)
            try:
                future.result()
            except KeyboardInterrupt:
                print("caught", future.result(), pool.submit(pow, 2, 2).result(), flush=True)
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    os.killpg(process.pid, signal.SIGINT)
    out, stderr = process.communicate(timeout=30)
    assert (out, stderr, process.returncode) == ("caught done 4\n", "", 0)


def test_a_signal_handler_that_exits(ours: Program) -> None:
    """SIGTERM as sys.exit, as services have it: what runs is finished."""
    process = ours.start("""
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        def work():
            print("begun", flush=True)
            time.sleep(0.5)
            print("done", flush=True)
        with Pool(1) as pool:
            pool.submit(work).result()
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    out, stderr = process.communicate(timeout=30)
    assert (out, stderr, process.returncode) == ("done\n", "", 5)
