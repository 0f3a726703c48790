"""Runs tests of CPython's `test.test_concurrent_futures` with `ZmqExecutor`.

The suite makes each test class once for every start method. We take those it makes
for `spawn`, as ours starts fresh interpreters too, after putting `ZmqExecutor` where
they look for `ProcessPoolExecutor`.

    python -m upstream.cpython_runner CHANNEL SUITE SCRATCH     run, as `driver` says
    python -m upstream.cpython_runner list SUITE SCRATCH        print the tests' names
"""

from __future__ import annotations

import concurrent.futures
import gc
import importlib
import sys
import threading
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zmqexecutor import ZmqExecutor

from .counterpart import Counterpart
from .cpython_tests import NAME, import_from
from .driver import Outcome, serve

__all__ = ["main"]

OURS = "ProcessPoolSpawn"
# Both run the classes of OURS by name; its other test asks for another start method.
RESOURCES = ("FailingInitializerResourcesTest", "test_spawn")

# What the programs that the tests run by `python -I -c` need first.
PRELUDE = """\
import sys; sys.path[:0] = {path!r}
import concurrent.futures, multiprocessing
from zmqexecutor import ZmqExecutor
concurrent.futures.ZmqExecutor = ZmqExecutor
"""


class Another(Counterpart):
    """Not what tests see as `futures.ProcessPoolExecutor`: some skip that, as it hangs."""


Another.__name__ = ZmqExecutor.__name__


def load(suite: Path, scratch: Path) -> dict[str, unittest.TestCase]:
    """Import the suite for `ZmqExecutor`; return its tests by name."""
    import_from(suite, scratch)
    concurrent.futures.ProcessPoolExecutor = Counterpart  # type: ignore[assignment,misc]
    tests: dict[str, unittest.TestCase] = {}
    for module in _import_modules(suite):
        if hasattr(module, "assert_python_ok"):
            module.assert_python_ok = _with_prelude(module.assert_python_ok, scratch)
        for case in _test_cases(module):
            if case.__name__.startswith(OURS):
                assert getattr(case, "executor_type", None) is Counterpart
                case.executor_type = Another  # type: ignore[attr-defined]
                names = unittest.defaultTestLoader.getTestCaseNames(case)
            elif case.__name__ == RESOURCES[0]:
                names = RESOURCES[1:]
            else:
                continue
            tests.update((f"{case.__name__}.{name}", case(name)) for name in names)
    return tests


def _import_modules(suite: Path) -> Iterator[Any]:
    package = importlib.import_module(f"test.{NAME}")
    if suite.is_dir():
        for path in sorted(suite.glob("test_*.py")):
            yield importlib.import_module(f"{package.__name__}.{path.stem}")
    else:
        yield package


def _test_cases(module: Any) -> list[type[unittest.TestCase]]:
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, unittest.TestCase)
        and value.__module__ == module.__name__
    ]


def _with_prelude(run: Callable[..., Any], scratch: Path) -> Callable[..., Any]:
    # An interpreter with -I has only what we tell it.
    path = [str(scratch)] if (scratch / "test").is_dir() else []

    def assert_python_ok(option: str, code: str) -> Any:
        assert option == "-c"
        return run(option, PRELUDE.format(path=path) + code)

    return assert_python_ok


def run_one(test: unittest.TestCase) -> Outcome:
    """Run one test with the fixtures of its class and module."""
    support: Any = importlib.import_module("test.support")
    support.environment_altered = False
    result = unittest.TestResult()
    unittest.TestSuite([test]).run(result)
    failures = [*result.failures, *result.errors]
    if failures:
        _see_masters_end()
        return Outcome("failed", "\n".join(text for _, text in failures))
    # Before 3.13 this is also about threads that have ended and are not collected yet.
    if support.environment_altered:
        return Outcome("failed", "it has left threads or processes")
    if result.skipped:
        return Outcome("skipped", "; ".join(reason for _, reason in result.skipped))
    return Outcome("passed")


def _see_masters_end() -> None:
    """Wait for executors that a test has left behind when it failed.

    The next test would find that their supervisors, when they end, are children of this process.
    """
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "zmqexecutor-master":
            thread.join(30.0)


def main() -> None:
    """Do what the arguments say."""
    tests = load(Path(sys.argv[2]), Path(sys.argv[3]))
    if sys.argv[1] == "list":
        print(*tests, sep="\n")
    else:
        # A test that has run may hold on to its executor: each gets a fresh one.
        serve(lambda name: run_one(type(tests[name])(name.rpartition(".")[2])))
