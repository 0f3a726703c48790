"""Segments that this process has stored: each is its own until nobody needs it any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .buffers import Segments
    from .protocol import Segment

__all__ = ["Lease"]


class Lease:
    """Looks after a stored segment; it ends when nobody refers to this object any more.

    The segment may be lent to any number of processes. It is used again only if each has
    said that it does not hold it any more, and is removed otherwise.
    """

    # An object with a `__del__` can be had from a weak reference while that runs, and is
    # of no use then. So what has one is another object, of which nobody has such a reference.
    __slots__ = ("__weakref__", "_held", "_segments", "segment")

    def __init__(self, segments: Segments, segment: Segment) -> None:
        self._segments = segments
        self._held = _Held(segments, segment.name)
        self.segment = segment

    @classmethod
    def store(
        cls,
        segments: Segments,
        views: Sequence[memoryview],
        *,
        first: Sequence[bytes] = (),
        reused: bool = True,
    ) -> Lease | None:
        """Do what `Segments.store` does, and look after what came of it."""
        segment = segments.store(views, first=first, reused=reused)
        return None if segment is None else cls(segments, segment)

    def lend(self) -> Segment:
        """Another process is told of the segment."""
        self._held.lent += 1
        return self.segment

    def returned(self, kept: bool) -> None:
        """It has done its work with it, and holds it no more unless it kept it."""
        self._held.lent -= not kept

    def views(self) -> list[memoryview]:
        """What is in it, for those who cannot map it; they may hold it for as long as they like.

        Raises:
            OSError: it cannot be mapped.
        """
        self._held.lent += 1
        return self._segments.open(self.segment, readonly=True)

    def says(self, views: Sequence[memoryview]) -> bool:
        """Whether these buffers, of the same sizes, have the same contents."""
        return self._segments.compare(self.segment, views)


class _Held:
    __slots__ = ("_name", "_segments", "lent")

    def __init__(self, segments: Segments, name: str) -> None:
        self._segments = segments
        self._name = name
        self.lent = 0

    def __del__(self) -> None:
        self._segments.give_back(self._name, reusable=self.lent == 0)
