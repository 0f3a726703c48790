"""CPython's tests of `ProcessPoolExecutor`, passed by `ZmqExecutor`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from . import cpython_tests
from .deviations import judge, parameters
from .driver import BOOT, TESTS, Driver

LIMIT = 90.0  # seconds for one test; the longest takes 7 on an idle machine

SUITE, REASON = cpython_tests.find()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if SUITE is None:
        skip = pytest.mark.skip(reason=REASON)
        metafunc.parametrize("name", [pytest.param("all", marks=skip)])
        return
    with tempfile.TemporaryDirectory() as scratch:
        boot = BOOT.format(path=str(TESTS), module="cpython_runner")
        command = [sys.executable, "-c", boot, "list", str(SUITE), scratch]
        listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        # Shown when the test runs: an error in here would stop every test there is.
        metafunc.parametrize("name", ["import"])
        return
    metafunc.parametrize("name", parameters(listed.stdout.split()))


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with tempfile.TemporaryDirectory() as scratch:
        driver = Driver("cpython_runner", [str(SUITE), scratch], LIMIT)
        yield driver
        driver.close()


def test_cpython(driver: Driver, name: str) -> None:
    judge(driver.run(name))
