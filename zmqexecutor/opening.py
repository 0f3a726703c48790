"""What takes its time to make is made in a thread, and waited for when it is needed."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Generic, TypeVar

from .system.shutdown import end_before_exit

__all__ = ["Opening"]

T = TypeVar("T")


class Opening(Generic[T]):
    """Something that is made, or was. For any thread."""

    def __init__(self, make: Callable[[], T], *, at_once: bool) -> None:
        """Make it, or begin to.

        Args:
            make: makes it, or raises what `result` is to raise.
            at_once: whether in this thread. Then what it raises is raised here.
        """
        self._made: Future[T] = Future()
        self._traceback: TracebackType | None = None
        self._thread: threading.Thread | None = None
        if at_once:
            self._made.set_result(make())
            return
        self._thread = thread = threading.Thread(
            target=self._run, args=(make,), name="zmqexecutor-opening", daemon=True
        )
        end_before_exit(self)
        _all.add(self)
        try:
            thread.start()
        except RuntimeError:  # the system has no room for another one, or the interpreter exits
            self._thread = threading.current_thread()
            self._run(make)

    def _run(self, make: Callable[[], T]) -> None:
        try:
            result = make()
        except BaseException as error:
            self._traceback = error.__traceback__
            self._made.set_exception(error)
        else:
            self._made.set_result(result)

    def result(self) -> T:
        """It, when it has been made.

        Raises:
            RuntimeError: this is called by the thread that makes it: by a finalizer, perhaps, that
                the garbage collector runs there.
        """
        if self._waits_for_itself():
            raise RuntimeError("a finalizer cannot use an executor that is still being opened")
        if (error := self._made.exception()) is not None:
            raise error.with_traceback(self._traceback)  # not with those of other calls
        return self._made.result()

    def result_or_none(self) -> T | None:
        """It, or None if it could not be made."""
        if self._waits_for_itself() or self._made.exception() is not None:
            return None
        return self._made.result()

    def _waits_for_itself(self) -> bool:
        return self._thread is threading.current_thread() and not self._made.done()

    def end_at_exit(self) -> None:
        """Wait: what has been made has an end of its own."""
        if not self._waits_for_itself():  # an import may fork
            self._made.exception()


_all: weakref.WeakSet[Opening[Any]] = weakref.WeakSet()


def _wait_for_all() -> None:
    for opening in list(_all):
        opening.end_at_exit()


# A child would find half of it, and locks that nobody is there to release.
os.register_at_fork(before=_wait_for_all)
