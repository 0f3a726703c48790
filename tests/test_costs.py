"""Who compares a large global at each `submit` is told so, and what to do instead."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import sent_by_value
from zmqexecutor import PerformanceWarning, ZmqExecutor
from zmqexecutor.payload import costs

SCRIPT = """
class Point:
    def __init__(self, x):
        self.x = x

class Odd(Point):
    def __reduce__(self):
        return Odd, (self.x,)

value = None

def use(_=None):
    return len(value)

def submit(executor):
    return executor.submit(use)
"""


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Any]:
    """A module whose functions, classes and globals are sent by value."""
    with sent_by_value("costly_script", SCRIPT, tmp_path) as module:
        yield module


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is little to a user is much here."""
    monkeypatch.setattr(costs, "_MUCH", 0.02)


@pytest.fixture
def executor() -> Iterator[ZmqExecutor]:
    with ZmqExecutor(1) as executor:
        yield executor


LARGE: dict[str, Callable[[Any], Any]] = {
    "many objects": lambda script: [script.Point(n) for n in range(10_000)],
    "many that reduce themselves": lambda script: [script.Odd(n) for n in range(2000)],
    "a large array": lambda _: np.zeros(4_000_000),
    "nested lists": lambda _: [[str(n)] for n in range(50_000)],
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE.keys())
def test_a_warning(executor: ZmqExecutor, script: Any, make: Callable[[Any], Any]) -> None:
    script.value = make(script)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(1000):
            assert script.submit(executor).result(60) == len(script.value)
            if caught:
                break
        for _ in range(10):
            script.submit(executor).result(60)
    (warning,) = caught
    assert warning.category is PerformanceWarning
    assert warning.filename == script.__file__, "who has called"
    assert re.match(
        r"Each call of submit or map compares the global 'value' of costly_script with what the "
        r"workers have, which takes [\d.]+ ms, and has been done \d+ times\. To save this time ",
        str(warning.message),
    )


def submit_for_ever(script: Any, executor: ZmqExecutor) -> None:
    while True:
        script.submit(executor).result(60)


def test_an_error_if_the_user_wants_that(executor: ZmqExecutor, script: Any) -> None:
    script.value = [script.Odd(n) for n in range(2000)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PerformanceWarning, match="the global 'value' of costly_script"):
            submit_for_ever(script, executor)
    assert script.submit(executor).result(60) == 2000


def test_none_for_what_takes_little_time(
    executor: ZmqExecutor, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_MUCH", 0.0001)
    script.value = tuple(range(100_000))  # much to send, little to compare
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            assert script.submit(executor).result(60) == 100_000


def test_none_for_map(executor: ZmqExecutor, script: Any) -> None:
    script.value = [script.Odd(n) for n in range(2000)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(executor.map(script.use, range(500), timeout=60)) == [2000] * 500


@pytest.mark.parametrize("code", [{}, {"__name__": "some"}, {"__name__": None}])
def test_all_that_are_due(code: dict[str, Any]) -> None:
    measured = costs.Costs()
    measured.due += ["one", "another"]
    code["warn"] = measured.warn
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec("warn()\nwarn()", code)
    expected = ["one", "another"] if code.get("__name__", "") is not None else []  # Python does not
    assert [str(warning.message) for warning in caught] == expected
    assert not measured.due
