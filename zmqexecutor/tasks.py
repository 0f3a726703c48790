"""A task: one job with its payload and its future, on the master's side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

from .buffers import Lease
from .protocol import Frame, Result, Segment
from .scheduler import Job

__all__ = ["Decode", "Shared", "Task"]

Decode: TypeAlias = Callable[[Result, Sequence[Frame]], Any]
"""Makes a future's value of a result and its buffers, or raises."""


@dataclass(frozen=True, slots=True)
class Shared:
    """Data that many tasks need, such as a function; each worker is sent it once."""

    key: bytes
    data: bytes


class Task(Job):
    """A job with its payload and its future."""

    __slots__ = (
        "buffers",
        "codec",
        "data",
        "decode",
        "future",
        "id",
        "lease",
        "name",
        "sent",
        "shared",
    )

    def __init__(
        self,
        future: Future[Any],
        data: bytes,
        decode: Decode,
        *,
        name: str,
        id: str = "",  # noqa: A002  (the seed's word for it)
        codec: str = "",
        shared: Shared | None = None,
        buffers: Sequence[Frame] = (),
        lease: Lease | None = None,
    ) -> None:
        super().__init__(shared.key if shared else codec)
        self.future = future
        self.data = data
        self.decode = decode
        self.name = name
        """For messages to people: a function's name, or the id."""
        self.id = id
        self.codec = codec
        self.shared = shared
        self.buffers = buffers
        self.lease = lease
        """On the segment that has the buffers in the place of `buffers`."""
        self.sent = False
        """Whether the future has been told that it runs."""

    def start(self) -> bool:
        """Mark the future as running; False if it was cancelled before."""
        if not self.sent:
            self.sent = self.future.set_running_or_notify_cancel()
            if not self.sent:
                self._end_lease()
        return self.sent

    def ship(self, mapped: bool) -> tuple[Segment | None, Sequence[Frame]]:
        """The buffers for a worker: a segment if it can map one, else frames."""
        if self.lease is None:
            return None, self.buffers
        if mapped:
            return self.lease.lend(), ()
        return None, self.lease.views()

    def finish(self, result: Result, buffers: Sequence[Frame]) -> None:
        """Complete the future with what the worker sent."""
        try:
            value = self.decode(result, buffers)
        except BaseException as error:
            # Its traceback would keep this task and its arguments alive.
            self.fail(error.with_traceback(None))
        else:
            self._end_lease()
            _complete(self.future.set_result, value)

    def fail(self, error: BaseException) -> None:
        """Complete the future with an exception, unless it was cancelled."""
        self._end_lease()
        if self.start():
            _complete(self.future.set_exception, error)

    def _end_lease(self) -> None:
        if self.lease is not None:
            self.lease.end()


def _complete(setter: Callable[[Any], None], value: Any) -> None:
    try:
        setter(value)
    except BaseException:
        # A done-callback raised something, like SystemExit, that Future lets through.
        logging.getLogger("concurrent.futures").exception("a future's callback raised")
