"""Tests of others that `ZmqExecutor` does not pass, each with the reason.

Each of them has to fail: once it passes, its entry here has to go.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import pytest

from .driver import Outcome, UpstreamFailed

__all__ = ["DEVIATIONS", "judge", "parameters"]

_UNPICKLE = (
    "asserts that the whole pool breaks when something cannot be unpickled; "
    "ours loses that task, with SerializationError"
)
_KILLED = "asserts that the whole pool breaks when a worker dies; ours loses its task"

DEVIATIONS: dict[str, str] = {
    # ------------------------------------------------------------------- CPython
    "ProcessPoolSpawnExecutorDeadlockTest.test_error_at_task_unpickle": _UNPICKLE,
    "ProcessPoolSpawnExecutorDeadlockTest.test_exit_at_task_unpickle": _UNPICKLE,
    "ProcessPoolSpawnExecutorDeadlockTest.test_error_during_result_unpickle_in_result_handler": (
        _UNPICKLE
    ),
    "ProcessPoolSpawnExecutorDeadlockTest.test_exit_during_result_unpickle_in_result_handler": (
        _UNPICKLE
    ),
    "ProcessPoolSpawnProcessPoolExecutorTest.test_killed_child": _KILLED,
    "ProcessPoolSpawnProcessPoolExecutorTest.test_max_tasks_per_child_defaults_to_spawn_context": (
        "reads the private `_mp_context`; ours has none"
    ),
    "ProcessPoolSpawnProcessPoolExecutorTest.test_python_finalization_error": (
        "patches the private `threading._start_joinable_thread` to fail for the thread of "
        "`ProcessPoolExecutor`'s call queue; ours has no such thread, and runs the tasks"
    ),
    "ProcessPoolSpawnProcessPoolExecutorTest.test_saturation": (
        "reads the private `_processes`, which `submit` fills before it returns; "
        "ours starts workers in the background"
    ),
    "ProcessPoolSpawnProcessPoolShutdownTest.test_processes_terminate": (
        "reads the private `_processes`, which `submit` fills before it returns; "
        "ours starts workers in the background"
    ),
    # ---------------------------------------------------------------------- loky
    "TestExecutor::test_exited_child": _KILLED,
    "TestDeadLock::test_informative_error_when_fail_at_unpickle": _UNPICKLE,
    **{
        f"TestDeadLock::{test}[{crash}]": _UNPICKLE
        for test in ("test_crashes", "test_in_callback_submit_with_crash")
        for crash in (
            "id-args2-BrokenProcessPool-SystemExit",
            "id-args4-BrokenProcessPool-UnpicklingError",
            "return_instance-args14-BrokenProcessPool-SystemExit",
            "return_instance-args15-BrokenProcessPool-UnpicklingError",
        )
    },
}
"""On purpose. The reason is one of two: the test uses private parts of
`ProcessPoolExecutor`, or it asserts that the whole pool breaks where ours loses one task."""


def parameters(names: Iterable[str]) -> list[Any]:
    """Return the tests as parameters; those with an entry here are expected to fail."""
    result = []
    for name in names:
        marks = []
        if name in DEVIATIONS:
            marks = [pytest.mark.xfail(raises=UpstreamFailed, reason=DEVIATIONS[name], strict=True)]
        if name == "FailingInitializerResourcesTest.test_spawn" and sys.version_info[:2] == (3, 12):
            # 3.13's test, lent to an interpreter that has none of its own.
            reason = "reads a private part of 3.13's resource tracker, which 3.12's has not"
            marks = [pytest.mark.skip(reason=reason)]
        result.append(pytest.param(name, marks=marks, id=name.replace("\\", "")))
    return result


def judge(outcome: Outcome) -> None:
    """Let the test that asked for it end in the same way."""
    if outcome.outcome == "skipped":
        pytest.skip(outcome.text)
    if outcome.outcome != "passed":
        raise UpstreamFailed(outcome.text)
