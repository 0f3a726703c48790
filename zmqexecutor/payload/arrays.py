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
from typing import Any

__all__ = ["is_simple", "known_kinds", "reduce_array"]

_kinds: dict[type, bool] = {}


def known_kinds() -> dict[type, bool]:
    """The type of numpy's arrays, with False, and those of scalars that numbers make, with True.

    Nothing if numpy has not been imported.
    """
    if not _kinds:
        _find_kinds()
    return _kinds


def is_simple(array: Any) -> bool:
    """Whether it is an array of numbers in one piece, by rows or by columns."""
    dtype = array.dtype
    return dtype.isbuiltin == 1 and not dtype.hasobject and not dtype.metadata and array.flags.forc


def reduce_array(obj: Any) -> Any:
    """How to pickle an object of a class that is in numpy; NotImplemented if as numpy does."""
    is_scalar = known_kinds().get(type(obj))
    if is_scalar:
        return type(obj), (obj.item(),)
    if is_scalar is None or not is_simple(obj):
        return NotImplemented
    buffer = pickle.PickleBuffer(obj)
    if obj.flags.c_contiguous:
        return type(obj), (obj.shape, obj.dtype.str, buffer)
    return type(obj), (obj.shape, obj.dtype.str, buffer, 0, None, "F")


def _find_kinds() -> None:
    numpy: Any = sys.modules.get("numpy")
    sizes = {"int": (8, 16, 32, 64), "uint": (8, 16, 32, 64), "float": (16, 32, 64)}
    names = [f"{name}{bits}" for name in sizes for bits in sizes[name]]
    names += ["complex64", "complex128", "bool_"]
    try:
        scalars: list[type] = [getattr(numpy, name) for name in names]
        found = {kind: True for kind in scalars if getattr(numpy, kind.__name__, None) is kind}
        found[numpy.ndarray] = False
    except AttributeError:  # another thread is about to import it
        return
    _kinds.update(found)
