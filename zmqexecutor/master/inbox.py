"""The way from other threads to the master thread.

    submit ──► offer, if there is one and it is taken ──► an idle worker
       └─────► items ──► wake-up ──► the master thread reads them in its next step
    call ────────┘

What is left here is read, until the inbox is closed: the tasks that are here then fail, and
later ones at once, and calls are not made any more. Nothing is locked and nothing blocks:
interrupts (Ctrl-C), signal handlers and finalizers may come in the middle of it, and may
submit themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError

from ..errors import BrokenPoolError
from ..wire.wakeup import Wakeup
from .offers import Offer
from .tasks import Task

__all__ = ["Inbox", "late_error"]


class Inbox:
    """Tasks, and calls that the master thread is to make."""

    def __init__(self) -> None:
        self.items: deque[Task | Callable[[], None]] = deque()
        """What the master thread has not read yet, oldest first."""
        self.offer: Offer | None = None
        """An idle worker for the next task, while the master thread sleeps."""
        self._nap: list[None] = []  # not empty while it sleeps and nobody has woken it
        self._wakeup: Wakeup | None = Wakeup()  # None when it is closed
        self._broken = ""

    # ------------------------------------------------- called by other threads

    def submit(self, task: Task) -> None:
        """Hand over a task. The caller has checked that the master still takes some."""
        offer = self.offer
        if offer is not None and not self.items and offer.take(task):
            if not offer.send(task):
                self.wake()  # to send it in another way
            return
        self.items.append(task)
        if nap := self._nap:
            # In this order, and only of this sleep: who is interrupted between the two, or
            # late, must not let others believe that a later one has been ended.
            self.wake()
            nap.clear()
        if self._wakeup is None:
            self._fail_late()  # the caller's check and the end have crossed

    def call(self, action: Callable[[], None]) -> None:
        """Have the master thread call this, unless the inbox is closed before."""
        if self._wakeup is not None:
            self.items.append(action)
            self.wake()
            if self.closed:
                self._fail_late()

    def wake(self) -> None:
        """Have the master thread take its next step now."""
        if (wakeup := self._wakeup) is not None:
            wakeup.set()

    @property
    def closed(self) -> bool:
        """Whether nobody reads it any more."""
        return self._wakeup is None

    def _fail_late(self) -> None:
        while True:
            try:
                item = self.items[0]
            except IndexError:
                return
            if isinstance(item, Task):
                item.fail(late_error(self._broken))
            try:
                self.items.remove(item)  # only now: an interrupt before that loses nothing
            except ValueError:
                pass  # another thread has been here, too

    # -------------------------------------------- called by the master thread

    def fileno(self) -> int:
        """What to poll for reading; call `clear` when it is readable."""
        assert self._wakeup is not None
        return self._wakeup.fileno()

    def clear(self) -> None:
        """It is awake; what comes from now on wakes it anew."""
        assert self._wakeup is not None
        self._wakeup.clear()

    def doze(self) -> None:
        """It will sleep, if it finds `items` empty after this: who adds one must wake it."""
        self._nap = [None]

    def rouse(self) -> None:
        """It does not sleep any more, and reads `items` before it does."""
        self._nap = []

    def close(self, broken: str) -> None:
        """Fail the tasks that are here and that come from now on.

        Args:
            broken: why the pool cannot run tasks any more, or nothing if it has been shut down.
        """
        self._broken = broken
        self._wakeup = None  # closed when no other thread is in the middle of using it
        self._fail_late()


def late_error(broken: str) -> Exception:
    """What a task fails with that came too late."""
    return BrokenPoolError(broken) if broken else CancelledError("the pool has been shut down")
