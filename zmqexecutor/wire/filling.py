"""Large copies into memory that is there already: by two threads, through a mapping.

`write` locks the file, so a second thread that writes waits for the first, though one
core seldom uses all that the memory can do. Through a mapping they copy at the same time:
half the time of `write` for 100 MiB. That is so for memory that is used again. To make new
pages is what new memory takes most of its time for, and `write` does that faster; and for
smaller buffers the start of a thread and the mapping cost more (docs/performance.md).

The mapping's pages are made before anything is copied to them. If that cannot be, it is
an `OSError`, where a copy would end the process with a SIGBUS.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Iterator
from typing import Final

__all__ = ["FILLED_BY_TWO", "fill"]

FILLED_BY_TWO: Final = 16 * 1024 * 1024
"""From this many bytes two threads are faster than a `write`."""

_PIECE: Final = 4 * 1024 * 1024
"""What a thread copies at a time: its pages are made while the other one copies."""
_POPULATE_WRITE: Final = 23  # of madvise(2), since Linux 5.14; the module names it since 3.14


def fill(file: int, view: memoryview, offset: int) -> bool:
    """Copy to this offset of a file in memory.

    Args:
        file: open for reading and writing.
        view: contiguous bytes, many of them.
        offset: where the first of them goes.

    Returns:
        False if this is not the way here: nothing may have been copied, or some. There is
        no numpy in this process, whose copies let other threads run, or the system cannot
        make pages in advance, or has no room for them.
    """
    if "numpy" not in sys.modules:  # to import it would cost more
        return False
    try:
        filling = _Filling(file, view, offset)
    except (OSError, ImportError):  # of numpy too, which may be there and say that it is not
        return False
    helper = threading.Thread(target=filling.run, name="zmqexecutor copy", daemon=True)
    try:
        helper.start()
    except RuntimeError:  # no more threads, or the interpreter is about to end
        filling.run()
    else:
        try:
            filling.run()
        finally:
            helper.join()
    return filling.complete


class _Filling:
    """What is left to be copied, for any number of threads.

    The mapping lives as long as one of them holds this.
    """

    def __init__(self, file: int, view: memoryview, offset: int) -> None:
        from numpy import frombuffer, uint8

        end = offset + view.nbytes
        if os.fstat(file).st_size < end:
            os.ftruncate(file, end)
        self._mapping = mmap.mmap(file, end)
        self._target = frombuffer(self._mapping, uint8)
        self._source = frombuffer(view, uint8)
        self._offset = offset
        self._pieces = self._cut(offset, end)
        self._lock = threading.Lock()
        self._left = view.nbytes

    @staticmethod
    def _cut(start: int, end: int) -> Iterator[tuple[int, int]]:
        """Pieces that begin where a page does, but for the first."""
        while start < end:
            stop = min(end, (start // _PIECE + 1) * _PIECE)
            yield start, stop
            start = stop

    @property
    def complete(self) -> bool:
        return not self._left

    def run(self) -> None:
        """Copy pieces until there are none, or one has no pages."""
        from numpy import copyto

        while True:
            with self._lock:
                start, stop = next(self._pieces, (0, 0))
            if start == stop:
                return
            page = start - start % mmap.PAGESIZE
            try:
                self._mapping.madvise(_POPULATE_WRITE, page, stop - page)
            except OSError:
                return
            copyto(
                self._target[start:stop],
                self._source[start - self._offset : stop - self._offset],
            )
            with self._lock:
                self._left -= stop - start
