"""loky's tests with `ZmqExecutor` in the place of its executors, for pytest in a runner.

loky's own names for the exceptions become ours, its `get_reusable_executor` becomes an
executor that is shared by the tests of a class. What its mixin says about loky's
processes in general is left out; the tests themselves are as they are.
"""

from __future__ import annotations

import importlib
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from zmqexecutor.errors import WorkerLostError

from .counterpart import Counterpart


class LokyExecutor(Counterpart):
    """Takes those of loky's arguments that do not matter here, or that we have too."""

    def __init__(
        self,
        max_workers: int | None = None,
        timeout: float | None = None,
        context: object = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(max_workers, context, initializer, initargs)

    def shutdown(
        self, wait: bool = True, *, cancel_futures: bool = False, kill_workers: bool = False
    ) -> None:
        if kill_workers:
            self.kill_workers()  # type: ignore[attr-defined,unused-ignore]
        super().shutdown(wait, cancel_futures=cancel_futures)


LokyExecutor.__name__ = Counterpart.__name__


class Shared:
    """Stands for `get_reusable_executor`: one executor, whatever size is asked for."""

    executor: LokyExecutor | None = None

    @classmethod
    def get(cls, max_workers: int = 2, timeout: float | None = None) -> LokyExecutor:
        if cls.executor is None:
            cls.executor = LokyExecutor(max_workers)
        return cls.executor

    @classmethod
    def close(cls) -> None:
        if cls.executor is not None:
            cls.executor.shutdown()
            cls.executor = None


def _match(match: str) -> str:
    """Return loky's pattern for the message of a lost worker, in our words."""
    return re.sub(r"EXIT\\\((\d+)\\\)", r"exit code \1", match)


def _check_ended(executor: Counterpart, expected: int) -> None:
    """Stand for loky's count of its child processes, of which our workers are none."""
    assert expected == 0
    for worker in executor._processes.values():
        worker.join(10)


def _put_in_place() -> None:
    loky: Any = importlib.import_module("loky")
    utils: Any = importlib.import_module("tests.utils")
    process_executor: Any = importlib.import_module("loky.process_executor")
    standard: Any = importlib.import_module("concurrent.futures.process")
    process_executor.ProcessPoolExecutor = LokyExecutor
    process_executor.TerminatedWorkerError = WorkerLostError
    process_executor.BrokenProcessPool = BrokenProcessPool
    process_executor.ShutdownExecutorError = RuntimeError
    process_executor._RemoteTraceback = standard._RemoteTraceback
    loky.get_reusable_executor = Shared.get
    utils.filter_match = _match


class Mixin:
    """What loky's `ExecutorMixin` gives its tests, by public means."""

    executor_type = LokyExecutor
    context = multiprocessing.get_context("spawn")
    worker_count = 5

    @pytest.fixture(autouse=True)
    def setup_method(self) -> Any:
        with multiprocessing.Manager() as manager:
            _mixin._test_event = event = manager.Event()
            self.executor: LokyExecutor | None = LokyExecutor(
                self.worker_count, initializer=_mixin.initializer_event, initargs=(event,)
            )
            assert self.executor.submit(id, None).result(_mixin.TIMEOUT)
            yield
            if self.executor is not None:
                self.executor.shutdown()

    @staticmethod
    def check_no_running_workers(patience: float = 5) -> None:
        del patience


class SharedMixin:
    @pytest.fixture(autouse=True)
    def setup_method(self) -> Any:
        yield
        assert Shared.get().submit(abs, -1).result() == 1
        Shared.close()

    teardown_method = None
    teardown_class = None


_put_in_place()
_mixin: Any = importlib.import_module("tests._executor_mixin")
_mixin._check_subprocesses_number = _check_ended
_process: Any = importlib.import_module("tests._test_process_executor")
_reusable: Any = importlib.import_module("tests.test_reusable_executor")

_CASES: dict[str, tuple[type, ...]] = {
    "TestShutdown": (Mixin, _process.ExecutorShutdownTest),
    "TestWait": (Mixin, _process.WaitTests),
    "TestAsCompleted": (Mixin, _process.AsCompletedTests),
    "TestExecutor": (Mixin, _process.ExecutorTest),
    "TestDeadLock": (SharedMixin, _reusable.TestExecutorDeadLock),
    "TestShared": (SharedMixin, _reusable.TestGetReusableExecutor),
}
# Names of this module, so that workers find the methods which are sent to them.
globals().update(
    {name: type(name, bases, {"__module__": __name__}) for name, bases in _CASES.items()}
)
__all__ = list(_CASES)
