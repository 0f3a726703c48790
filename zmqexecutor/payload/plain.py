"""Values that are marshalled, not pickled, in a third of the time.

Numbers and short text alone are; with numpy's arrays and scalars among them they become a
list, in which a tuple stands for an array or a scalar:

    (1, "a", array([1.5, 2.5]), float64(3.5))
    [1, "a", ((2,), "<f8", "C", memory), ("float64", 3.5)]

Of a large array the memory is a buffer. Both ends are of the same version of Python. Who gets an
array may write to it, as with the standard library, also if it was read-only.
"""

from __future__ import annotations

import marshal
import pickle
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from .arrays import is_simple, known_kinds
from .reducers import is_registered
from .values import OUT_OF_BAND, Buffer, Packed, pack, writable

if TYPE_CHECKING:
    from ..wire.buffers import Segments
    from .snapshots import Snapshots

__all__ = ["PICKLED", "are_plain", "dump_arrays", "load_plain"]

PICKLED: Final = (b"\x80", b"")
"""How data begins that was not marshalled. The pickle may be beside it."""

_NUMBERS: Final = frozenset((int, float, complex, bool, type(None)))
_TEXT: Final = frozenset((str, bytes))
_SHORT_TEXT: Final = 10_000
"""Characters or bytes; longer text is pickled, and may travel beside the data."""


def are_plain(values: Iterable[object]) -> bool:
    """Whether they can be marshalled as they are: exactly of types that hold nothing else."""
    for value in values:
        kind = type(value)
        if kind not in _NUMBERS and (kind not in _TEXT or len(value) >= _SHORT_TEXT):  # type: ignore[arg-type]
            return False
    return True


def dump_arrays(
    values: Sequence[Any], segments: Segments | None = None, snapshots: Snapshots | None = None
) -> Packed | None:
    """Marshal values that are plain but for arrays and scalars; None if others are among them.

    Args:
        values: at least one array or scalar among them.
        segments: as for `values.pack`.
        snapshots: the same.
    """
    kinds = known_kinds()
    if kinds.keys().isdisjoint(map(type, values)):
        return None
    marshalled: list[Any] = []
    views: list[memoryview] = []
    met: set[int] = set()
    for value in values:
        kind = type(value)
        name = kinds.get(kind)
        if name is None:
            if not are_plain((value,)):
                return None
            marshalled.append(value)
            continue
        if is_registered(kind) or id(value) in met:  # one twice stays one
            return None
        met.add(id(value))
        if name:
            number = value.item()
            if number != number:  # there are several of them
                return None
            marshalled.append((name, number))
        elif is_simple(value):
            by_rows, memory = value.flags.c_contiguous, None
            if value.nbytes >= OUT_OF_BAND:
                views.append(pickle.PickleBuffer(value).raw())
            else:
                memory = value if by_rows else value.T  # which has the same memory, by rows
            order = "C" if by_rows else "F"
            marshalled.append((value.shape, value.dtype.str, order, memory))
        else:
            return None
    data = marshal.dumps(marshalled)
    return pack(data, views, segments, snapshots) if views else Packed(data)


def load_plain(data: Buffer, buffers: Sequence[Buffer]) -> Any:
    """Return what was marshalled; in a list, if there are arrays or scalars in it."""
    values = marshal.loads(data)
    if type(values) is not list:
        return values
    import numpy

    left = iter(buffers)
    for at, value in enumerate(values):
        if type(value) is not tuple:
            continue
        if len(value) == 2:
            name, number = value
            values[at] = getattr(numpy, name)(number)
            continue
        shape, dtype, order, memory = value
        memory = writable(next(left)) if memory is None else bytearray(memory)
        values[at] = numpy.ndarray(shape, dtype, memory, 0, None, order)
    return values
