"""Tasks that treat their worker badly: each costs at most its own future."""

from __future__ import annotations

import pytest

from .conftest import Program


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_megabytes_are_printed(both: Program, stream: str) -> None:
    done = both.finish(f"""
        import sys
        def work(i):
            for _ in range(1000): print(str(i) * 1999, file=sys.{stream})
            return i
        with Pool(2) as pool: results = list(pool.map(work, range(4)))
        print(results, file=sys.{"stderr" if stream == "stdout" else "stdout"})
    """)
    big, small = (done.stdout, done.stderr)[:: 1 if stream == "stdout" else -1]
    assert small == "[0, 1, 2, 3]\n"
    assert len(big) == 4 * 1000 * 2000
    assert [big.count(digit) for digit in "0123"] == [1999 * 1000] * 4


def test_a_word_without_a_newline_is_printed(both: Program) -> None:
    out = both("""
        def work(): print("word", end="")
        with Pool(1) as pool: pool.submit(work).result()
    """)
    assert out == "word"


BAD = {
    "streams": {
        "closes 1 and 2": "os.close(1); os.close(2)",
        "opens others in their place": (
            "[os.close(fd) for fd in (0, 1, 2)]; [os.open(os.devnull, os.O_RDWR) for _ in 'abc']"
        ),
        "sets sys.stdout to None": "sys.stdout = sys.stderr = None",
        "closes sys.stdout": "sys.stdout.close(); sys.stderr.close()",
        "closes sys.stdin": "sys.stdin.close()",
        "uses up its files": (
            "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
            "try:\n"
            "    while True: keep.append(open(os.devnull))\n"
            "except OSError: pass"
        ),
    },
    "surroundings": {
        "changes directory": "os.chdir('/')",
        "removes its directory": "p = tempfile.mkdtemp(); os.chdir(p); os.rmdir(p)",
        "clears the environment": "os.environ.clear()",
        "clears sys.path": "sys.path.clear()",
        "forgets modules": (
            "for m in list(sys.modules):\n"
            "    if 'zmq' not in m and m not in ('sys', '__main__', 'builtins'): del sys.modules[m]"
        ),
        "destroys the shared context of ZeroMQ": "import zmq; zmq.Context.instance().destroy()",
    },
    "processes": {
        "forks": "pid = os.fork(); pid and os.waitpid(pid, 0)",
        "forks a child that exits": "pid = os.fork(); pid or os._exit(0); os.waitpid(pid, 0)",
        "forks a child that raises": "if not os.fork(): raise SystemExit(5)\nos.wait()",
        "forks children and never waits": "for _ in 'abc': os.fork() or os._exit(0)",
        "starts a program": "subprocess.check_call([sys.executable, '-S', '-c', ''])",
    },
    "threads and signals": {
        "leaves a thread": "threading.Thread(target=time.sleep, args=(1000,)).start()",
        "leaves a busy thread": "threading.Thread(target=spin).start()",
        "leaves a daemon thread": "threading.Thread(target=spin, daemon=True).start()",
        "ignores SIGTERM": "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "blocks all signals": "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
        "reaps by a handler": "signal.signal(signal.SIGCHLD, lambda *_: os.wait())",
        "has alarms ring": "signal.signal(14, lambda *_: 0); signal.setitimer(0, 0.001, 0.001)",
    },
    "the interpreter": {
        "sets a tracer": "sys.settrace(lambda *_: None)",
        "collects no garbage": "gc.disable(); gc.freeze()",
        "lowers the recursion limit": "sys.setrecursionlimit(60)",
        "stops the clock": "time.time = time.monotonic = time.sleep = lambda *_: 0",
        "replaces print and open": "builtins.print = builtins.open = None",
    },
}


@pytest.mark.parametrize("group", BAD)
def test_it_costs_nothing(ours: Program, group: str) -> None:
    """The task itself is done, the next too, in the same worker, and the end is prompt."""
    functions, names = [], list(BAD[group])
    for number, body in enumerate(BAD[group].values()):
        lines = "".join(f"    {line}\n" for line in body.split("\n"))
        functions.append(f"def bad_{number}():\n{lines}    return {number}\n")
    ours.write("functions.txt", "".join(functions))
    done = ours.finish(f"""
        import atexit, builtins, gc, os, pathlib, resource, signal, subprocess, sys, tempfile
        import threading, time, warnings
        keep = []
        def spin():
            while True: time.sleep(0.001)
        def allow_forks(): warnings.simplefilter("ignore", DeprecationWarning)
        def good(): return os.getpid()
        exec(pathlib.Path(__file__).with_name("functions.txt").read_text())
        names = {names}
        pools = [Pool(1, initializer=allow_forks) for _ in names]
        pids = [pool.submit(good) for pool in pools]
        tasks = [pool.submit(globals()[f"bad_{{i}}"]) for i, pool in enumerate(pools)]
        for i, name in enumerate(names):
            try:
                assert tasks[i].result(30) == i
                for _ in range(2): assert pools[i].submit(good).result(30) == pids[i].result()
            except BaseException as error:
                print(name, repr(error))
        ended = time.monotonic()
        for pool in pools: pool.shutdown(wait=False)
        for pool in pools: pool.shutdown()
        print("end", time.monotonic() - ended < 8)
    """)
    assert (done.stdout, done.stderr) == ("end True\n", "")


def test_exit_handlers_of_a_worker(both: Program) -> None:
    out = both("""
        import multiprocessing.util, os
        def leave(): open("left", "x").close()
        def register(): multiprocessing.util.Finalize(None, leave, exitpriority=1)
        with Pool(1) as pool: pool.submit(register).result()
        print(os.path.exists("left"))
    """)
    assert out == "True\n"


def test_what_tasks_raise(both: Program) -> None:
    """All of it is the result of the one task, with the type and arguments."""
    out = both("""
        import asyncio, os, sys
        from concurrent.futures.process import BrokenProcessPool
        def raises(i):
            if i == 0: raise SystemExit(3)
            if i == 1: sys.exit()
            if i == 2: raise KeyboardInterrupt
            if i == 3: raise GeneratorExit
            if i == 4: raise BaseException("b")
            if i == 5: raise asyncio.CancelledError
            if i == 6: raise StopIteration(1)
            if i == 7: return raises(i)
            if i == 8: return bytearray(2 ** 62)
            if i == 9: raise BrokenProcessPool("not really")
            if i == 10: raise OSError(2, "gone", "name")
            if i == 11: raise UnicodeDecodeError("utf-8", b"x", 0, 1, "why")
            if i == 12: raise TimeoutError
            if i == 13:
                try: raise ValueError("inner")
                except ValueError as error: raise KeyError("outer") from error
        with Pool(1) as pool:
            pid = pool.submit(os.getpid).result()
            for i in range(14):
                error = pool.submit(raises, i).exception()
                print(type(error).__name__, str(error)[:30], "Traceback" in str(error.__cause__))
            print(pool.submit(os.getpid).result() == pid)
    """)
    assert out == (
        "SystemExit 3 True\nSystemExit  True\nKeyboardInterrupt  True\nGeneratorExit  True\n"
        "BaseException b True\nCancelledError  True\nStopIteration 1 True\n"
        "RecursionError maximum recursion depth exceed True\nMemoryError  True\n"
        "BrokenProcessPool not really True\nFileNotFoundError [Errno 2] gone: 'name' True\n"
        "UnicodeDecodeError 'utf-8' codec can't decode byt True\nTimeoutError  True\n"
        "KeyError 'outer' True\nTrue\n"
    )


def test_exceptions_that_cannot_travel(ours: Program) -> None:
    """There the standard library's pool breaks as a whole, or loses the text."""
    out = ours("""
        import os, threading
        class TwoArguments(Exception):
            def __init__(self, one, two): super().__init__(f"{one} and {two}")
        class Locked(Exception):
            def __init__(self): super().__init__("locked"); self.lock = threading.Lock()
        class Bad(Exception):
            def __reduce__(self): return exec, ("raise SystemExit('on arrival')",)
        class Worse(Exception):
            def __reduce__(self): raise KeyboardInterrupt("on leaving")
        class Mute(Exception):
            def __str__(self): raise ValueError("mute")
        class False_(Exception):
            def __bool__(self): return False
        def raises(i):
            raise [lambda: TwoArguments(1, 2), Locked, Bad, Worse, Mute, False_][i]()
        with Pool(1) as pool:
            pid = pool.submit(os.getpid).result()
            for i in range(6):
                error = pool.submit(raises, i).exception()
                print(type(error).__name__, "raises" in str(error.__cause__))
            print(pool.submit(os.getpid).result() == pid)
    """)
    lines = out.splitlines()
    assert lines[-1] == "True"
    assert lines[4:6] == ["Mute True", "False_ True"]
    assert len(lines) == 7
    assert all(line.startswith(("SerializationError", "TwoArg")) for line in lines[:4]), out


def test_what_a_killed_worker_costs(ours: Program) -> None:
    out = ours("""
        import os, signal
        def die(i):
            if i == 5: os.kill(os.getpid(), signal.SIGKILL)
            if i == 9: os._exit(4)
            if i == 13: os.kill(os.getpid(), signal.SIGTERM)
            return i
        with Pool(2) as pool:
            futures = [pool.submit(die, i) for i in range(20)]
            for i, future in enumerate(futures):
                error = future.exception()
                if error: print(i, type(error).__name__, error.signal, error.exitcode)
                else: assert future.result() == i
    """)
    assert out == (
        "5 WorkerLostError SIGKILL -9\n9 WorkerLostError None 4\n13 WorkerLostError SIGTERM -15\n"
    )
