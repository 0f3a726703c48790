"""Files in memory, mapped without a descriptor where that is possible."""

from __future__ import annotations

import mmap
import sys
from typing import Any, Final

__all__ = ["HOLD_DESCRIPTORS", "map_file"]

HOLD_DESCRIPTORS: Final = sys.version_info < (3, 13)
"""Whether each mapping has a descriptor of its own; since Python 3.13 it can do without."""


def map_file(file: int, size: int, *, private: bool = False, readonly: bool = False) -> mmap.mmap:
    """Map a file from its start.

    Args:
        file: its descriptor, which may be closed then.
        size: bytes; the file has as many.
        private: whether what is written to the mapping stays in this process.
        readonly: whether nothing can be written to it.

    Raises:
        OSError: no descriptor is left, or there is no room for a mapping.
        ValueError: the file is not as large.
    """
    options: dict[str, Any] = {} if HOLD_DESCRIPTORS else {"trackfd": False}
    flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
    protection = mmap.PROT_READ if readonly else mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(file, size, flags=flags, prot=protection, **options)
