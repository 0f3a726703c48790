"""`ZmqExecutor` with handles on its parts, under the names of `ProcessPoolExecutor`'s.

Many tests of others take hold of private parts only to wait for the end of a process
or a thread, or to count the workers that there are. With these names they test ours
as well. What has no counterpart here is not imitated.
"""

from __future__ import annotations

import threading

import psutil

from zmqexecutor import ZmqExecutor

__all__ = ["Counterpart", "WorkerHandle"]


class WorkerHandle:
    """A worker process, with the methods of `multiprocessing.Process` that tests use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._process: psutil.Process | None = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._process = None

    def terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def join(self, timeout: float | None = 30.0) -> None:
        if self._process is not None:
            self._process.wait(timeout)


class _NoQueue:
    """Where `ProcessPoolExecutor` has a queue with a thread, we have neither."""

    def join_thread(self) -> None:
        pass


class Counterpart(ZmqExecutor):
    _call_queue = _NoQueue()

    @property
    def _broken(self) -> bool:
        return bool(self._engine.master.broken)

    @property
    def _processes(self) -> dict[int, WorkerHandle]:
        """The workers that are ready."""
        return {worker.pid: WorkerHandle(worker.pid) for worker in self._engine.master.workers}

    @property
    def _executor_manager_thread(self) -> threading.Thread:
        return self._engine.master._thread


# Programs that tests write take the class by its name, from where that tests' own
# executor is.
Counterpart.__name__ = Counterpart.__qualname__ = ZmqExecutor.__name__
