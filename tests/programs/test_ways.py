"""The ways in which Python is given a program."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
import zipapp
from pathlib import Path

import pytest

from .conftest import IMPORTS, PATIENCE, Program

PLAIN = """
import dataclasses, enum
@dataclasses.dataclass
class Point:
    x: int

class Colour(enum.Enum):
    RED = 1

base = 10
def shift(p):
    assert isinstance(p, Point)
    return Point(p.x + base)

with Pool(2) as pool:
    print(list(pool.map(shift, [Point(1), Point(2)])))
    print(pool.submit(max, [Colour.RED], key=str).result() is Colour.RED)

"""
PLAIN_PRINTS = "[Point(x=11), Point(x=12)]\nTrue\n"

RICH = """
import collections, dataclasses, enum, typing
Pair = collections.namedtuple("Pair", "a b")
class Row(typing.NamedTuple):
    n: int

class Outer:
    class Inner:
        pass
    def inner(self): return Outer.Inner()

def local():
    class Local:
        def me(self): return Local
    return Local

def adder(n):
    def add(x): return x + n + offset
    return add

def outer(x):
    return inner(x) + 1

def inner(x):
    return x * 2

offset = 0
pool = Pool(2)
print(list(pool.map(lambda x: x * x, range(3))), list(pool.map(adder(5), [1, 2])))
offset = 100
print(pool.submit(adder(5), 1).result(), pool.submit(outer, 3).result())
def inner(x):
    return x * 10

print(pool.submit(outer, 3).result(), end=" ")
print(pool.submit(lambda p: p._replace(a=Row(3)), Pair(1, 2)).result())
print(type(pool.submit(Outer().inner).result()) is Outer.Inner)
L = local()
print(pool.submit(L().me).result() is L, isinstance(pool.submit(L).result(), L))
class Outer:
    class Inner:
        new = True
    def inner(self): return Outer.Inner()

got = pool.submit(Outer().inner).result()
print(got.new, type(got) is Outer.Inner)
print(pool.submit(lambda: (__name__, sorted(k for k in globals() if k == "pool"))).result())
"""
RICH_PRINTS = """\
[0, 1, 4] [6, 7]
106 7
31 Pair(a=Row(n=3), b=2)
True
True True
True True
('__main__', [])
"""


def _run(program: Program, how: str, source: str) -> str:
    text = program.text(source)
    stdin = ""
    if how == "script":
        arguments = [str(program.write("program.py", text))]
    elif how == "-c":
        arguments = ["-c", text]
    elif how == "standard input":
        arguments, stdin = ["-"], text
    elif how == "-m package":
        program.write("package/__init__.py", "")
        program.write("package/__main__.py", text)
        arguments = ["-m", "package"]
    elif how == "-m module":
        program.write("package/__init__.py", "")
        program.write("package/module.py", text)
        arguments = ["-m", "package.module"]
    elif how == "zip application":
        program.write("app/__main__.py", text)
        zipapp.create_archive(program.directory / "app", program.directory / "app.pyz")
        arguments = [str(program.directory / "app.pyz")]
    elif how == "-m cProfile":
        arguments = ["-m", "cProfile", "-o", os.devnull, str(program.write("program.py", text))]
    elif how == "-m pdb":
        script = program.write("program.py", f"{text}raise SystemExit\n")
        arguments = ["-m", "pdb", "-c", "continue", "-c", "quit", str(script)]
    elif how == "runpy":
        script = program.write("program.py", text)
        arguments = ["-c", f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"]
    else:
        # The prompts go to standard error.
        arguments, stdin = ["-i", "-q"], text
    done = program.execute(arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    if program.ours:
        assert done.stderr.replace(">>> ", "").replace("... ", "").strip() == ""
    return done.stdout


WAYS = ["script", "-c", "standard input", "-m package", "-m module", "zip application", "-i"]


@pytest.mark.parametrize("how", WAYS)
def test_functions_and_classes(both: Program, how: str) -> None:
    assert _run(both, how, PLAIN) == PLAIN_PRINTS


@pytest.mark.parametrize("how", ["-m cProfile", "-m pdb", "runpy"])
def test_run_by_another_program(ours: Program, how: str) -> None:
    shown = _run(ours, how, PLAIN)
    assert shown.startswith(PLAIN_PRINTS)


IN_PYTEST = """
import dataclasses
@dataclasses.dataclass
class Point:
    x: int

def shift(p):
    assert isinstance(p, Point)
    return Point(p.x + 10)

def fail(): assert shift(Point(1)) == 5

def test():
    with Pool(2) as pool:
        print(list(pool.map(shift, [Point(1), Point(2)])))
        print(type(pool.submit(fail).exception()).__name__)
"""


def test_in_a_test_that_pytest_runs(both: Program) -> None:
    both.write("test_it.py", both.text(IN_PYTEST))
    done = both.execute(["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "test_it.py"])
    assert "[Point(x=11), Point(x=12)]\nAssertionError\n" in done.stdout
    assert "1 passed" in done.stdout


def test_a_module_that_a_worker_cannot_import(ours: Program) -> None:
    """The error says so. (A fork of the standard library's pool has the module already.)"""
    ours.write("plugins/plug-in.py", "def f(): return 1\n")
    out = ours("""
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("plugin", "plugins/plug-in.py")
        plugin = sys.modules["plugin"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(plugin)
        with Pool(1) as pool:
            print(repr(pool.submit(plugin.f).exception()))
            print(pool.submit(lambda: 2).result())
    """)
    assert "ModuleNotFoundError: No module named 'plugin'" in out
    assert out.endswith("\n2\n")


@pytest.mark.parametrize("how", WAYS)
def test_lambdas_closures_nested_and_redefined(ours: Program, how: str) -> None:
    assert _run(ours, how, RICH) == RICH_PRINTS


def test_a_package_with_modules_beside_its_main(both: Program) -> None:
    """Relative imports, in the script and in the task."""
    both.write("package/__init__.py", "")
    both.write("package/other.py", "def twice(x): return x * 2\nclass C: pass\n")
    both.write(
        "package/__main__.py",
        both.text("""
            from . import other
            from .other import twice
            def work(x):
                from .other import C
                return other.twice(x), twice(x), C is other.C
            with Pool(1) as pool:
                print(pool.submit(twice, 1).result(), pool.submit(work, 2).result())
                print(type(pool.submit(other.C).result()) is other.C, __package__, __spec__.name)
        """),
    )
    done = both.execute(["-m", "package"])
    assert done.stdout == "2 (4, 4, True)\nTrue package package.__main__\n", done.stderr


def test_a_zip_application_with_modules_inside(both: Program) -> None:
    both.write("app/inside.py", "def twice(x): return x * 2\n")
    both.write(
        "app/__main__.py",
        both.text("""
            import inside
            def work(x): return inside.twice(x)
            with Pool(1) as pool:
                print(pool.submit(inside.twice, 1).result(), pool.submit(work, 2).result())
        """),
    )
    zipapp.create_archive(both.directory / "app", both.directory / "app.pyz")
    other = both.directory / "elsewhere"
    other.mkdir()
    done = both.execute(["../app.pyz"], cwd=other)
    assert done.stdout == "2 4\n", done.stderr


class Terminal:
    """A person at `python` in a terminal."""

    def __init__(self, program: Program) -> None:
        self._shown = ""
        self._master, slave = pty.openpty()
        environment = dict(program.environment, TERM="dumb", PYTHON_BASIC_REPL="1")
        self.process = subprocess.Popen(
            [sys.executable, "-q"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=program.directory,
            env=environment,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(slave)

    def until(self, text: str) -> str:
        """Read until this is shown, and return what came before it."""
        deadline = time.monotonic() + PATIENCE
        while text not in self._shown:
            remaining = deadline - time.monotonic()
            assert remaining > 0, self._shown
            if select.select([self._master], [], [], remaining)[0]:
                try:
                    data = os.read(self._master, 65536)
                except OSError:
                    data = b""
                assert data, self._shown
                self._shown += data.decode().replace("\r\n", "\n")
        before, _, self._shown = self._shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> int:
        self.type("\x04")
        try:
            self.until("never shown")
        except AssertionError:
            pass
        status = self.process.wait(PATIENCE)
        os.close(self._master)
        return status


def _own_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_session_at_a_terminal(ours: Program) -> None:
    """With Ctrl-C during a task, after which the pool is as it was."""
    terminal = Terminal(ours)
    terminal.until(">>> ")
    terminal.type(IMPORTS["ours"] + "\n")
    terminal.until(">>> ")
    terminal.type("pool = Pool(2)\n")
    terminal.until(">>> ")
    terminal.type("def f(x): return x + 1\n\n")
    terminal.until("... ")
    terminal.until(">>> ")
    terminal.type("list(pool.map(f, range(3)))\n")
    assert "[1, 2, 3]" in terminal.until(">>> ")
    terminal.type("def f(x): return x + 2\n\n")
    terminal.until("... ")
    terminal.until(">>> ")
    terminal.type("list(pool.map(f, range(3)))\n")
    assert "[2, 3, 4]" in terminal.until(">>> ")
    terminal.type("import time; print('be' + 'gun'); pool.submit(time.sleep, 0.5).result()\n")
    terminal.until("begun")
    terminal.type("\x03")
    shown = terminal.until(">>> ")
    assert shown.count("Traceback") == 1
    assert "KeyboardInterrupt" in shown
    terminal.type("pool.submit(f, 40).result()\n")
    assert "42" in terminal.until(">>> ")
    assert terminal.close() == 0


def _cells(program: Program, *cells: str) -> list[str]:
    """What an IPython kernel prints for each cell."""
    pytest.importorskip("ipykernel")
    pytest.importorskip("jupyter_client")
    home = program.directory / "home"
    program.environment.update(HOME=str(home), IPYTHONDIR=str(home), JUPYTER_CONFIG_DIR=str(home))
    driver = Path(__file__).with_name("kernel.py")
    done = program.execute([str(driver)], stdin=json.dumps([IMPORTS[program.pool], *cells]))
    assert done.returncode == 0, done.stderr
    results: list[str] = json.loads(done.stdout.splitlines()[-1])
    assert results[0] == ""
    return results[1:]


def test_cells_of_a_notebook(ours: Program) -> None:
    """Functions and classes redefined between cells; `isinstance` across the round trip."""
    cells = {
        "pool = Pool(2)\ndef helper(x): return x + 1\ndef f(x): return helper(x)\n"
        "print(list(pool.map(f, range(3))))": "[1, 2, 3]\n",
        "def helper(x): return x * 100\nprint(list(pool.map(f, range(3))))": "[0, 100, 200]\n",
        "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\n"
        "def grow(p):\n    assert isinstance(p, P)\n    return P(p.x + 1)\n"
        "p = pool.submit(grow, P(1)).result()\nprint(p, isinstance(p, P))": "P(x=2) True\n",
        "@dataclasses.dataclass\nclass P:\n    x: int\n    y: int = 5\n"
        "q = pool.submit(grow, P(1)).result()\n"
        "print(q, isinstance(q, P), isinstance(p, P))": "P(x=2, y=5) True False\n",
        "pool.submit(grow, p).exception().__class__.__name__": "'AssertionError'",
        "import enum\nclass E(enum.Enum):\n    A = 1\n"
        "print(pool.submit(lambda e: e, E.A).result() is E.A)": "True\n",
        "import asyncio\nloop = asyncio.get_running_loop()\n"
        "print(await asyncio.gather(*(loop.run_in_executor(pool, f, i) for i in (1, 2))))": (
            "[100, 200]\n"
        ),
        "pool.submit(lambda: In[-1]).result()[:11]": "'pool.submit'",
        "%%capture captured\nx = pool.submit(f, 3).result()": "",
        "print(x, Out[6])": "300 AssertionError\n",
        "pool.submit(lambda: 1 / 0).result()": "ZeroDivisionError",
    }
    assert _cells(ours, *cells) == list(cells.values())


def test_the_stop_button_of_a_notebook(ours: Program) -> None:
    cells = {
        "import time\npool = Pool(1)\npool.submit(pow, 2, 2).result()": "4",
        "#interrupt\nprint('begun', flush=True)\npool.submit(time.sleep, 0.5).result()": (
            "KeyboardInterrupt"
        ),
        "pool.submit(pow, 2, 3).result()": "8",
    }
    shown = _cells(ours, *cells)
    assert [text.removeprefix("begun\n") for text in shown] == list(cells.values())
