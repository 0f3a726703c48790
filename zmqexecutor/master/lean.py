"""A future that costs less to make and to complete: there is one for each pending task."""

from __future__ import annotations

from _thread import RLock, allocate_lock
from concurrent.futures import Future
from typing import Any, Final, TypeVar

__all__ = ["LeanCondition", "LeanFuture"]

T = TypeVar("T")


class LeanCondition(RLock):  # type: ignore[misc]  # it can be inherited from
    """A `threading.Condition`, as far as futures use it.

    It is the lock itself, so that `with` runs no Python code, and has nothing else until
    somebody waits: a tenth of the time to make, and of the memory.
    """

    sleepers: list[Any] | None = None
    """A lock for each thread that waits."""

    def wait(self, timeout: float | None = None) -> bool:
        """Let go of the lock until `notify_all`, or for so many seconds.

        Returns:
            False if the time was over before.
        """
        sleeper = allocate_lock()
        sleeper.acquire()
        if self.sleepers is None:
            self.sleepers = []
        self.sleepers.append(sleeper)
        woken = False
        state = self._release_save()  # type: ignore[attr-defined]
        try:
            if timeout is None:
                woken = sleeper.acquire()
            elif timeout > 0:
                woken = sleeper.acquire(timeout=timeout)
            else:
                woken = sleeper.acquire(blocking=False)
        finally:
            self._acquire_restore(state)  # type: ignore[attr-defined]
            if not woken and self.sleepers and sleeper in self.sleepers:
                self.sleepers.remove(sleeper)
        return woken

    def notify_all(self) -> None:
        """Wake all that wait; they go on when the lock is free."""
        sleepers, self.sleepers = self.sleepers, None
        for sleeper in sleepers or ():
            sleeper.release()


class _WhenAskedFor:
    """A list of an object's own that is made when somebody first asks for it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, owner: LeanFuture[Any], _: object) -> list[Any]:
        owner._watched = True
        made: list[Any] = []
        setattr(owner, self._name, made)
        return made


class LeanFuture(Future[T]):
    """A `concurrent.futures.Future` that has a lean condition, and lists only if need be."""

    # What is written often does so without `with` and `super`: half of the time it takes.

    _waiters = _WhenAskedFor("_waiters")
    _done_callbacks = _WhenAskedFor("_done_callbacks")

    def __init__(self) -> None:
        self._condition = LeanCondition()  # type: ignore[assignment]
        self._state = "PENDING"
        self._result = None
        self._exception = None
        self._watched = False  # whether it has one of the lists; who wants it has the lock
        self._task: Any = None  # of the master, until that has completed this future

    def set_running_or_notify_cancel(self) -> bool:
        """As the standard library's."""
        condition = self._condition
        condition.acquire()
        try:
            if self._state == "PENDING":
                self._state = "RUNNING"
                return True
        finally:
            condition.release()
        return super().set_running_or_notify_cancel()

    def set_result(self, result: T) -> None:
        """As the standard library's."""
        condition = self._condition
        condition.acquire()
        try:
            if self._state == "RUNNING" and not self._watched:
                self._result = result
                self._state = "FINISHED"
                if condition.sleepers:  # type: ignore[attr-defined]
                    condition.notify_all()
                return
        finally:
            condition.release()
        super().set_result(result)

    def result(self, timeout: float | None = None) -> T:
        """As the standard library's."""
        if self._state == "FINISHED" and self._exception is None:
            return self._result  # type: ignore[return-value]  # it is there before the state
        try:
            return super().result(timeout)
        finally:
            self = None  # type: ignore[assignment]  # a cycle with the exception's traceback


_KNOWN: Final = set(vars(Future())) == {
    "_condition",
    "_state",
    "_result",
    "_exception",
    "_waiters",
    "_done_callbacks",
}
"""Whether a future has these parts in this version of Python, as it has up to 3.14."""

if not _KNOWN:
    LeanFuture = Future  # type: ignore[misc, assignment]
