"""Copies into files in memory.

There are three ways, and which is the fastest depends on the machine and on whether the
file's memory is there already (docs/performance.md):

- `write`, which locks the file, and needs nothing. New memory is always written.
- A mapping, by two threads if the buffer is large: while one copies, the other one
  makes pages. To make them, and to take them off again, takes most of the time.
- A mapping that was made before, which has its pages: in the end the fastest. It keeps
  the file's memory from going back to the system, so only a process that lets go of it in
  time keeps some.

A mapping's pages are made before anything is copied to them. If that cannot be, the
buffer is written, where a copy would end the process with a SIGBUS.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from typing import Any, Final

from .mappings import map_file

__all__ = ["FILLED_BY_TWO", "Filler"]

FILLED_BY_TWO: Final = 16 * 1024 * 1024
"""From this many bytes two threads are faster than one."""
LEAST_MAPPED: Final = 1024 * 1024
"""Smaller buffers are written."""
WRITTEN_FIRST: Final = 2
"""How often a file that is used again is written before it is mapped.

By then that has taken as long as to map it. What comes then takes a third of the time.
"""
MOST_KEPT: Final = 32
"""Mappings; before Python 3.13 each has a descriptor."""
RECENTLY: Final = 1.0
"""Seconds for which a mapping is not given up for another one."""

_PIECE: Final = 4 * 1024 * 1024
"""What a thread copies at a time: its pages are made while the other one copies."""
_POPULATE_WRITE: Final = 23  # of madvise(2), since Linux 5.14; the module names it since 3.14
_REMEMBERED: Final = 0.97
"""How much of the cost of the slower way is believed each time that the other one is taken."""


class Filler:
    """Copies buffers into files, in the fastest way. For any thread, but one for each file."""

    def __init__(self, keep: int = 0) -> None:
        """Keep nothing yet.

        Args:
            keep: bytes of which mappings may be kept. `forget` has to be called then.
        """
        self._keep = keep
        self._kept: dict[int, _Kept] = {}  # by inode
        self._mapping_costs = self._writing_costs = 0.0  # seconds per byte

    def copy(self, file: int, view: memoryview, offset: int, *, again: bool) -> None:
        """Copy to this offset of a file.

        Args:
            file: open for reading and writing.
            view: contiguous bytes.
            offset: where the first of them goes.
            again: whether the file is used again, and its memory is there.

        Raises:
            OSError: there is no room.
        """
        view = view.cast("B") if view.format != "B" or view.ndim != 1 else view
        if not again or view.nbytes < LEAST_MAPPED:
            _write(file, view, offset)
        elif self._keep:
            self._copy_and_keep(file, view, offset)
        else:
            self._copy_faster(file, view, offset)

    def forget(self, seconds: float) -> float | None:
        """Let go of the mappings that were not used for so long; when that is due again."""
        before = time.monotonic() - seconds
        dues = []
        for inode, kept in self._kept.copy().items():
            if kept.used <= before:
                self._kept.pop(inode, None)
            else:
                dues.append(kept.used + seconds)
        return min(dues, default=None)

    def close(self) -> None:
        """Keep nothing from now on."""
        self._keep = 0
        self._kept.clear()

    def _copy_and_keep(self, file: int, view: memoryview, offset: int) -> None:
        status = os.fstat(file)
        size = max(status.st_size, offset + view.nbytes)
        kept = self._kept.get(status.st_ino) or _Kept()
        mapping = kept.mapping
        if mapping is not None and mapping.size < size:
            mapping, kept.written = None, 0
        if mapping is None:
            kept.written += 1
            if kept.written > WRITTEN_FIRST and self._has_room(size):
                mapping = _mapped(file, size)
        if mapping is not None and not mapping.copy(view, offset):
            mapping, kept.written = None, 0
            _write(file, view, offset)
        elif mapping is None:
            self._copy_faster(file, view, offset)
        kept.mapping = mapping
        kept.used = time.monotonic()
        self._kept[status.st_ino] = kept
        if not self._keep:  # closed meanwhile
            self._kept.clear()

    def _has_room(self, size: int) -> bool:
        if self._fits(size):
            return True
        self.forget(RECENTLY)  # not what is used in turns with this one
        return self._fits(size)

    def _fits(self, size: int) -> bool:
        sizes = [kept.mapping.size for kept in list(self._kept.values()) if kept.mapping]
        return len(sizes) < MOST_KEPT and sum(sizes) + size <= self._keep

    def _copy_faster(self, file: int, view: memoryview, offset: int) -> None:
        if view.nbytes < FILLED_BY_TWO:
            _write(file, view, offset)
            return
        started = time.monotonic()
        if self._mapping_costs <= self._writing_costs:
            mapping = _mapped(file, offset + view.nbytes)
            if mapping is not None and mapping.copy(view, offset):
                del mapping  # takes its pages off
                self._mapping_costs = (time.monotonic() - started) / view.nbytes
                self._writing_costs *= _REMEMBERED
                return
        _write(file, view, offset)
        self._writing_costs = (time.monotonic() - started) / view.nbytes
        self._mapping_costs *= _REMEMBERED


class _Kept:
    """What is known of a file.

    Attributes:
        mapping: of it, if it was worth to make one.
        written: how often it was not there.
        used: when the file was, on the monotonic clock.
    """

    __slots__ = ("mapping", "used", "written")

    def __init__(self) -> None:
        self.mapping: _Mapping | None = None
        self.written = 0
        self.used = 0.0


def _write(file: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < view.nbytes:
        done += os.pwrite(file, view[done:], offset + done)


def _mapped(file: int, size: int) -> _Mapping | None:
    try:
        return _Mapping(file, size)
    except (OSError, ValueError):  # no descriptor left, or no room for a mapping
        return None


class _Mapping:
    """A mapping of a file from its start; the first copy makes all of its pages."""

    def __init__(self, file: int, size: int) -> None:
        if os.fstat(file).st_size < size:
            os.ftruncate(file, size)
        self._mapping = map_file(file, size)
        self._has_pages = False
        self.size = size

    def copy(self, view: memoryview, offset: int) -> bool:
        """Copy to this offset, or say that there is no memory for all pages."""
        copying = _Copying(self._mapping, view, offset, make_pages=not self._has_pages)
        if view.nbytes >= FILLED_BY_TWO and copying.lets_others_run:
            copying.run_by_two()
        else:
            copying.run()
        self._has_pages = copying.complete
        return copying.complete


class _Copying:
    """What is left to be copied, for any number of threads."""

    def __init__(
        self, mapping: mmap.mmap, view: memoryview, offset: int, *, make_pages: bool
    ) -> None:
        self._mapping = mapping
        self._make_pages = make_pages
        self._start, self._stop = offset, offset + view.nbytes
        self._target: Any = memoryview(mapping)
        self._source: Any = view
        self._copyto: Any = None
        # Its copies let other threads run. To import it would cost more than that saves.
        if "numpy" in sys.modules:
            try:
                from numpy import copyto, frombuffer, uint8
            except ImportError:  # it may be there and say that it is not
                pass
            else:
                self._target = frombuffer(mapping, uint8)
                self._source = frombuffer(view, uint8)
                self._copyto = copyto
        self._next, self._end = (0, len(mapping)) if make_pages else (self._start, self._stop)
        self._left = self._end - self._next
        self._lock = threading.Lock()

    @property
    def lets_others_run(self) -> bool:
        return self._copyto is not None

    @property
    def complete(self) -> bool:
        return not self._left

    def run_by_two(self) -> None:
        """Take turns with a second thread."""
        helper = threading.Thread(target=self.run, name="zmqexecutor copy", daemon=True)
        try:
            helper.start()
        except RuntimeError:  # no more threads, or the interpreter is about to end
            self.run()
        else:
            try:
                self.run()
            finally:
                helper.join()

    def run(self) -> None:
        """Copy pieces until there are none, or one has no pages."""
        while True:
            with self._lock:  # pieces begin where a page does, but for the first
                start = self._next
                stop = self._next = min(self._end, (start // _PIECE + 1) * _PIECE)
            if start == stop:
                return
            if self._make_pages:
                try:
                    self._mapping.madvise(_POPULATE_WRITE, start, stop - start)
                except OSError:
                    return
            self._copy(max(start, self._start), min(stop, self._stop))
            with self._lock:
                self._left -= stop - start

    def _copy(self, start: int, stop: int) -> None:
        if start >= stop:
            return
        source = self._source[start - self._start : stop - self._start]
        if self._copyto is not None:
            self._copyto(self._target[start:stop], source)
        else:
            self._target[start:stop] = source
