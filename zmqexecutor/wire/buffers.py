"""Big buffers between processes of one machine: files in memory that are used again.

    one process                                   another
    store(views) ──► a segment, by name ────────► open(segment): views of a private mapping
    its lease ends, or the last view dies
      └──► free/ ──► the next `store`, in any process

A segment is a file in the executor's private directory, if that is in /dev/shm. Fresh
memory costs several times what a copy into it costs, so segments are used again: one
that nobody needs moves to the folder `free`, and whoever stores something next moves
it back under a new name. A rename happens once, so no two processes get the same
segment, and a process that dies leaves no state behind but files, whose names tell
who made them.

- Segments are filled by `write`, which lets other threads run, raises when memory
  is short (writing to a mapping would be a SIGBUS), and needs no descriptor later; those
  that are used again as filling.py says.
- They are mapped copy-on-write: the views are writable, and what is written stays in
  the process, even if it forks. Pages that have not been written do show what is written
  to the file later. So a segment is free only when no process has it mapped: if one
  may still have (a forked child, a task that kept its argument), it is removed and
  not used again. The memory lives as long as the last mapping.
- Each segment is one mapping, whose end a weak reference tells: arrays keep the mapping
  alive, though not the view that they were made of.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from .comparison import same
from .filling import Filler
from .mappings import HOLD_DESCRIPTORS, map_file

if TYPE_CHECKING:
    from .protocol import Segment

__all__ = ["Segments", "forked_since", "forks"]

IN_SEGMENT: Final = 256 * 1024
"""From this many bytes in all, buffers go into a segment where there are any."""
IDLE_BYTES: Final = 512 * 1024 * 1024
"""Free segments that are kept, at most; less if the file system is small."""
IDLE_SEGMENTS: Final = 128
"""How many of them: whoever stores or frees one looks through all."""
IDLE_SECONDS: Final = 10.0
"""How long a segment stays free before its memory goes back to the system."""
ALIGNMENT: Final = 64
"""Buffers start at multiples of this many bytes, as vector instructions like it."""
MAX_MAPPED: Final = 16384
"""Mappings that a process holds at a time; what comes then is copied."""

MAPPED_BY_OTHERS: Final = 256 * 1024 * 1024
"""Bytes of segments that a worker keeps mapped for its next results, at most.

A program that gets one result after the other often holds one while the next is made.
"""
MOST_COMPARED: Final = 32
"""Mappings that are kept for comparisons; before Python 3.13 each has a descriptor."""

_USED = "segments"
_FREE = "free"
_forks = 0
_next_fork = itertools.count(1)
_forking: set[int] = set()
"""Threads that are about to fork."""


def forks() -> int:
    """A number for `forked_since`."""
    return -1 if _forking else _forks


def forked_since(number: int) -> bool:
    """Whether this process may have forked since `forks` gave this. A child has what was mapped."""
    return bool(_forking) or number != _forks


def _before_fork() -> None:
    # Functions that are registered by others may run after this one, and other threads meanwhile.
    global _forks
    _forking.add(threading.get_ident())
    _forks = next(_next_fork)
    for reference in list(_created):
        segments = reference()
        if segments is not None:
            segments.let_go()


def _after_fork_in_parent() -> None:
    global _forks
    _forks = next(_next_fork)
    _forking.discard(threading.get_ident())


def _after_fork_in_child() -> None:
    _forking.clear()


_created: set[weakref.ref[Segments]] = set()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)


class Segments:
    """The segments of one private directory, as one process sees them. For any thread."""

    def __init__(self, directory: str) -> None:
        """Use what `create` has made.

        Args:
            directory: the private directory.

        Raises:
            OSError: it is not there.
        """
        self._used = os.path.join(directory, _USED)
        self._free = os.path.join(directory, _FREE)
        status = os.statvfs(directory)
        total = status.f_frsize * status.f_blocks
        self._spared = total // 8  # of the file system, for others
        self._idle_bytes = min(IDLE_BYTES, total // 4)
        self._filler = Filler()
        self._pid = os.getpid()
        self._token = os.urandom(4).hex()  # a dead process may have had the same number
        self._numbers = itertools.count(1)
        self._compared: dict[str, list[memoryview]] = {}
        self._mapped: dict[tuple[str, int], weakref.ref[mmap.mmap]] = {}
        self._most_mapped = _most_mapped()
        self.trim_at: float | None = None
        """When `trim` should be called, on the monotonic clock."""
        self.on_idle: Callable[[], object] = int
        """Called when `trim_at` is set, from any thread, even in garbage collection."""

    @classmethod
    def create(cls, directory: str) -> Segments | None:
        """Prepare a private directory; None if it is not in memory, but on a disk.

        Who calls this has to call `trim` when it is time, and `close` at last.
        """
        if not directory.startswith("/dev/shm/"):  # noqa: S108  (nothing is opened there)
            return None
        try:
            for folder in (_USED, _FREE):
                os.mkdir(os.path.join(directory, folder), 0o700)
            made = cls(directory)
        except OSError:
            return None
        made.keep_mappings(made._idle_bytes)
        return made

    def keep_mappings(self, size: int) -> None:
        """Keep mappings of so many bytes for the next `store`; `trim` has to be called then."""
        self._filler = Filler(size)
        _created.add(weakref.ref(self, _created.discard))

    def share_of_mappings(self, processes: int) -> int:
        """How many bytes of mappings each of so many workers may keep.

        It is 0 where there is little memory: what they keep cannot be had back at once.
        """
        if self._idle_bytes < IDLE_BYTES:
            return 0
        return min(MAPPED_BY_OTHERS, self._spared // max(1, processes))

    def let_go(self) -> None:
        """Hold no memory for later: a child would do so for as long as it lives."""
        self._filler.forget(0.0)
        self._compared.clear()

    def close(self) -> None:
        """Hold none from now on; what is opened stays there."""
        self._filler.close()
        self._compared.clear()

    # ------------------------------------------------------------------ storing

    def store(
        self, views: Sequence[memoryview], *, first: Sequence[bytes] = (), reused: bool = True
    ) -> Segment | None:
        """Copy buffers into a segment; None if there is no room, or this is a forked child.

        Args:
            views: contiguous bytes.
            first: what another buffer before them is to be put together from.
            reused: whether a free segment may be taken, which may be larger.
        """
        if os.getpid() != self._pid:
            return None  # nobody would remove it after the child's death
        # Not at the top: it takes with it what unpickling alone does not need.
        from .protocol import Segment

        sizes = [view.nbytes for view in views]
        if first:
            sizes.insert(0, sum(map(len, first)))
        offsets, size = _layout(sizes)
        taken = self._take(size) if reused else ""
        name = taken or self._make_room(size)
        if not name:
            return None
        path = os.path.join(self._used, name)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                end = 0
                for piece in first:
                    self._filler.copy(file, memoryview(piece), end, again=bool(taken))
                    end += len(piece)
                for view, offset in zip(views, offsets[bool(first) :], strict=True):
                    self._filler.copy(file, view, offset, again=bool(taken))
            finally:
                os.close(file)
        except OSError:  # memory is short after all
            self._filler.forget(0.0)
            self._remove(path)
            return None
        except BaseException:  # an interrupt
            self._filler.forget(0.0)
            self._remove(path)
            raise
        if taken:
            self._trim_later()  # for what the filler has kept
        return Segment(name, sizes)

    def _take(self, size: int) -> str:
        """Make a free segment our own: the smallest that fits and is not far too large.

        Of two of a size the one that was ours the last time, which may still be mapped here.
        """
        try:
            free = [(_size(name), self._token not in name, name) for name in os.listdir(self._free)]
        except OSError:
            return ""
        for capacity, _, name in sorted(free):
            if size <= capacity <= 2 * size:
                taken = self._name(capacity)
                try:
                    os.rename(os.path.join(self._free, name), os.path.join(self._used, taken))
                except OSError:
                    continue  # another process was first
                return taken
        return ""

    def _make_room(self, size: int) -> str:
        """Return the name for a new segment, or nothing if the file system has no room."""
        if not self._has_room(size):
            self.trim(0.0)
            if not self._has_room(size):
                return ""
        return self._name(_capacity(size))

    def _has_room(self, size: int) -> bool:
        try:
            status = os.statvfs(self._used)
        except OSError:
            return False
        return status.f_bavail * status.f_frsize >= size + self._spared

    def _name(self, capacity: int) -> str:
        return f"{capacity}-{os.getpid()}-{self._token}{next(self._numbers)}"

    def compare(self, segment: Segment, views: Sequence[memoryview]) -> bool:
        """Whether a segment that this process has stored, and still has, says the same."""
        contents = self._compared.get(segment.name)
        if contents is None:
            if len(self._mapped) >= self._most_mapped:
                return False
            try:
                contents = self.open(segment, readonly=True)
            except OSError:  # no descriptor left, or no room for a mapping
                return False
            for name in list(self._compared)[: 1 - MOST_COMPARED]:
                self._compared.pop(name, None)
            self._compared[segment.name] = contents
        return all(map(same, views, contents))

    # ------------------------------------------------------------------ opening

    def open(
        self, segment: Segment, *, readonly: bool = False, owned: bool = False
    ) -> list[memoryview]:
        """Map a segment.

        Args:
            segment: what another process has stored, or this one.
            readonly: views that cannot be written to.
            owned: the segment is this process's from now on, and free when the last
                view has died. If it cannot be mapped, it is removed.

        Returns:
            The buffers. What is written to them stays in this process.

        Raises:
            OSError: it is not there, or no descriptor is left.
            ValueError: it is not as large as it should be.
        """
        if "/" in segment.name:
            raise FileNotFoundError(f"{segment.name!r} is not the name of a segment")
        try:
            return self._open(segment, readonly, owned)
        except BaseException as error:
            if owned:
                self.give_back(segment.name, reusable=False)
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise OSError(
                    error.errno,
                    f"{error.strerror}: no descriptor is left for large data in shared memory; "
                    "raise the limit (ulimit -n), or close some",
                ) from None
            raise

    def _open(self, segment: Segment, readonly: bool, owned: bool) -> list[memoryview]:
        offsets, size = _layout(segment.sizes)
        if len(self._mapped) >= self._most_mapped:
            return self._copy(segment, offsets, owned)
        file = os.open(
            os.path.join(self._used, segment.name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        )
        forked = forks()  # before it is mapped: a fork just after that has it
        try:
            mapping = map_file(file, size, private=True, readonly=readonly)
        finally:
            os.close(file)
        key = segment.name, next(self._numbers)  # the same segment may be mapped twice
        self._mapped[key] = weakref.ref(mapping, partial(self._unmapped, key, owned, forked))
        whole = memoryview(mapping)
        return [
            whole[offset : offset + length]
            for offset, length in zip(offsets, segment.sizes, strict=True)
        ]

    def _copy(self, segment: Segment, offsets: Sequence[int], owned: bool) -> list[memoryview]:
        views = []
        with open(os.path.join(self._used, segment.name), "rb", buffering=0) as file:
            for offset, length in zip(offsets, segment.sizes, strict=True):
                view = memoryview(bytearray(length))
                file.seek(offset)
                done = 0
                while done < length:
                    read = file.readinto(view[done:])
                    if not read:
                        raise ValueError(f"segment {segment.name} is too short")
                    done += read
                views.append(view)
        if owned:
            self.give_back(segment.name)
        return views

    def _unmapped(self, key: tuple[str, int], owned: bool, forked: int, _: object) -> None:
        self._mapped.pop(key, None)
        if owned:
            self.give_back(key[0], reusable=not forked_since(forked))

    # ------------------------------------------------------------------- ending

    def give_back(self, name: str, *, reusable: bool = True) -> None:
        """Let a segment be used again, or remove it if some process may have it mapped."""
        self._compared.pop(name, None)
        if os.getpid() != self._pid:
            return  # a forked child: it is still the parent's
        path = os.path.join(self._used, name)
        try:
            if reusable and self._may_keep(_size(name)):
                os.rename(path, os.path.join(self._free, name))
            else:
                os.unlink(path)
                return
        except OSError:
            return  # removed before, with a dead worker's or with the directory
        self._trim_later()

    def _trim_later(self, due: float | None = None) -> None:
        """Have `trim` called at this time, or a while from now, if not before."""
        now = time.monotonic()
        if due is None:
            due = now + IDLE_SECONDS
        at = self.trim_at
        if at is None or due < at:
            self.trim_at = due
        if at is None or at < now:  # who should have been woken before may not have been
            self.on_idle()

    def _may_keep(self, size: int) -> bool:
        try:
            free = os.listdir(self._free)
        except OSError:  # no descriptor is left
            return False
        if len(free) >= IDLE_SEGMENTS:
            return False
        return sum(map(_size, free)) + size <= self._idle_bytes

    def trim(self, seconds: float = IDLE_SECONDS) -> None:
        """Remove segments that have been free for so long, and let go of their memory."""
        self.trim_at = None
        due = self._filler.forget(seconds)
        now, before = time.monotonic(), time.time() - seconds
        try:
            for entry in os.scandir(self._free):
                try:
                    left = min(entry.stat().st_ctime - before, seconds)
                    if left <= 0:
                        os.unlink(entry.path)
                    else:
                        due = now + left if due is None else min(due, now + left)
                except FileNotFoundError:
                    pass  # it has just been taken
        except OSError:
            pass  # the directory is gone, and they with it
        if due is not None:
            self._trim_later(due)

    def sweep(self, pid: int) -> None:
        """Remove what a dead process has stored and nobody has opened."""
        try:
            mapped = {name for name, _ in list(self._mapped)}
            for name in os.listdir(self._used):
                if name.split("-")[1] == str(pid) and name not in mapped:
                    self._remove(os.path.join(self._used, name))
        except OSError:
            pass  # the directory is gone

    def _remove(self, path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass


def _layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where buffers of these sizes start, and how large the whole is."""
    offsets = []
    end = 0
    for size in sizes:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        offsets.append(start)
        end = start + size
    return offsets, end


def _capacity(size: int) -> int:
    """Round up, by an eighth at most, so that segments fit buffers of similar sizes."""
    step = max(4096, 1 << (size.bit_length() - 4)) if size > 16 else 4096
    return -(-size // step) * step


def _size(name: str) -> int:
    return int(name.partition("-")[0])


def _most_mapped() -> int:
    if not HOLD_DESCRIPTORS:
        return MAX_MAPPED
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_MAPPED if soft == resource.RLIM_INFINITY else min(MAX_MAPPED, soft // 4)
