"""Packs what many calls use: into shared memory if there is room, else into messages."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from ..wire.buffers import IN_SEGMENT
from ..wire.leases import Lease
from .bulk import Bulk, flags
from .namespaces import Key
from .shares import Contents, Share

if TYPE_CHECKING:
    from ..wire.buffers import Segments

__all__ = ["Packer"]

RECENT: Final = 8
"""How many bulks are looked at before another is packed."""
LARGEST_DATA: Final = 2**32 - 1
"""Bytes that msgpack takes for one value."""


class Packer:
    """Makes the shares of one executor. Many threads may use it at once.

    Attributes:
        segments: where big buffers go to; None leaves them in messages.
        elsewhere: whether there may be workers that cannot map segments.
        on_share: called with each share of a `bulk`.
        pool: told apart by identity, as the pool that the shares are for.
    """

    def __init__(self, segments: Segments | None = None) -> None:
        self.segments = segments
        self.elsewhere = False
        self.on_share: Callable[[Share], object] = id
        self.pool = object()
        # A function made anew for each call may hold what the last one did.
        self._recent: deque[Callable[[], Bulk | None]] = deque(maxlen=RECENT)

    def share(
        self,
        pieces: list[bytes],
        views: list[memoryview],
        keys: frozenset[Key],
        needs: tuple[Share, ...],
    ) -> Share:
        """Pack a pickle (in pieces) and its buffers; for the rest see `Share`.

        Raises:
            ValueError: it is too large to be sent.
        """
        data, lease, _ = self._pack(pieces, views)
        return Share(data, lease, self.pool, keys, needs)

    def bulk(self, pickled: bytes, views: list[memoryview]) -> Bulk:
        """Pack what is large in a definition, unless it has just been.

        Raises:
            ValueError: it is too large to be sent.
        """
        for find in tuple(self._recent):
            known = find()
            if known is not None and known.says(pickled, views):
                return known
        data, lease, parts = self._pack([pickled], views)
        if lease is not None:
            try:
                kept = lease.views()
            except OSError:  # no descriptor left, or no room for a mapping
                data, lease, parts = self._pack([pickled], views, mapped=False)
        if lease is None:
            kept = [memoryview(part) for part in parts]
        share = Share(data, lease, self.pool, frozenset(), ())
        self.on_share(share)
        bulk = Bulk(share, kept, flags(views))
        # What is not small lives only as long as it is used.
        small = sum(part.nbytes for part in kept) < IN_SEGMENT
        self._recent.append((lambda: bulk) if small else weakref.ref(bulk))
        return bulk

    def clear(self) -> None:
        """Know nothing any more of what was packed."""
        self._recent.clear()
        if self.segments is not None:
            self.segments.close()

    def _pack(
        self, pieces: list[bytes], views: list[memoryview], mapped: bool = True
    ) -> tuple[bytes, Lease | None, list[bytes]]:
        """Encoded `Contents`; the lease on their segment, or else their parts."""
        total = sum(map(len, pieces)) + sum(view.nbytes for view in views)
        if self.elsewhere and total > LARGEST_DATA - 2**20:
            raise ValueError(
                f"its {total / 2**30:.1f} GiB would have to travel in messages of at most 4 GiB "
                "to workers that join from elsewhere"
            )
        if mapped and self.segments is not None and total >= IN_SEGMENT:
            lease = Lease.store(self.segments, views, first=pieces, reused=False)
            if lease is not None:
                return msgspec.msgpack.encode(Contents([], lease.segment)), lease, []
        parts = [b"".join(pieces), *map(bytes, views)]
        data = msgspec.msgpack.encode(Contents(parts))
        if len(data) > LARGEST_DATA:
            raise ValueError(
                f"its {len(data) / 2**30:.1f} GiB would have to travel in messages of at most "
                "4 GiB, for there is no room in shared memory (/dev/shm)"
            )
        return data, None, parts
