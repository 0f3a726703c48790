"""A task: one job with its payload and its future, on the master's side."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, InvalidStateError
from typing import Any, Final, TypeAlias

import msgspec

from ..errors import BrokenPoolError, SerializationError, TaskKilledError
from ..payload.shares import Share
from ..system.arguments import check_integer, check_seconds
from ..wire.leases import Lease
from ..wire.protocol import Frame, Result, Segment, Shared
from .lanes import Job
from .lean import LeanFuture

__all__ = [
    "PLAIN",
    "Decode",
    "Task",
    "TaskOptions",
    "make_options",
]

Decode: TypeAlias = Callable[[Result, Sequence[Frame]], Any]
"""Makes a future's value of a result and its buffers, or raises."""

LONGEST_RETRY_DELAY: Final = 60.0
"""Seconds; no wait before another try is longer."""


class TaskOptions(msgspec.Struct, frozen=True):
    """What `ZmqExecutor.options` sets, whose docstring tells more.

    Attributes:
        timeout: seconds that the task may run, or None.
        retries: how often it may be tried again.
        retry_on: the failures after which it is.
        retry_delay: seconds before the first other try; doubled for each further one.
        priority: higher ones leave the queue first.
        name: for messages to people, in the place of the function's name.
        kill_on_cancel: whether `Future.cancel` ends a task that runs.
        service: what its worker must be special for, or None.
    """

    timeout: float | None = None
    retries: int = 0
    retry_on: tuple[type[BaseException], ...] = (Exception,)
    retry_delay: float = 0.1
    priority: int = 0
    name: str | None = None
    kill_on_cancel: bool = False
    service: str | None = None


PLAIN: Final = TaskOptions()


def make_options(
    timeout: float | None,
    retries: int,
    retry_on: type[BaseException] | tuple[type[BaseException], ...],
    retry_delay: float,
    priority: int,
    name: str | None,
    kill_on_cancel: bool,
    service: str | None,
) -> TaskOptions:
    """Check options as `ZmqExecutor.options` takes them.

    Raises:
        TypeError: one has the wrong type.
        ValueError: one is out of range.
    """
    if timeout is not None:
        seconds = check_seconds("timeout", timeout)
        if not seconds > 0:
            raise ValueError(f"timeout must be more than 0 seconds, or None, not {timeout}")
        timeout = None if seconds == math.inf else seconds
    check_integer("priority", priority)
    if check_integer("retries", retries) < 0:
        raise ValueError(f"retries must be 0 or more, not {retries}")
    classes: tuple[Any, ...] = retry_on if isinstance(retry_on, tuple) else (retry_on,)
    for kind in classes:
        if not (inspect.isclass(kind) and issubclass(kind, BaseException)):
            raise TypeError(f"retry_on must be exception classes, not {kind!r}")
    delay = check_seconds("retry_delay", retry_delay)
    if not delay >= 0:
        raise ValueError(f"retry_delay must be 0 seconds or more, not {retry_delay}")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be text, not {name!r}")
    return TaskOptions(
        timeout, retries, classes, delay, priority, name, bool(kill_on_cancel), service
    )


class Task(Job, eq=False, kw_only=True):
    """A job with its payload and its future."""

    future: LeanFuture[Any]
    data: bytes
    decode: Decode
    name: str
    """For messages to people: a function's name, or the id."""
    id: str = ""
    codec: str = ""
    shared: Shared | None = None
    buffers: Sequence[Frame] = ()
    lease: Lease | None = None
    """On the segment that has the buffers in the place of `buffers`."""
    shares: Sequence[Share] = ()
    """Shared objects that it uses, until it is done."""
    options: TaskOptions = PLAIN
    sent: bool = False
    """Whether the future has been told that it runs."""
    tries: int = 0
    """How often it has failed and been tried again."""
    doomed: bool = False
    """Whether its caller wants it ended, whatever it does."""

    def start(self) -> bool:
        """Mark the future as running; False if the task is not wanted any more."""
        if self.doomed:
            self.kill()
            return False
        if not self.sent:
            try:
                self.sent = self.future.set_running_or_notify_cancel()
            except BaseException as problem:  # somebody else has completed it
                _log_unless_done(problem)
            if not self.sent:
                self.let_go()
        return self.sent

    def unstart(self) -> None:
        """Take `start` back, as long as nobody else has seen the future."""
        self.future._state = "PENDING"
        self.sent = False

    def wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return not self.doomed and not self.future.cancelled()

    def ship(self, mapped: bool) -> tuple[Segment | None, Sequence[Frame]]:
        """The buffers for a worker: a segment if it can map one, else frames."""
        if self.lease is None:
            return None, self.buffers
        if mapped:
            return self.lease.lend(), ()
        return None, self.lease.views()

    def finish(self, result: Result, buffers: Sequence[Frame]) -> BaseException | None:
        """Complete the future with what the worker sent, or return the task's exception."""
        try:
            value = self.decode(result, buffers)
        except BaseException as error:
            # Its traceback would keep this task and its arguments alive.
            return BaseException.with_traceback(error, None)  # its class may have its own
        self.let_go()
        try:
            self.future.set_result(value)
        except BaseException as error:
            _log_unless_done(error)
        return None

    def retry_after(self, error: BaseException) -> float | None:
        """Seconds to wait before the next try, or None if there is none after this failure."""
        options = self.options
        if self.tries >= options.retries or self.doomed or not isinstance(error, options.retry_on):
            return None
        if isinstance(error, (BrokenPoolError, TaskKilledError)):
            return None
        named = any(issubclass(kind, SerializationError) for kind in options.retry_on)
        if isinstance(error, SerializationError) and not error.task_raised and not named:
            return None  # it would fail again
        self.tries += 1
        return min(LONGEST_RETRY_DELAY, options.retry_delay * 2.0 ** min(self.tries - 1, 64))

    def fail(self, error: BaseException) -> None:
        """Complete the future with an exception, unless it is done or was cancelled."""
        self.let_go()
        try:
            if not self.sent:
                self.sent = self.future.set_running_or_notify_cancel()
            if self.sent:
                self.future.set_exception(error)
        except BaseException as problem:
            _log_unless_done(problem)

    def cancel(self) -> None:
        """Cancel it while it is queued; one given back by a worker counts as running."""
        if self.sent:
            self.fail(CancelledError())
        else:
            self.let_go()
            try:
                try:
                    self.future.cancel()
                finally:
                    self.future.set_running_or_notify_cancel()
            except BaseException as problem:
                _log_unless_done(problem)

    def kill(self) -> None:
        """End it with `TaskKilledError`; the caller sees to it that it does not run."""
        self.doomed = True
        self.fail(TaskKilledError(f"{self.name} was ended by the kill() of its future"))

    def let_go(self) -> None:
        """Keep nothing of what was to be sent: it is done, or nobody wants it."""
        self.future._task = None
        self.data, self.buffers, self.lease, self.shares = b"", (), None, ()


def _log_unless_done(error: BaseException) -> None:
    """What came of completing a future that may have been completed before.

    By `kill`, say, while the result was on its way.
    """
    if not isinstance(error, InvalidStateError):
        # A done-callback raised something, like SystemExit, that Future lets through; or
        # somebody else has completed a future that was waiting.
        logging.getLogger("concurrent.futures").error("a future was not completed", exc_info=error)
