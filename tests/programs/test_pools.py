"""Several executors, threads and other processes in one program."""

from __future__ import annotations

from .conftest import Program


def test_a_task_that_makes_an_executor(both: Program) -> None:
    out = both("""
        import os
        def square(x): return x * x
        def inner(n):
            with Pool(2) as pool:
                return sum(pool.map(square, range(n))), pool.submit(os.getpid).result()
        with Pool(2) as pool:
            results = list(pool.map(inner, [3, 4]))
        print([total for total, _ in results], len({pid for _, pid in results}))
    """)
    assert out == "[5, 14] 2\n"


def test_killing_the_worker_takes_the_pool_inside_it(ours: Program) -> None:
    """Nothing of the program is left; the fixture looks."""
    out = ours("""
        import os, signal, time
        def inner(path):
            pool = Pool(2)
            pids = pool.submit(os.getpid).result(), os.getpid()
            pool.submit(time.sleep, 1000)
            with open(path, "w") as file: file.write(" ".join(map(str, pids)))
            os.kill(os.getpid(), signal.SIGKILL)
        def there(pid):
            try: os.kill(pid, 0)
            except ProcessLookupError: return False
            return True
        with Pool(1) as pool:
            print(type(pool.submit(inner, "pids").exception()).__name__)
            pids = [int(word) for word in open("pids").read().split()]
            end = time.monotonic() + 15
            while any(map(there, pids)) and time.monotonic() < end: time.sleep(0.01)
            print(any(map(there, pids)), pool.submit(pow, 2, 2).result())
    """)
    assert out == "WorkerLostError\nFalse 4\n"


def test_two_executors_at_once(both: Program) -> None:
    out = both("""
        count = 0
        def bump(x):
            global count
            count += x
            return count
        with Pool(1) as one, Pool(1) as two:
            print([one.submit(bump, 1).result() + 10 * two.submit(bump, 2).result()
                   for _ in range(3)])
            print(two.submit(bump, one.submit(bump, 1).result()).result())
            one.shutdown()
            print(two.submit(bump, 1).result())
        print(count)
    """)
    assert out == "[21, 42, 63]\n10\n11\n0\n"


def test_submit_from_many_threads_and_from_callbacks(both: Program) -> None:
    out = both("""
        import threading
        def double(x): return 2 * x
        done, lock = [], threading.Lock()
        finished = threading.Event()
        def chain(future):
            x = future.result()
            if x < 1024:
                pool.submit(double, x).add_done_callback(chain)
            else:
                with lock:
                    done.append(x)
                    if len(done) == 40: finished.set()
        def submit():
            for _ in range(5): pool.submit(double, 8).add_done_callback(chain)
        with Pool(2) as pool:
            threads = [threading.Thread(target=submit) for _ in range(8)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            print(finished.wait(60))
        print(len(done), set(done))
    """)
    assert out == "True\n40 {1024}\n"


def test_made_in_a_thread_that_ends(both: Program) -> None:
    out = both("""
        import threading
        def make(): pools.append(Pool(2)); pools[0].submit(pow, 2, 2).result()
        pools = []
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        with pools[0] as pool:
            print(list(pool.map(pow, range(4), range(4))))
        def whole():
            with Pool(1) as pool: print(pool.submit(pow, 2, 3).result())
        thread = threading.Thread(target=whole)
        thread.start()
        thread.join()
    """)
    assert out == "[1, 1, 4, 27]\n8\n"


def test_the_child_of_a_fork(ours: Program) -> None:
    """It is told at once; it makes one of its own; and the parent's does not notice."""
    out = ours("""
        import os, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        def f(): return 1
        pool = Pool(1)
        print(pool.submit(f).result(), flush=True)
        pid = os.fork()
        if not pid:
            for use in (lambda: pool.submit(f), lambda: pool.map(abs, [1])):
                try: use()
                except RuntimeError as error: print(error, flush=True)
            pool.shutdown()
            with Pool(1) as own: print("own", own.submit(f).result(), flush=True)
            raise SystemExit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        print(pool.submit(f).result())
        pool.shutdown()
    """)
    lines = out.splitlines()
    assert lines[:1] + lines[3:] == ["1", "own 1", "3", "1"]
    assert all("forked child" in line and "make a new one" in line for line in lines[1:3])


def test_other_processes_beside_it(both: Program) -> None:
    """`multiprocessing.Process`, `Pool` and `ProcessPoolExecutor`, before and after."""
    out = both("""
        import multiprocessing, warnings
        from concurrent.futures import ProcessPoolExecutor
        warnings.simplefilter("ignore", DeprecationWarning)
        def f(x): return x + 1
        def child(queue, x):
            with Pool(1) as own: queue.put(own.submit(f, x).result())
        if __name__ == "__main__":
            with Pool(2) as pool:
                for method in ("fork", "spawn"):
                    context = multiprocessing.get_context(method)
                    queue = context.SimpleQueue()
                    process = context.Process(target=child, args=(queue, 1))
                    process.start()
                    got = pool.submit(f, 5).result()
                    process.join()
                    print(queue.get(), process.exitcode, got, multiprocessing.active_children()
                          if "Zmq" in type(pool).__name__ else [])
                with multiprocessing.Pool(1) as other:
                    print(other.map(f, [1, 2]), list(pool.map(f, [1, 2])))
                with ProcessPoolExecutor(1) as other:
                    print(other.submit(f, 1).result(), pool.submit(f, 1).result())
    """)
    assert out == "2 0 6 []\n2 0 6 []\n[2, 3] [2, 3]\n2 2\n"


def test_a_daemonic_process_makes_one(ours: Program) -> None:
    """Which the standard library's cannot: daemonic processes have no children there."""
    out = ours("""
        import multiprocessing
        def f(x): return x + 1
        def child(queue):
            with Pool(1) as own: queue.put(own.submit(f, 1).result())
        queue = multiprocessing.SimpleQueue()
        process = multiprocessing.Process(target=child, args=(queue,), daemon=True)
        process.start()
        process.join()
        print(queue.get(), process.exitcode)
    """)
    assert out == "2 0\n"
