"""The workers that are ready, and the threads that wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from ..system.arguments import check_integer, check_timeout
from .peers import Peer, WorkerInfo

__all__ = ["Attendance", "check_wait"]


class Attendance:
    """Kept by the master thread; any thread may look at it, or wait for it."""

    def __init__(self) -> None:
        self._ready: dict[bytes, Peer] = {}
        self._watchers: list[SimpleQueue[None]] = []

    def joined(self) -> int:
        """How many of them are not of the master's own group."""
        return sum(not peer.grouped for peer in self._ready.values())

    def infos(self) -> tuple[WorkerInfo, ...]:
        """What users see of them, oldest first."""
        # A list, made in one step: others may come and go.
        return tuple([peer.info() for peer in list(self._ready.values())])

    def come(self, peer: Peer) -> None:
        """A worker is ready."""
        self._ready[peer.identity] = peer
        self.tell()

    def leave(self, peer: Peer) -> None:
        """It is lost."""
        del self._ready[peer.identity]

    def clear(self) -> None:
        """All have gone."""
        self._ready.clear()
        self.tell()

    def tell(self) -> None:
        """Have those that wait look again."""
        for news in list(self._watchers):
            news.put(None)

    def wait(
        self,
        number: int,
        timeout: float | None,
        want: Callable[[], None],
        check: Callable[[], None],
    ) -> None:
        """Wait until so many workers are ready.

        Args:
            number: of workers.
            timeout: seconds to wait, or None.
            want: called once, when nothing more can happen unseen.
            check: called before each wait; raises if there will never be so many.

        Raises:
            TimeoutError: they were not there in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        # A queue, and not a Condition, whose wait a Ctrl-C can break in the middle.
        news: SimpleQueue[None] = SimpleQueue()
        self._watchers.append(news)
        try:
            want()
            while (there := len(self._ready)) < number:
                check()
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    raise TimeoutError(
                        f"{there} of {number} workers were ready after {timeout:g} s"
                    )
                with suppress(Empty):
                    news.get(timeout=remaining)
        finally:
            self._watchers.remove(news)


def check_wait(number: int, timeout: float | None) -> float | None:
    """Check the arguments of `wait_for_workers`, and return the timeout.

    Raises:
        TypeError: one has the wrong type.
        ValueError: one is out of range.
    """
    if check_integer("the number of workers", number) < 0:
        raise ValueError(f"the number of workers must be 0 or more, not {number}")
    return check_timeout("timeout", timeout)
