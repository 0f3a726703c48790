"""Whether a large table has been changed: until Python 3.13, CPython says it at once.

It gives each dictionary another number with every change (PEP 509). What is kept of the table
is that number, not a copy of it.
"""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Callable
from typing import Any, Final

__all__ = ["unchanged"]

_MANY: Final = 256
"""Entries from which on it pays to have imported `ctypes`."""
_AT: Final = object.__basicsize__ + struct.calcsize("n")
"""Where the number is in a dictionary, after the count of its entries."""


def _numbers_changes() -> bool:
    return (
        sys.implementation.name == "cpython"
        and sys.version_info < (3, 14)
        and struct.calcsize("P") == 8
        and getattr(sys, "abiflags", "") == ""  # no build for debugging or without the lock
    )


def _has_number(_alive: dict[Any, Any], now: Any, number: int) -> bool:
    return bool(now.value == number)


def unchanged(table: dict[Any, Any]) -> Callable[[], bool] | None:
    """What tells whether the same entries are still in a dictionary; None if it is not known."""
    if len(table) < _MANY or not _numbers_changes():
        return None
    try:
        import ctypes
    except ImportError:  # a Python without it
        return None
    now = ctypes.c_uint64.from_address(id(table) + _AT)
    return functools.partial(_has_number, table, now, now.value)
