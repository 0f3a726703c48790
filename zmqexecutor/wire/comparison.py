"""Whether two buffers are equal, or tuples hold the same objects, at the speed of memory.

Memoryviews compare one item after the other, and `mmap.find` did so before Python 3.13.
"""

from __future__ import annotations

import operator
import struct
import sys
from collections.abc import Callable
from typing import Any, Final

__all__ = ["same", "same_objects"]

_PIECE: Final = 64 * 1024
"""Bytes that are compared at a time; what is copied of them stays in the processor's cache."""

_MANY: Final = 256
"""Objects of which the addresses are compared as memory, which takes a third of the time."""
_POINTER: Final = struct.calcsize("P")

_memcmp: Callable[[int, int, int], int] | None = None


def same(one: memoryview, other: memoryview) -> bool:
    """Whether these bytes are the same."""
    size = one.nbytes
    if size != other.nbytes:
        return False
    numpy = sys.modules.get("numpy")
    if size > _PIECE and numpy is not None:
        # It takes two thirds of the time, and other threads may run. What it needs
        # of ctypes has been loaded by numpy, which tells the addresses of read-only memory.
        try:
            memcmp = _memcmp or _load_memcmp()
            return memcmp(_address(numpy, one), _address(numpy, other), size) == 0
        except (ImportError, AttributeError):
            pass  # a Python without ctypes, or numpy is still being imported
    for start in range(0, size, _PIECE):
        stop = start + _PIECE
        if bytearray(one[start:stop]) != other[start:stop]:
            return False
    return True


def same_objects(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    """Whether the same objects, not equal ones, are in both."""
    size = len(one)
    if size != len(other):
        return False
    if size >= _MANY and sys.implementation.name == "cpython":
        try:
            memcmp = _memcmp or _load_memcmp()
        except (ImportError, AttributeError):
            pass  # a Python without ctypes
        else:
            items = tuple.__basicsize__  # at the end of a tuple are the addresses
            return memcmp(id(one) + items, id(other) + items, size * _POINTER) == 0
    return all(map(operator.is_, one, other))


def _address(numpy: Any, view: memoryview) -> int:
    address: int = numpy.frombuffer(view, numpy.uint8).__array_interface__["data"][0]
    return address


def _load_memcmp() -> Callable[[int, int, int], int]:
    global _memcmp
    import ctypes

    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
    _memcmp = memcmp
    return memcmp
