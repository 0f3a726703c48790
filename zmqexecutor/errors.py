"""Every exception that zmqexecutor raises on purpose, and its warning.

Each exception is a subclass of the standard one that callers of
`concurrent.futures` already catch, so that a changed import is enough.
"""

from __future__ import annotations

import concurrent.futures
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from .worker_errors import ProtocolError, RegistrationError, SerializationError, ZmqExecutorError

__all__ = [
    "BrokenPoolError",
    "ForkedExecutorError",
    "JobFailedError",
    "NoMasterError",
    "NoWorkerError",
    "PerformanceWarning",
    "ProtocolError",
    "RegistrationError",
    "SerializationError",
    "TaskKilledError",
    "TaskTimeoutError",
    "WorkerLostError",
    "ZmqExecutorError",
]


FORKED = (
    "this executor belongs to the process that made it, not to its forked child; "
    "make a new one in the child"
)
"""The text of a ForkedExecutorError."""
# As the standard library says it.
AFTER_SHUTDOWN = "cannot schedule new futures after shutdown"
AFTER_EXIT = "cannot schedule new futures after interpreter shutdown"


class PerformanceWarning(UserWarning):
    """Something takes long that need not be done; the message says what, and what to do instead.

    Given once for each global that is compared at each `submit`, when that has taken a second.
    """


class BrokenPoolError(ZmqExecutorError, BrokenProcessPool):
    """The pool cannot run anything any more; the message says why.

    Raised by every pending and later future when an initializer fails, when
    workers die again and again before they are ready, or when the supervisor
    cannot be kept running.
    """


class WorkerLostError(ZmqExecutorError, BrokenProcessPool):
    """The worker died while it ran this job. Other jobs and the pool go on.

    Attributes:
        job: what ran, as text (a function's name, or a job id).
        pid: the worker's process id, or None if it is not known.
        exitcode: the exit status as `subprocess` gives it (negative: a signal
            number), or None if nobody could tell.
        signal: the name of the signal that ended it, such as "SIGKILL", or None.
        stderr: the last lines that the worker wrote to its standard error.
        seconds: how long it had been running this job, or None if that is not known.
        peak_rss: the most memory that it had at once, in bytes, or None.
        cause: why it ended, in words, as far as that can be told.
        stack: where it crashed, as `faulthandler` wrote it, or empty.
    """

    def __init__(
        self,
        message: str,
        *,
        job: str = "",
        pid: int | None = None,
        exitcode: int | None = None,
        stderr: str = "",
        seconds: float | None = None,
        peak_rss: int | None = None,
        cause: str = "",
        stack: str = "",
    ) -> None:
        super().__init__(message)
        self.job = job
        self.pid = pid
        self.exitcode = exitcode
        self.stderr = stderr
        self.seconds = seconds
        self.peak_rss = peak_rss
        self.cause = cause
        self.stack = stack

    @property
    def signal(self) -> str | None:
        """The name of the signal that ended the worker, or None."""
        if self.exitcode is None or self.exitcode >= 0:
            return None
        try:
            return signal.Signals(-self.exitcode).name
        except ValueError:
            return f"signal {-self.exitcode}"

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("job", "pid", "exitcode", "stderr", "seconds", "peak_rss", "cause", "stack")
        values = {name: getattr(self, name) for name in names}
        return _rebuild_worker_lost, (self.args[0], values)


def _rebuild_worker_lost(message: str, values: dict[str, Any]) -> WorkerLostError:
    return WorkerLostError(message, **values)


# Before 3.11 the TimeoutError of concurrent.futures is a class of its own.
_TimeoutErrors: tuple[type[Exception], ...] = (
    (TimeoutError,)
    if sys.version_info >= (3, 11)
    else (concurrent.futures.TimeoutError, TimeoutError)
)


class TaskTimeoutError(ZmqExecutorError, *_TimeoutErrors):  # type: ignore[misc]
    """The task did not end within the time its caller allowed.

    Attributes:
        job: what ran, as text (a function's name, or a job id).
        seconds: how long it had been running, or None if that is not known.
        stack: where it was just before it was ended, as a traceback shows it; empty
            if the worker could not tell, since native code held the interpreter.
    """

    def __init__(
        self, message: str, *, job: str = "", seconds: float | None = None, stack: str = ""
    ) -> None:
        super().__init__(message)
        self.job = job
        self.seconds = seconds
        self.stack = stack

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_timeout, (self.args[0], self.job, self.seconds, self.stack)


def _rebuild_timeout(message: str, job: str, seconds: float | None, stack: str) -> TaskTimeoutError:
    return TaskTimeoutError(message, job=job, seconds=seconds, stack=stack)


class TaskKilledError(ZmqExecutorError, concurrent.futures.CancelledError):
    """The task was ended by the `kill` method of its future."""


class JobFailedError(ZmqExecutorError, RuntimeError):
    """A worker's target raised; the message ends with the worker's traceback."""


class NoWorkerError(ZmqExecutorError, RuntimeError):
    """No worker that could take the job registered in the time allowed."""


class ForkedExecutorError(ZmqExecutorError, RuntimeError):
    """An executor made before `os.fork` was used in the child process."""


class NoMasterError(ZmqExecutorError, ConnectionError):
    """A client found no master at the endpoint, or lost it before it answered."""
