"""Values to data and buffers, and back.

- *Data* is a plain pickle, which `pickle.loads` reads at C speed. `plain` has what is
  marshalled instead: arguments if there are no kwargs, or a result.
- *Buffers* are the memory of big arrays (pickle protocol 5), at least 32 KiB each; what
  is smaller stays in the data. One byte for each buffer, after the pickle in
  the data, says whether it is read-only. Arguments are copied when the call is
  made: the caller may go on to change them. Results are not: send them before
  the next call runs.
- A pickle that is itself that big, of big bytes for example, is the first buffer, and
  the data is empty.
- Where there are `Segments`, buffers are copied into one of them, results too.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import msgspec

from ..wire.buffers import IN_SEGMENT, Segments
from .namespaces import Key
from .picklers import ValuePickler
from .snapshots import Snapshots

if TYPE_CHECKING:
    from ..wire.leases import Lease
    from ..wire.protocol import Segment

__all__ = [
    "NO_KEYS",
    "OUT_OF_BAND",
    "Buffer",
    "Packed",
    "Pieces",
    "ReusedPickler",
    "loads",
    "pack",
    "take_any_buffer",
    "writable",
]

OUT_OF_BAND: Final = 32 * 1024
"""Buffers of at least this many bytes travel beside the data, not in it."""

Buffer = bytes | bytearray | memoryview
"""What buffers may be when they arrive. Read-only ones are copied where an array
has to be writable; writable ones are used in place, so their giver gives them up."""

_LARGEST_TABLE: Final = 64 * 1024
"""Bytes of a pickler's table of objects that is cleared at little cost."""
NO_KEYS: frozenset[Key] = frozenset()


class Packed(msgspec.Struct, frozen=True):
    """A pickle and its buffers: in `buffers`, or in a segment."""

    data: bytes
    buffers: Sequence[memoryview] = ()
    segment: Segment | None = None
    """For somebody else to own."""
    lease: Lease | None = None
    """On a segment that others may use too."""


def pack(
    data: bytes,
    views: list[memoryview],
    segments: Segments | None,
    snapshots: Snapshots | None,
    *,
    first: Sequence[bytes] = (),
) -> Packed:
    """Find a place for buffers.

    Args:
        data: what is beside them.
        views: the buffers.
        segments: where they go to if they are big; None leaves them in messages.
        snapshots: where they are copied, if they may change before they are sent.
        first: what another buffer before them is to be put together from.
    """
    total = sum(view.nbytes for view in views) + sum(map(len, first))
    if segments is not None and total >= IN_SEGMENT:
        if snapshots is None:
            segment = segments.store(views, first=first)
            if segment is not None:
                return Packed(data, segment=segment)
        else:
            lease = snapshots.in_segment(segments, views, first)
            if lease is not None:
                return Packed(data, lease=lease)
    if snapshots is not None:
        views = snapshots.copies(views)
    if first:
        views = [memoryview(b"".join(first)), *views]
    return Packed(data, views)


def loads(data: Buffer, buffers: Sequence[Buffer]) -> Any:
    """Return the value of some data that was pickled, and its buffers."""
    if not data and buffers:
        data, *buffers = buffers
    if not buffers:
        return pickle.loads(data)
    # Flags of read-only buffers follow the pickle, which ends where it says so.
    flags = bytes(data[-len(buffers) :])
    return pickle.loads(
        data,
        buffers=[
            memoryview(buffer).toreadonly() if readonly else writable(buffer)
            for buffer, readonly in zip(buffers, flags, strict=True)
        ],
    )


def writable(buffer: Buffer) -> Buffer:
    """The same memory if it can be written to, else a copy."""
    return bytearray(buffer) if memoryview(buffer).readonly else buffer


def _take_buffer(into: list[memoryview], least: int, buffer: pickle.PickleBuffer) -> bool:
    view = buffer.raw()
    if view.nbytes < least:
        return True  # keep it in the data
    into.append(view)
    return False


def take_any_buffer(into: list[memoryview], buffer: pickle.PickleBuffer) -> bool:
    """Put a buffer beside the pickle, small ones too: there it is read-only for those who share."""
    view = buffer.raw()
    if not view.nbytes:
        return True
    into.append(view)
    return False


class Pieces:
    """What a pickler writes to. A pickle of less than 64 KiB is one piece.

    Big bytes are a piece as they are: they are not copied before they go into a segment.
    """

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, piece: bytes | bytearray | pickle.PickleBuffer) -> None:
        """Take a part of the pickle; called by the pickler."""
        # Of a bytearray the size is in the pickle already, and another thread may change it.
        if not isinstance(piece, bytes):
            piece = bytes(piece.raw() if isinstance(piece, pickle.PickleBuffer) else piece)
        self.pieces.append(piece)


_P = TypeVar("_P", bound=ValuePickler)


class ReusedPickler(Generic[_P]):
    """A pickler that is made once; making one costs more than pickling (1, "a").

    After an exception it is not used again, nor once it was used for many objects or for a
    large pickle: the table in which it notes what it has seen keeps its size, and to clear a
    large one would cost every later call more than a new pickler does; so does its room for a
    pickle. Between two uses it keeps nothing.
    """

    reusable = True

    def __init__(
        self,
        kind: Callable[[Pieces, Callable[[pickle.PickleBuffer], bool]], _P],
        out_of_band: int,
        snapshots: Snapshots | None = None,
    ) -> None:
        """Make the pickler.

        Args:
            kind: its class.
            out_of_band: buffers of at least so many bytes are beside the pickle.
            snapshots: where they are copied, if they may change before they are sent.
        """
        file = Pieces()
        self._pieces = file.pieces
        self._buffers: list[memoryview] = []
        self._out_of_band = out_of_band
        self._snapshots = snapshots
        self.pickler = kind(file, functools.partial(_take_buffer, self._buffers, out_of_band))
        self._dump = self.pickler.dump
        self._size = self.pickler.__sizeof__  # its table's, as no pickle is in it after `dump`
        self._clear_memo = self.pickler.clear_memo
        self._clear_ordinary = self.pickler.ordinary.clear

    def dumps(self, obj: object, segments: Segments | None = None) -> Packed:
        """Pickle an object; `take_keys` has to follow."""
        pieces = self._pieces
        self._dump(obj)
        self.reusable = len(pieces) == 1 and self._size() <= _LARGEST_TABLE
        if self._buffers or len(pieces) > 1 or len(pieces[0]) >= self._out_of_band:
            packed = self._pack(segments)
        else:
            packed = Packed(pieces[0])
        if self.reusable:
            self._clear_memo()
            self._clear_ordinary()
        pieces.clear()
        return packed

    def _pack(self, segments: Segments | None) -> Packed:
        pieces, views = self._pieces, self._buffers[:]
        self._buffers.clear()
        pieces.append(bytes(view.readonly for view in views))
        if sum(map(len, pieces)) >= self._out_of_band:
            return pack(b"", views, segments, self._snapshots, first=pieces)
        return pack(b"".join(pieces), views, segments, self._snapshots)

    def take_keys(self) -> frozenset[Key]:
        """Return what the last pickle refers to, and forget it."""
        pickler = self.pickler
        if not pickler.by_value:
            return NO_KEYS
        keys = frozenset(pickler.refs | pickler.names)
        pickler.reset()
        return keys
