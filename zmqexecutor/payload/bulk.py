"""Large pickles in definitions: they travel as shares, and are known when they come again.

A function of the script may use a table of a gigabyte. Since it may change between any two
submits, it is pickled for each. That costs little as long as the buffers in it are not
copied: they are compared with those that the workers have, at the speed of memory. Only if
something differs is the pickle packed anew, as a `Share`, which the definition names:

    entry of the table: "the bulk of this share" ──► pickle and buffers, in shared memory

So the definition stays small, and the table is there once for all workers, which map it
copy-on-write: what a task writes to it stays in its worker, as after a fork.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, Final

from ..wire.comparison import same
from .digests import digest_of
from .shares import Share, open_share

__all__ = ["BULK", "Bulk", "Outside", "flags", "load_bulk"]

BULK: Final = 16 * 1024
"""From this many bytes a pickle with its buffers is bulk."""


class Outside:
    """Takes large buffers out of a pickle: a pickler's `buffer_callback`.

    Attributes:
        views: what it has taken.
        closed: whether buffers are to stay in the pickle.
    """

    def __init__(self, *, closed: bool = False) -> None:
        self.views: list[memoryview] = []
        self.closed = closed

    def __call__(self, buffer: pickle.PickleBuffer) -> bool:
        """Say whether this buffer stays inside."""
        view = buffer.raw()
        if self.closed or view.nbytes < BULK:
            return True
        self.views.append(view)
        return False


class Bulk:
    """A large pickle as it was packed last.

    Attributes:
        share: what workers get, for as long as somebody may need it.
        payload: a small pickle that gives what is in it.
        digest: of what is in it: equal for equal contents.
    """

    __slots__ = ("__weakref__", "_parts", "_readonly", "digest", "payload", "share")

    def __init__(self, share: Share, parts: Sequence[memoryview], readonly: bytes) -> None:
        """Note what was packed.

        Args:
            share: the pickle and its buffers.
            parts: what was packed of them, in the same order.
            readonly: for each buffer whether it was.
        """
        self.share = share
        self.payload = pickle.dumps(_Call(share.key, readonly), 5)
        self._parts = parts
        self._readonly = readonly
        sizes = b",".join(b"%d" % part.nbytes for part in parts)
        self.digest = digest_of(readonly, sizes, *parts)

    @property
    def buffers(self) -> Sequence[memoryview]:
        """Those beside the pickle, as they were packed."""
        return self._parts[1:]

    def says(self, data: bytes, views: Sequence[memoryview]) -> bool:
        """Whether this pickle with these buffers is the same."""
        parts = [memoryview(data), *views]
        if len(parts) != len(self._parts) or flags(views) != self._readonly:
            return False
        return all(map(same, parts, self._parts))


def flags(views: Sequence[memoryview]) -> bytes:
    """Which of them are read-only."""
    return bytes(view.readonly for view in views)


class _Call:
    """Its pickle is a call of `load_bulk`."""

    def __init__(self, *args: bytes) -> None:
        self.args = args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[bytes, ...]]:
        return load_bulk, self.args


def load_bulk(key: bytes, readonly: bytes) -> Any:
    """What is in the bulk, in a worker that has been told of its share: a new one each time."""
    data, *parts = open_share(key)
    return pickle.loads(data, buffers=map(_writable, parts, readonly))


def _writable(part: bytes | memoryview, readonly: int) -> bytes | bytearray | memoryview:
    return part if readonly or not isinstance(part, bytes) else bytearray(part)
