"""The program that uses the pool is as it was; asyncio works with it."""

from __future__ import annotations

from .conftest import Program


def test_the_host_is_unharmed_during_heavy_use(both: Program) -> None:
    """Handlers, hooks, filters, loggers, children and their exit codes stay its own."""
    out = both("""
        import asyncio, gc, locale, logging, os, signal, subprocess, sys, threading, warnings

        def handler(*args): caught.append(args[0])
        caught, hooked, records = [], [], []
        for number in (signal.SIGUSR1, signal.SIGALRM):
            signal.signal(number, handler)
        sys.excepthook = sys.excepthook
        threading.excepthook = lambda args: hooked.append(args.exc_type)
        sys.unraisablehook = lambda args: hooked.append(args)
        class Keep(logging.Handler):
            def emit(self, record): records.append(record)
        logging.getLogger().addHandler(Keep())
        logging.getLogger().setLevel(logging.DEBUG)
        warnings.simplefilter("always")
        warnings.showwarning = lambda *args, **kwargs: hooked.append(args)

        def state():
            return (
                [signal.getsignal(n) for n in signal.valid_signals()],
                signal.pthread_sigmask(0, []),
                signal.set_wakeup_fd(-1), signal.getitimer(signal.ITIMER_REAL)[1],
                sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook,
                list(warnings.filters), logging.root.level, list(logging.root.handlers),
                logging.getLogger("concurrent.futures").handlers, logging.lastResort,
                os.getcwd(), os.umask(0o022), list(sys.path), list(sys.argv), dict(os.environ),
                sys.getswitchinterval(), sys.getrecursionlimit(), gc.isenabled(),
                gc.get_threshold(), sys.gettrace(), sys.getprofile(),
                threading.stack_size(), locale.setlocale(0),
                type(asyncio.get_event_loop_policy()), sys.stdin, sys.stdout, sys.stderr,
                list(sys.meta_path), list(sys.path_hooks),
                threading.current_thread(),
            )

        os.umask(0o022)
        before = state()
        mine = subprocess.Popen(
            [sys.executable, "-c", "input(); raise SystemExit(7)"], stdin=subprocess.PIPE)
        with Pool(2) as pool:
            futures = [pool.submit(pow, 2, i) for i in range(1500)]
            command = [sys.executable, "-S", "-c", "import sys; sys.exit(int(sys.argv[1]))"]
            print([subprocess.call([*command, str(i)]) for i in (0, 5)])
            pid = os.fork()
            if not pid: os._exit(9)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os.kill(os.getpid(), signal.SIGUSR1)
            print(caught == [signal.SIGUSR1], all(f.result(60) for f in futures))
            during = state()
        mine.communicate(b"\\n")
        print(mine.returncode)
        after = state()
        for n, (a, b, c) in enumerate(zip(before, during, after)):
            if not a == b == c: print(n, a, b, c)
        try:
            print("a child is left", os.waitpid(-1, os.WNOHANG))
        except ChildProcessError:
            print("no child")
        hooked = [h for h in hooked if "fork" not in str(h)]
        print(hooked, [r for r in records if r.levelno > logging.DEBUG])
        print([t for t in threading.enumerate() if t is not threading.current_thread()])
    """)
    expected = "[0, 5]\n9\nTrue True\n7\nno child\n[] []\n[]\n"
    if not both.ours:  # its resource tracker stays
        expected = expected.replace("no child", "a child is left (0, 0)")
        out = out.replace("no child", "a child is left (0, 0)")
    assert out == expected


def test_a_host_that_waits_for_any_child(ours: Program) -> None:
    """SIGCHLD ignored, or a handler that reaps what it finds: the pool does not need it."""
    out = ours("""
        import os, signal
        def reap(*_):
            try:
                while os.waitpid(-1, os.WNOHANG)[0]: pass
            except ChildProcessError: pass
        for handler in (reap, signal.SIG_IGN):
            signal.signal(signal.SIGCHLD, handler)
            with Pool(2) as pool:
                print(sum(pool.map(pow, range(50), [2] * 50)))
                print(type(pool.submit(os._exit, 3).exception()).__name__)
                print(pool.submit(pow, 2, 2).result())
    """)
    assert out == "40425\nWorkerLostError\n4\n" * 2


def test_without_standard_streams(both: Program) -> None:
    """As a daemon, or under pythonw: closed before, or None."""
    out = both("""
        import os, sys
        copy = os.dup(1)
        for fd in (0, 1, 2): os.close(fd)
        sys.stdin = sys.stdout = sys.stderr = None
        def work(x):
            print("lost")
            return x * 2
        with Pool(2) as pool:
            os.write(copy, repr(list(pool.map(work, range(3)))).encode())
    """)
    assert out == "[0, 2, 4]"


def test_logging_of_tasks(both: Program) -> None:
    """As the initializer configures it, in each worker; the host's is untouched."""
    out = both("""
        import logging, sys
        def configure(): logging.basicConfig(stream=sys.stdout, level="INFO", format="%(message)s")
        def work(x): logging.getLogger("mine").info("task %s", x); return x
        with Pool(1, initializer=configure) as pool:
            print([pool.submit(work, x).result() for x in range(2)], flush=True)
        print(logging.root.handlers)
    """)
    assert sorted(out.splitlines()) == sorted(["task 0", "task 1", "[0, 1]", "[]"])


def test_a_worker_knows_that_it_is_one(both: Program) -> None:
    """Programs ask `parent_process` or the name, and logs show it."""
    out = both("""
        import multiprocessing, os
        def who():
            parent = multiprocessing.parent_process()
            return multiprocessing.current_process().name, parent and parent.pid
        with Pool(1) as pool:
            name, parent = pool.submit(who).result()
            print(name != "MainProcess", parent == os.getpid())
    """)
    assert out == "True True\n"


def test_logging_through_a_queue(both: Program) -> None:
    """The recipe of the logging cookbook."""
    out = both("""
        import logging, logging.handlers, multiprocessing
        def work(queue, x):
            logger = logging.getLogger("work")
            logger.handlers = [logging.handlers.QueueHandler(queue)]
            logger.setLevel(logging.INFO)
            logger.info("task %s", x)
        class Show(logging.Handler):
            def emit(self, record): shown.append(f"{record.name}: {record.getMessage()}")
        shown = []
        if __name__ == "__main__":
            with multiprocessing.Manager() as manager:
                queue = manager.Queue()
                listener = logging.handlers.QueueListener(queue, Show())
                listener.start()
                with Pool(2) as pool:
                    for x in range(3): pool.submit(work, queue, x)
                listener.stop()
            print(sorted(shown))
    """)
    assert out == "['work: task 0', 'work: task 1', 'work: task 2']\n"


def test_a_task_in_the_main_thread_with_alarms(both: Program) -> None:
    """Signal handlers and timers work in tasks."""
    out = both("""
        import signal, threading, time
        class Late(Exception): pass
        def late(*_): raise Late("too late")
        def limited(seconds):
            signal.signal(signal.SIGALRM, late)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            try: time.sleep(seconds)
            finally: signal.setitimer(signal.ITIMER_REAL, 0)
            return threading.current_thread() is threading.main_thread()
        with Pool(1) as pool:
            print(pool.submit(limited, 0).result())
            print(repr(pool.submit(limited, 100).exception()))
            print(pool.submit(pow, 2, 2).result())
    """)
    assert out == "True\nLate('too late')\n4\n"


# ------------------------------------------------------------------------ asyncio


def test_asyncio_with_many_at_once(both: Program) -> None:
    out = both("""
        import asyncio
        def square(x):
            if x == 150: raise ValueError(x)
            return x * x
        async def main():
            loop = asyncio.get_running_loop()
            with Pool(2) as pool:
                ticks = 0
                async def tick():
                    nonlocal ticks
                    while True:
                        ticks += 1
                        await asyncio.sleep(0)
                ticker = asyncio.create_task(tick())
                results = await asyncio.gather(
                    *(loop.run_in_executor(pool, square, i) for i in range(200)),
                    return_exceptions=True)
                ticker.cancel()
                print(repr(results.pop(150)), sum(results), ticks > 10)
                print(await asyncio.wrap_future(pool.submit(square, 3)))
        asyncio.run(main())
    """)
    assert out == "ValueError(150) 2624200 True\n"[:-1] + "\n9\n"


def test_asyncio_cancelled_and_timed_out(both: Program) -> None:
    """The loop goes on at once; what had not begun never does."""
    out = both("""
        import asyncio, os, time
        def wait_for(path):
            while not os.path.exists(path): time.sleep(0.01)
        def touch(path): open(path, "x").close()
        async def main():
            loop = asyncio.get_running_loop()
            with Pool(1) as pool:
                busy = loop.run_in_executor(pool, wait_for, "go")
                for i in range(9): loop.run_in_executor(pool, wait_for, "go")
                queued = loop.run_in_executor(pool, touch, "never")
                started = time.monotonic()
                try: await asyncio.wait_for(asyncio.shield(busy), 0.2)
                except asyncio.TimeoutError: print("timeout")
                queued.cancel()
                try: await queued
                except asyncio.CancelledError: print("cancelled")
                try: await asyncio.wait_for(loop.run_in_executor(pool, touch, "never too"), 0.1)
                except asyncio.TimeoutError: print("timeout")
                task = asyncio.create_task(asyncio.wait_for(busy, 30))
                await asyncio.sleep(0)
                task.cancel()
                try: await task
                except asyncio.CancelledError: print("cancelled", busy.cancelled())
                touch("go")
                print(await loop.run_in_executor(pool, pow, 2, 2), time.monotonic() - started < 10)
            print(os.path.exists("never"), os.path.exists("never too"))
        asyncio.run(main())
    """)
    assert out == "timeout\ncancelled\ntimeout\ncancelled True\n4 True\nFalse False\n"


def test_asyncio_tasks_that_run_loops(both: Program) -> None:
    """A task may run a loop of its own, in a pool that is the loop's default executor or not."""
    out = both("""
        import asyncio
        async def add(x):
            await asyncio.sleep(0)
            return x + 1
        def work(x): return asyncio.run(add(x))
        async def main():
            loop = asyncio.get_running_loop()
            with Pool(2) as pool:
                print(await asyncio.gather(*(loop.run_in_executor(pool, work, i) for i in (1, 2))))
        asyncio.run(main())
    """)
    assert out == "[2, 3]\n"
