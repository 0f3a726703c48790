"""Modules, paths and settings that tasks find; objects of multiprocessing that they share."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import zmqexecutor

from .conftest import Program

FILES = "cloudpickle sends a text file that is open for reading as a StringIO with its contents"


def test_a_helper_beside_the_script_run_from_elsewhere(both: Program) -> None:
    both.write("helper.py", "def twice(x): return x * 2\nclass C: pass\n")
    script = both.write(
        "script.py",
        both.text("""
            import os, sys
            from helper import twice, C
            def where(): return os.getcwd(), sys.argv, os.path.basename(__file__), __name__
            def helps(x): import helper; return helper.twice(x), type(helper.C())
            with Pool(1) as pool:
                print(pool.submit(twice, 1).result(), type(pool.submit(C).result()) is C)
                n, kind = pool.submit(helps, 2).result()
                print(n, kind is C)
                there = pool.submit(where).result()
                print(there == where(), there[1][1:], there[2:])
        """),
    )
    elsewhere = both.directory / "elsewhere"
    elsewhere.mkdir()
    done = both.execute([str(script), "an argument"], cwd=elsewhere)
    assert done.stdout == ("2 True\n4 True\nTrue ['an argument'] ('script.py', '__main__')\n"), (
        done.stderr
    )


def test_a_relative_path_and_another_working_directory(both: Program) -> None:
    both.write("lib/helper.py", "def twice(x): return x * 2\n")
    (both.directory / "other").mkdir()
    out = both("""
        import os, sys
        sys.path.insert(0, "lib")
        import helper
        sys.path[0] = os.path.abspath("lib")
        os.chdir("other")
        with Pool(1) as pool:
            print(pool.submit(helper.twice, 1).result())
            print(os.path.basename(pool.submit(os.getcwd).result()))
    """)
    assert out == "2\nother\n"


CHANGES = """
            sys.path.append("late")
            os.environ["LATE"] = "yes"
            os.umask(0o027)
            sys.argv.append("late")
            os.chdir("elsewhere")
"""
READ = """
        import os, sys
        def read():
            return os.environ.get("LATE"), oct(os.umask(0o027)), sys.argv[1:], (
                os.path.basename(os.getcwd()))
"""
LATE = "('yes', '0o27', ['late'], 'elsewhere')\n"


def test_what_changes_before_the_executor_is_made(both: Program) -> None:
    both.write("late/extra.py", "value = 5\n")
    both.write("elsewhere/file", "")
    out = both(f"""{READ}
        if True:{CHANGES.replace('"late")', 'os.path.abspath("late"))', 1)}
        import extra
        def use(): import extra; return extra.value
        with Pool(1) as pool:
            print(pool.submit(read).result())
            print(pool.submit(use).result())
    """)
    assert out == f"{LATE}5\n"


def test_a_path_that_is_added_before_the_first_submit(both: Program) -> None:
    both.write("late/extra.py", "def f(): return 5\n")
    out = both("""
        import os, sys
        with Pool(1) as pool:
            sys.path.append(os.path.abspath("late"))
            import extra
            print(pool.submit(extra.f).result())
    """)
    assert out == "5\n"


def test_what_else_changes_before_the_first_submit(both: Program) -> None:
    both.write("elsewhere/file", "")
    out = both(f"""{READ}
        with Pool(1) as pool:{CHANGES}
            print(pool.submit(read).result())
    """)
    assert out == LATE


def test_an_editable_install(ours: Program) -> None:
    """In the two forms there are: a path, and a finder."""
    ours.write("one/src/by_path.py", "def f(): return 'path'\n")
    ours.write("two/src/by_finder/__init__.py", "def f(): return 'finder'\n")
    environment = ours.directory / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    site = Path(
        sysconfig.get_path("purelib", vars={"base": str(environment)}).replace(
            sysconfig.get_path("data"), str(environment)
        )
    )
    assert site.is_dir(), site
    (site / "editable.pth").write_text(
        f"{sysconfig.get_path('purelib')}\n{Path(zmqexecutor.__file__).parents[1]}\n"
        f"{ours.directory}/one/src\nimport editable_finder; editable_finder.install()\n"
    )
    (site / "editable_finder.py").write_text(
        "import sys, importlib.util\n"
        "class Finder:\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        if name == 'by_finder':\n"
        "            return importlib.util.spec_from_file_location(\n"
        f"                name, '{ours.directory}/two/src/by_finder/__init__.py')\n"
        "def install(): sys.meta_path.append(Finder)\n"
    )
    script = ours.write(
        "script.py",
        ours.text("""
            import by_path, by_finder
            with Pool(1) as pool:
                print(pool.submit(by_path.f).result(), pool.submit(by_finder.f).result())
        """),
    )
    done = subprocess.run(
        [environment / "bin" / "python", script],
        capture_output=True,
        text=True,
        env=ours.environment,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("path finder\n", "")


# ---------------------------------------------------------------- multiprocessing


def test_proxies_of_a_manager(both: Program) -> None:
    out = both("""
        import multiprocessing
        def work(table, items, lock, queue, event, value, x):
            with lock:
                items.append(x)
                table[x] = table.get(x, 0) + 1
                value.value += x
            queue.put(x)
            event.wait(30)
            return x
        if __name__ == "__main__":
            with multiprocessing.Manager() as manager, Pool(2) as pool:
                shared = (manager.dict(), manager.list(), manager.Lock(), manager.Queue(),
                          manager.Event(), manager.Value("i", 0))
                futures = [pool.submit(work, *shared, x) for x in range(2)]
                print(sorted(shared[3].get(timeout=30) for _ in range(2)))
                shared[4].set()
                print([f.result() for f in futures])
                print(sorted(shared[0].items()), sorted(shared[1]), shared[5].value)
    """)
    assert out == "[0, 1]\n[0, 1]\n[(0, 1), (1, 1)] [0, 1] 1\n"


def test_a_manager_of_the_scripts_own(both: Program) -> None:
    out = both("""
        from multiprocessing.managers import BaseManager
        class Tally:
            def __init__(self): self.n = 0
            def add(self, n): self.n += n
            def get(self): return self.n
        class Tallies(BaseManager): pass
        Tallies.register("Tally", Tally)
        def work(tally, n): tally.add(n)
        if __name__ == "__main__":
            with Tallies() as manager, Pool(2) as pool:
                tally = manager.Tally()
                list(pool.map(work, [tally] * 10, range(10)))
                print(tally.get())
    """)
    assert out == "45\n"


def test_shared_memory_by_name(both: Program) -> None:
    """It stays when a worker ends, and nothing is said of leaks at the end."""
    out = both("""
        from multiprocessing import shared_memory
        def write(name, i):
            memory = shared_memory.SharedMemory(name=name)
            memory.buf[i] = i + 1
            memory.close()
        def create():
            memory = shared_memory.SharedMemory(create=True, size=16)
            memory.buf[:3] = b"abc"
            memory.close()
            return memory.name
        memory = shared_memory.SharedMemory(create=True, size=64)
        with Pool(2) as pool:
            list(pool.map(write, [memory.name] * 8, range(8)))
            made = pool.submit(create).result()
        print(list(memory.buf[:9]))
        again = shared_memory.SharedMemory(name=memory.name)
        print(list(again.buf[:3]))
        again.close()
        memory.close()
        memory.unlink()
        theirs = shared_memory.SharedMemory(name=made)
        print(bytes(theirs.buf[:3]))
        theirs.close()
        theirs.unlink()
    """)
    assert out == "[1, 2, 3, 4, 5, 6, 7, 8, 0]\n[1, 2, 3]\nb'abc'\n"


def test_shared_memory_that_is_made_after_the_pool(both: Program) -> None:
    out = both("""
        from multiprocessing import shared_memory
        def write(name, i):
            memory = shared_memory.SharedMemory(name=name)
            memory.buf[i] = i + 1
            memory.close()
        with Pool(1) as pool:
            pool.submit(pow, 2, 2).result()
            memory = shared_memory.SharedMemory(create=True, size=16)
            list(pool.map(write, [memory.name] * 3, range(3)))
        again = shared_memory.SharedMemory(name=memory.name)
        print(list(again.buf[:4]))
        again.close()
        memory.close()
        memory.unlink()
    """)
    assert out == "[1, 2, 3, 0]\n"


def test_shared_memory_outlives_a_killed_worker(ours: Program) -> None:
    out = ours("""
        import os, signal
        from multiprocessing import shared_memory
        def die(name):
            memory = shared_memory.SharedMemory(name=name)
            os.kill(os.getpid(), signal.SIGKILL)
        memory = shared_memory.SharedMemory(create=True, size=64)
        with Pool(1, max_tasks_per_child=1) as pool:
            print(type(pool.submit(die, memory.name).exception()).__name__)
            print(pool.submit(pow, 2, 2).result())
        again = shared_memory.SharedMemory(name=memory.name)
        again.close()
        memory.close()
        memory.unlink()
        print("there")
    """)
    assert out == "WorkerLostError\n4\nthere\n"


def test_arguments_that_cannot_be_sent(both: Program) -> None:
    """An error on the future that says what it was; no hang, and the next task runs."""
    out = both("""
        import multiprocessing, os, pickle, socket, sys, threading
        with Pool(1) as pool:
            things = {
                "lock": threading.Lock(),
                "event": threading.Event(),
                "generator": (i for i in range(3)),
                "file": open(os.devnull, "wb"),
                "lock of processes": multiprocessing.Lock(),
                "queue of processes": multiprocessing.Queue(),
                "frame": sys._getframe(),
                "module": sys,
                "pool": pool,
            }
            for name, thing in things.items():
                error = pool.submit(id, thing).exception(30)
                if not isinstance(error, (TypeError, RuntimeError, pickle.PicklingError)):
                    print(name, type(error))
                if "Zmq" in type(pool).__name__ and name in ("lock", "generator", "file"):
                    print(error)
            print(pool.submit(pow, 2, 2).result(30))
            things.clear()
    """)
    if both.ours:
        first, second, third, *rest = out.splitlines()
        assert "lock" in first
        assert "generator" in second
        assert "BufferedWriter" in third
        # cloudpickle sends a module by its name.
        assert rest == ["module <class 'NoneType'>", "4"]
    else:
        assert out == "4\n"


def test_an_open_file(both: Program) -> None:
    out = both("""
        import pickle
        with Pool(1) as pool, open(__file__) as file:
            error = pool.submit(id, file).exception(30)
            print(isinstance(error, (TypeError, pickle.PicklingError)))
    """)
    assert out == "True\n"


def test_sockets_and_connections(both: Program) -> None:
    """multiprocessing knows how to send these."""
    out = both("""
        import multiprocessing, socket
        def say(connection): connection.send("hello"); connection.close()
        def write(sock):
            with sock: sock.sendall(b"hello")
        with Pool(1) as pool:
            ours, theirs = multiprocessing.Pipe()
            pool.submit(say, theirs).result(30)
            print(ours.recv())
            mine, other = socket.socketpair()
            pool.submit(write, other).result(30)
            print(mine.recv(5))
            for each in (ours, theirs, mine, other): each.close()
    """)
    assert out == "hello\nb'hello'\n"


def test_locks_among_the_globals(both: Program) -> None:
    """A fork has a copy of each, which is as good as a new one."""
    out = both("""
        import contextvars, queue, threading
        lock, reentrant, local = threading.Lock(), threading.RLock(), threading.local()
        event, things, user = threading.Event(), queue.Queue(), contextvars.ContextVar("user")
        cache = {}
        def square(x):
            with lock, reentrant:
                cache[x] = x * x
            local.x = x
            event.set()
            things.put(local.x)
            user.set("me")
            return cache[x], things.get(), user.get()
        with Pool(1) as pool:
            print([pool.submit(square, x).result() for x in range(3)])
    """)
    assert out == "[(0, 0, 'me'), (1, 1, 'me'), (4, 2, 'me')]\n"


def test_a_global_that_only_a_fork_inherits(ours: Program) -> None:
    """The error names the global, and the next task runs."""
    out = ours("""
        import multiprocessing, sqlite3
        value, connection = multiprocessing.Value("i", 0), sqlite3.connect(":memory:")
        def count(): value.value += 1
        def select(): return connection.execute("select 1")
        with Pool(1) as pool:
            for f in (count, select): print(pool.submit(f).exception())
            print(pool.submit(lambda: 2).result())
        connection.close()
    """)
    first, second, third = out.splitlines()
    assert "global 'value'" in first
    assert "global 'connection'" in second
    assert third == "2"


def test_results_that_cannot_be_sent(both: Program) -> None:
    out = both("""
        import pickle, threading
        def generator():
            yield 1
        def lock(): return threading.Lock()
        def file():
            with open(__file__) as opened: return opened
        with Pool(1) as pool:
            for f in (generator, lock, file):
                error = pool.submit(f).exception(30)
                print(isinstance(error, (TypeError, pickle.PicklingError)), end=" ")
            print(pool.submit(pow, 2, 2).result(30))
    """)
    assert out == "True True True 4\n"
