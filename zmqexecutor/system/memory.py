"""What the C library does with memory that was freed."""

from __future__ import annotations

import functools
from typing import Final

__all__ = ["keep_freed_memory"]

_LARGEST_LEARNED: Final = 32 * 1024 * 1024
"""glibc's `DEFAULT_MMAP_THRESHOLD_MAX` on machines of 64 bits."""


@functools.cache  # the second time the block would be one that was used before
def keep_freed_memory() -> None:
    """Have this process use freed memory again that a young process gives back to the system.

    glibc maps what is larger than 128 KiB for each `malloc`, and unmaps it, until it has
    seen how large the blocks are that a program frees: it then takes blocks up to that
    size from its heap, of which it leaves twice as much unused before it gives any back
    (mallopt(3), "dynamic mmap threshold"). A program that has loaded its data has
    passed that point, and so has a fork of it; a fresh worker begins anew, and each
    array that a task makes costs a page fault for every 4 KiB. So does each copy of an
    argument in a program that has not. So it frees a block, which it never touched, of
    nearly the largest size of which glibc takes notice.

    From then on the process may keep 64 MiB that it has freed. Workers with a
    `max_worker_memory`, for which that would count, do without it. Who has set
    `MALLOC_TRIM_THRESHOLD_` or another of these variables has it their way: glibc learns
    nothing then. Other C libraries do not either.
    """
    try:
        bytes(_LARGEST_LEARNED - 64 * 1024)
    except MemoryError:
        pass  # there is a limit, and a reason to give memory back
