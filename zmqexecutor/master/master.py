"""The master, as other threads see it: they hand over tasks, and say when to end.

    submit (any thread) ─► inbox ─► ┌────────────────────────┐ ◄── control ROUTER: endpoint
                                    │ master thread: loop    │ ◄── work ROUTER
    futures ◄───────────────────────│   events ─► coordinator│ ◄── process descriptors
                                    │   decisions ─► sockets │ ◄── the group's supervisor
                                    └────────────────────────┘

A task goes through the inbox to the scheduler, which decides who runs it; its
result comes back on the work socket, or by a short cut, and completes the future.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError

from ..errors import BrokenPoolError
from ..system.shutdown import end_before_exit
from .coordinator import MasterOptions
from .fleet import Group
from .loop import Loop
from .peers import WorkerInfo
from .tasks import Task

__all__ = ["Master"]


class Master:
    """The handle on a thread that runs from `start` until all is closed. For any thread."""

    def __init__(
        self,
        options: MasterOptions,
        group: Group | None = None,
        cleanup: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare the master.

        Args:
            options: what it needs to know.
            group: the supervised group of workers that it looks after, if any.
            cleanup: called when everything else is closed, or could not be made.

        Raises:
            OSError: too few file descriptors are left.
        """
        try:
            self._loop = Loop(options, group, cleanup)
        except BaseException:
            cleanup()
            raise
        self._inbox = self._loop.inbox
        self._coordinator = self._loop.coordinator
        self._finish_at_exit = options.finish_at_exit
        self._thread = threading.Thread(target=self._run, name="zmqexecutor-master", daemon=True)
        self._pid = os.getpid()
        self.exiting = False
        """Whether the interpreter is exiting and takes no more tasks."""
        # Not a method that calls it, for the time that a call takes.
        self.submit: Callable[[Task], None] = self._inbox.submit
        """Hand over a task. The caller has checked that the master still takes some."""

    def _run(self) -> None:
        self._loop.run()  # by a method of this: until its end, the handle is there for the exit

    def start(self) -> None:
        """Start the thread.

        Raises:
            OSError: an address cannot be used.
            RuntimeError: the system has no room for another thread.
        """
        try:
            try:
                self._thread.start()
            except RuntimeError:
                self._loop.close()
                raise
            end_before_exit(self)
            self._loop.opened.result()
        except BaseException:  # an interrupt, perhaps, while the thread starts or when it runs
            self._inbox.call(lambda: self._coordinator.close_when_done(cancel=False))
            raise

    def equip(self, setup: bytes) -> None:
        """Say, once, what workers must prepare, for the entrances that have left it open."""
        self._call(lambda: self._coordinator.equip(setup))

    def wait_for_workers(self, number: int, timeout: float | None) -> None:
        """Wait until so many workers are ready; those of the group are started for it.

        Raises:
            TimeoutError: they were not there in time.
            BrokenPoolError: the pool cannot run tasks any more.
            RuntimeError: it has been shut down.
        """
        self._coordinator.attendance.wait(
            number,
            timeout,
            want=lambda: self._call(lambda: self._coordinator.want(number)),
            check=self._check_running,
        )

    def _check_running(self) -> None:
        if self.broken:
            raise BrokenPoolError(self.broken)
        if self._inbox.closed or self._coordinator.closing:
            raise RuntimeError("the pool has been shut down")

    def close(self, *, cancel: bool = False) -> None:
        """End when the tasks handed over are done; `cancel` drops those not sent."""
        self._call(lambda: self._coordinator.close_when_done(cancel))

    def abort(self, reason: BaseException, *, kill: bool = False) -> None:
        """End now: queued tasks are cancelled, running ones fail for this reason.

        Workers are sent SIGTERM, or SIGKILL if `kill`.
        """
        self._call(lambda: self._coordinator.end(reason, kill))

    def kill(self, task: Task) -> None:
        """End a task, whether or not it is running."""
        self._call(lambda: self._coordinator.kill(task))

    def forget_share(self, key: bytes) -> None:
        """Have workers drop a shared object. Any thread, even in garbage collection."""
        if self._pid == os.getpid():
            self._inbox.call(lambda: self._coordinator.forget_share(key))

    @property
    def broken(self) -> str:
        """Why no task can run any more, once that is so; the text of a BrokenPoolError."""
        return self._coordinator.broken

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        """The workers that are ready, oldest first."""
        return self._coordinator.attendance.infos()

    @property
    def refused(self) -> Mapping[str, int]:
        """How many connections were refused over TCP with keys since `start`, by reason."""
        refused: Counter[str] = Counter()
        for channels in self._coordinator.channels:
            refused.update(channels.refused)
        return refused

    def join(self) -> None:
        """Wait for the end of the thread, unless it is this one."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def end_at_exit(self) -> None:
        """The interpreter exits: do what is to be done before it may."""
        if self._pid != os.getpid():
            return  # a forked child has no such thread
        self.exiting = True
        if self._finish_at_exit and not _interrupted():
            self.close()
        else:
            self.abort(CancelledError("the interpreter exits"))
        self.join()

    def _call(self, action: Callable[[], None]) -> None:
        if self._thread.is_alive():
            self._inbox.call(action)


def _interrupted() -> bool:
    """Whether the program ends because of Ctrl-C, after which nobody wants to wait."""
    return getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1")
