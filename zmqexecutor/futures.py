"""The future of a task, which can end the task even when it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from .master.lean import LeanFuture

if TYPE_CHECKING:
    import weakref

    from .master.master import Master
    from .master.tasks import Task

__all__ = ["TaskFuture"]

T = TypeVar("T")


class TaskFuture(LeanFuture[T]):
    """A `concurrent.futures.Future` with a `kill`."""

    _master: weakref.ref[Master] | None = None
    _task: Task | None = None
    _kill_on_cancel = False

    def belongs_to(self, master: weakref.ref[Master], task: Task) -> None:
        """Called once, before anybody else knows the future."""
        # Weakly: a future that is kept must not keep the pool. The task lets go of it.
        self._master, self._task = master, task
        if task.options.kill_on_cancel:
            self._kill_on_cancel = True

    def kill(self) -> bool:
        """End the task, even if it is running, and return at once.

        A task that has not been sent to a worker is cancelled. If it runs, its worker
        is killed and replaced; then `result` raises TaskKilledError, which is a
        CancelledError. What the task started itself (processes in its process group)
        is killed with it. A task that ends by itself before that has its own result.

        Returns:
            False if the task had ended already, else True.
        """
        if self._cancel_queued():
            return True
        master = None if self._master is None else self._master()
        task = self._task
        if self.done() or master is None or task is None:
            return False
        master.kill(task)
        return True

    def cancel(self) -> bool:
        """Cancel the task if no worker has it yet; see `Future.cancel`.

        With the option `kill_on_cancel` a task that runs is ended, as by `kill`: then
        this returns True, and `cancelled` stays False, for `result` raises
        TaskKilledError when the worker has gone.
        """
        return self.kill() if self._kill_on_cancel else self._cancel_queued()

    def _cancel_queued(self) -> bool:
        task = self._task
        cancelled = super().cancel()
        if cancelled and task is not None:
            task.let_go()  # its arguments; the rest stays where it waits until its turn comes
        return cancelled
