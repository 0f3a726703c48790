"""What arguments were when the call was made: copies of their buffers, for any thread.

A program may give one array to a thousand tasks. While one of them waits, the next one's
copy would be the same, so the array is compared with it instead, which takes less time
than to copy it, and no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from ..system.interrupts import is_interrupt
from ..system.memory import keep_freed_memory
from ..wire.comparison import same
from ..wire.leases import Lease
from .arrays import ReadOnlyMemory

if TYPE_CHECKING:
    from ..wire.buffers import Segments

__all__ = ["Snapshots"]

MOST_KNOWN: Final = 1024
"""Copies that are looked for; to clear all is simpler than to be told of the end of each."""

T = TypeVar("T")
_Origin: TypeAlias = tuple[int, ...]
"""Which object a buffer belongs to, and its size."""


class Snapshots:
    """Finds the copies that tasks still need, by what they were made of.

    An object that has the identity of one that is gone, or whose contents have changed,
    is found out by the comparison.
    """

    def __init__(self) -> None:
        self._leases: dict[_Origin, weakref.ref[Lease]] = {}
        self._copies: dict[_Origin, weakref.ref[memoryview]] = {}

    def in_segment(
        self, segments: Segments, views: Sequence[memoryview], first: Sequence[bytes]
    ) -> Lease | None:
        """A segment with these buffers, as for `Segments.store`; None if there is no room."""
        if first:  # a pickle, which is another one each time
            return Lease.store(segments, views, first=first)
        origin = tuple(number for view in views for number in _origin(view))
        known = self._leases.get(origin)
        lease = known() if known is not None else None
        if lease is None or not lease.says(views):
            lease = Lease.store(segments, views)
            if lease is not None:
                _note(self._leases, origin, lease)
        return lease

    def copies(self, views: Sequence[memoryview]) -> list[memoryview]:
        """Copies of these buffers in this process's memory."""
        keep_freed_memory()
        return list(map(self._copy, views))

    def _copy(self, view: memoryview) -> memoryview:
        if view.readonly and _made_over(bytes, view) is not None:
            return view  # nobody can change them
        origin = _origin(view)
        known = self._copies.get(origin)
        copy = known() if known is not None else None
        if copy is None or not same(view, copy):
            copy = memoryview(bytes(view))
            _note(self._copies, origin, copy)
        return copy


def _made_over(kind: type[T], view: memoryview) -> T | None:
    """What of this kind an array was made over, if it is the owner of the memory."""
    owner: Any = view.obj
    while owner is not None and not isinstance(owner, kind):
        owner = getattr(owner, "base", None)
    return owner


def _origin(view: memoryview) -> _Origin:
    # Arrow makes a new object for each look at a buffer, and so do we of a read-only array.
    owner: Any = _made_over(ReadOnlyMemory, view) or view.obj
    try:
        address = getattr(owner, "address", None)
    except Exception as error:  # of a class that is not Arrow's
        if is_interrupt(error):
            raise
        address = None
    return address if type(address) is int else id(owner), view.nbytes


def _note(known: dict[_Origin, weakref.ref[T]], origin: _Origin, copy: T) -> None:
    if len(known) >= MOST_KNOWN:
        known.clear()
    known[origin] = weakref.ref(copy, _ended)


def _ended(_: object) -> None:
    """Nothing; but of what ends in a cycle, only references with a callback are cleared in time.

    Python 3.14 clears others when finalizers have run.
    """
