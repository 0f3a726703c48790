"""numpy's arrays and scalars, in a form that is made and read in half of the time.

numpy pickles an array with its type as an object of its own, in several steps:

    here      ndarray(shape, "<f8", buffer, 0, None, order)      float64(1.5)
    numpy     _frombuffer(buffer, dtype("f8", False, True).__setstate__((3, "<", None, None,
              None, -1, -1, 0)), shape, order)                   scalar(dtype(...), bytes)

That is most of the time that small arrays take. Only what has one of numpy's own types of
numbers is done here; the rest is numpy's affair.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["ReadOnlyMemory", "is_array", "is_fixed", "is_simple", "known_kinds", "reduce_array"]

_kinds: dict[type, str] = {}


def known_kinds() -> Mapping[type, str]:
    """The types that are treated here: that of arrays, with "", and of scalars, with their names.

    There are none before numpy is imported.
    """
    if not _kinds and "numpy" in sys.modules:
        _find_kinds()
    return _kinds


def is_array(value: object) -> bool:
    """Whether it is one of numpy's arrays, of whatever class."""
    return bool(known_kinds()) and issubclass(type(value), sys.modules["numpy"].ndarray)


def is_simple(array: Any) -> bool:
    """Whether it is an array of numbers in one piece, by rows or by columns."""
    dtype = array.dtype
    return (
        dtype.kind in "biufc" and dtype.isbuiltin == 1 and not dtype.metadata and array.flags.forc
    )


def is_fixed(value: object) -> bool:
    """Whether it is one of numpy's functions, which pickle as their names, or types of numbers."""
    if not known_kinds():
        return False
    numpy: Any = sys.modules["numpy"]
    if isinstance(value, numpy.ufunc):
        return True
    return isinstance(value, numpy.dtype) and value.isbuiltin == 1 and not value.metadata


class ReadOnlyMemory:
    """That of a read-only array, shown to numpy as if it could be written to.

    Attributes:
        base: the array.
        address: where the memory is.
    """

    def __init__(self, array: Any) -> None:
        self.base = array
        self.address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {
            "version": 3,
            "shape": (array.nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
        }


def _unlocked(array: Any) -> Any:
    """The same array to be read by pickle, which makes a copy that can be written to."""
    numpy: Any = sys.modules["numpy"]
    memory = numpy.asarray(ReadOnlyMemory(array))
    return numpy.ndarray(array.shape, array.dtype, memory, 0, array.strides)


def reduce_array(obj: Any, *, as_is: bool = False) -> Any:
    """How to pickle an object of one of these kinds; NotImplemented if as numpy does.

    Args:
        obj: the object.
        as_is: whether a read-only array is to arrive as one. With the standard library it does not.
    """
    kind = type(obj)
    name = _kinds[kind]
    if name:
        number = obj.item()
        # Of numbers that are none there are several. Older versions have no numpy.bool.
        if number != number or name != kind.__name__:
            return NotImplemented
        return kind, (number,)
    flags = obj.flags
    if not as_is and not flags.writeable and flags.forc and not obj.dtype.hasobject:
        obj = _unlocked(obj)
        if not is_simple(obj):
            return obj.__reduce_ex__(5)
    if not is_simple(obj):
        return NotImplemented
    if obj.flags.c_contiguous:
        return kind, (obj.shape, obj.dtype.str, pickle.PickleBuffer(obj))
    # The same memory, by rows: pickle takes it as it is.
    return kind, (obj.shape, obj.dtype.str, pickle.PickleBuffer(obj.T), 0, None, "F")


def _find_kinds() -> None:
    numpy: Any = sys.modules["numpy"]
    sizes = {"int": (8, 16, 32, 64), "uint": (8, 16, 32, 64), "float": (16, 32, 64)}
    names = [f"{name}{bits}" for name in sizes for bits in sizes[name]]
    names += ["complex64", "complex128", "bool_"]
    try:
        found: dict[type, str] = {getattr(numpy, name): name for name in names}
        found[numpy.ndarray] = ""
    except AttributeError:  # another thread is about to import it
        return
    _kinds.update(found)
