"""The portable part of loky's tests of its executor, passed by `ZmqExecutor`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import loky_tests
from .deviations import judge, parameters
from .driver import Driver

LIMIT = 60.0  # seconds for one test; the longest takes 5 on an idle machine

# Left out: what is about loky's own options (idle timeout, reducers, environment, memory
# guard, depth of nesting), what takes its parts or a worker of its choice in hand, its
# programs that import its executor by name, and a test that sends 2 GiB.
TESTS = """
    TestShutdown::test_run_after_shutdown
    TestShutdown::test_shutdown_with_pickle_error
    TestShutdown::test_shutdown_with_sys_exit_at_pickle
    TestShutdown::test_hang_issue12364
    TestShutdown::test_context_manager_shutdown
    TestShutdown::test_del_shutdown
    TestShutdown::test_shutdown_no_wait
    TestShutdown::test_shutdown_deadlock_pickle
    TestShutdown::test_shutdown_and_kill_workers
    TestWait::test_first_completed
    TestWait::test_first_completed_some_already_completed
    TestWait::test_first_exception
    TestWait::test_first_exception_some_already_complete
    TestWait::test_first_exception_one_already_failed
    TestWait::test_all_completed
    TestWait::test_timeout
    TestAsCompleted::test_no_timeout
    TestAsCompleted::test_zero_timeout
    TestAsCompleted::test_duplicate_futures
    TestExecutor::test_submit
    TestExecutor::test_submit_keyword
    TestExecutor::test_map
    TestExecutor::test_map_exception
    TestExecutor::test_map_timeout
    TestExecutor::test_shutdown_race_issue12456
    TestExecutor::test_no_stale_references
    TestExecutor::test_max_workers_negative
    TestExecutor::test_falsey_exception
    TestExecutor::test_map_chunksize
    TestExecutor::test_traceback
    TestExecutor::test_thread_safety
    TestExecutor::test_submit_from_callback
    TestExecutor::test_exited_child
    TestExecutor::test_exception_cause_with_tblib
    TestExecutor::test_no_deprecation_warning_is_raised_on_fork
    TestDeadLock::test_callback_crash_on_submit
    TestDeadLock::test_imap_handle_iterable_exception
    TestDeadLock::test_queue_full_deadlock
    TestDeadLock::test_informative_error_when_fail_at_unpickle
    TestShared::test_compat_with_concurrent_futures_exception
    TestShared::test_no_crash_on_stdin_access_in_child_subprocess_run
""".split()  # noqa: SIM905  (one on a line, to be read)

# Each at a stage: pickling the call, unpickling it, running it, pickling its result,
# unpickling that; once in a test, once submitted by a callback.
CRASHES = """
    id-args0-PicklingError-None
    id-args1-PicklingError-None
    id-args2-BrokenProcessPool-SystemExit
    id-args3-WorkerLostError-EXIT\\\\(0\\\\)
    id-args4-BrokenProcessPool-UnpicklingError
    id-args5-WorkerLostError-SIGSEGV
    crash-args6-WorkerLostError-SIGSEGV
    exit-args7-SystemExit-None
    c_exit-args8-WorkerLostError-EXIT\\\\(0\\\\)
    raise_error-args9-RuntimeError-None
    return_instance-args10-WorkerLostError-SIGSEGV
    return_instance-args11-SystemExit-None
    return_instance-args12-WorkerLostError-EXIT\\\\(0\\\\)
    return_instance-args13-PicklingError-None
    return_instance-args14-BrokenProcessPool-SystemExit
    return_instance-args15-BrokenProcessPool-UnpicklingError
""".split()  # noqa: SIM905
TESTS += [
    f"TestDeadLock::{test}[{crash}]"
    for test in ("test_crashes", "test_in_callback_submit_with_crash")
    for crash in CRASHES
]


@pytest.fixture(scope="module")
def driver(pytestconfig: pytest.Config) -> Iterator[Driver]:
    cache: pytest.Cache | None = getattr(pytestconfig, "cache", None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = cache.mkdir("loky") if cache is not None else Path(scratch)
        source, reason = loky_tests.find(folder)
        if source is None:
            pytest.skip(reason)
        driver = Driver("loky_runner", [str(source)], LIMIT)
        yield driver
        driver.close()


@pytest.mark.parametrize("name", parameters(TESTS))
def test_loky(driver: Driver, name: str) -> None:
    judge(driver.run(name))
