"""What a worker has done, in memory that survives it.

A process that is killed takes with it the results that it has finished but that
ZeroMQ's I/O thread has not sent yet. So a worker writes each result into a small
memory-mapped file, its journal, before it starts the next job, and notes there
which job it is running. The master maps the same file and learns from it

- when the worker has died: which results it had, and which one job it was in;
- when the worker is long in a job: the results that it was about to send in one
  message with others;
- since when it has been running that job.

Three words of the file are the master's. One is the number of a job that it is about to end
by killing the worker. A worker that finds it set starts nothing, so that no other job is
hit, however the two race:

    master                                   worker, between two jobs
    condemn(job); 1 ms later:                note that the next job is running;
      is it still running? kill : condemn(0)   is a job condemned? wait : run it

Either the worker sees that a job is condemned, or the master sees that another runs.

The other two take jobs back that the worker has not started, in the same way. It need not
answer, which it could not while a job holds the interpreter's lock, or while it is stopped:

    recall(last job); 1 ms later:            note that the next job is running;
      which one is running?                    is it recalled? wait for `settle` : run it
      settle(that one), the rest is back       is it that one? run it : drop it

A worker also tells at once of each result up to the recalled number, and not together
with the next, whose job may be long. What it wrote before, the master sees, which reads
the ring after it has set the word.

The journal is a ring of bytes. A position counts all the bytes ever written, as
a TCP sequence number does. Messages carry the position after their last result,
the master confirms positions, and what it has confirmed may be overwritten.

    worker                                            master
    append(result) ──► ring ──► position ──────────►  read(from its position)
    confirmed ◄──────────── Jobs.confirmed ◄────────  position seen so far

A result's large buffers follow it in its entry: they are copied once into the ring, and
once out of it.

Every entry has a checksum, since on some processors another process may see the
new end of the ring before it sees the bytes. An entry that does not check is one
that has not been written yet. The checksum covers the entry's position too, so
that neither a fresh file's zeros nor the entry of an earlier round pass for it. Of
buffers, to check which takes several times as long as to copy them, there is one
only on such processors.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import struct
import tempfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from typing import Final

from .mappings import map_file
from .protocol import Frame

__all__ = ["JournalReader", "JournalWriter"]

CAPACITY = 1024 * 1024
"""Bytes of results that may wait for confirmation, where there is room."""
LEAST_CAPACITY = 64 * 1024
"""The same on a very small file system."""
SHARE = 512
"""What part of the file system a journal may be: containers often have 64 MiB for all."""
PART = 4
"""A result that takes more than one part of so many of the capacity is not kept."""
LARGEST_MARKER = 128
"""Bytes for which there is always room; see `JournalWriter.mark`."""

# The header: magic, the running job's number, end of the ring, when that job
# started (the monotonic clock), number of the condemned job, number up to which
# jobs are recalled, number of the one of these that may start, number of the running
# job if it waits for that.
_HEADER = 64
_MAGIC = b"zmqexjn3"
# The header's words by their places, in the machine's byte order. They are read and written
# through a memoryview, each as a whole; `struct.pack_into` would show zeros in between.
_RUNNING, _END, _STARTED, _CONDEMNED, _RECALLED, _SETTLED, _WAITING = range(1, 8)
# The lowest bits of _RECALLED and _SETTLED say which recall it is.
_COUNTED = 16
_COUNT = (1 << _COUNTED) - 1
_entry = struct.Struct("=III")  # length of the result, checksum, how many buffers
_NUMBER = array("I").itemsize

_ORDERED: Final = os.uname().machine in ("x86_64", "amd64", "i386", "i686")
"""Whether others see what this processor writes in the order in which it was written: the
manuals of Intel ("Memory Ordering" in volume 3A, also for copies by string operations) and
AMD (in volume 2) say so."""
_VIEWED: Final = 16 * 1024
"""From this many bytes it is worth it not to copy entries before they are looked at."""


def _checksum(head: bytes, position: int) -> int:
    return zlib.crc32(head, (position + 1) & 0xFFFFFFFF)


def _checked_with(buffers: Sequence[Frame], checksum: int) -> int:
    if not _ORDERED:
        for buffer in buffers:
            checksum = zlib.crc32(buffer, checksum)
    return checksum


def _capacity(directory: str) -> int:
    status = os.statvfs(directory)
    most = status.f_frsize * status.f_blocks // SHARE
    capacity = CAPACITY
    while capacity > max(most, LEAST_CAPACITY):
        capacity //= 2
    return capacity


def _header(memory: mmap.mmap) -> tuple[memoryview[int], memoryview[float]]:
    """Its words as numbers, and as times."""
    with memoryview(memory) as whole, whole[:_HEADER] as header:
        return header.cast("Q"), header.cast("d")


class JournalWriter:
    """A worker's side of its journal. Used by the thread that runs the jobs."""

    def __init__(self, directory: str) -> None:
        """Make the file.

        Args:
            directory: a private directory on this host.

        Raises:
            OSError: there is no room for it.
        """
        self.capacity = _capacity(directory)
        size = _HEADER + self.capacity
        descriptor, self.path = tempfile.mkstemp(prefix="journal-", dir=directory)
        try:
            # Reserve the space: a full file system must show here, as an error,
            # and not later, as a SIGBUS at the first write to a page.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
            else:
                os.write(descriptor, bytes(size))
            self._map = map_file(descriptor, size)
        except BaseException:
            os.unlink(self.path)
            raise
        finally:
            os.close(descriptor)
        self._words, self._times = _header(self._map)
        self._map[: len(_MAGIC)] = _MAGIC
        self._confirmed = 0
        self.position = 0

    def start(self, seq: int, now: float) -> bool:
        """Note that this job is being run from now on; False if `may_start` must be asked."""
        words = self._words
        self._times[_STARTED] = now
        words[_RUNNING] = seq
        return not words[_CONDEMNED] and seq > words[_RECALLED] >> _COUNTED

    def may_start(self, seq: int) -> bool | None:
        """Whether this job may start, or was taken back; None if the master has not decided."""
        recalled, settled = self._words[_RECALLED], self._words[_SETTLED]
        if self._words[_CONDEMNED] or (recalled ^ settled) & _COUNT:
            return None
        return seq > recalled >> _COUNTED or seq == settled >> _COUNTED

    def wait_with(self, seq: int) -> None:
        """Note that this job has not begun, although it was noted as running; or 0."""
        self._words[_WAITING] = seq

    @property
    def recalled(self) -> int:
        """The master waits for the results of jobs up to this number."""
        return self._words[_RECALLED] >> _COUNTED

    def append(self, result: bytes, buffers: Sequence[Frame] = ()) -> bool:
        """Keep an encoded result and its buffers (of bytes); say whether there was room for it."""
        capacity = self.capacity
        return self._append(result, buffers, capacity // PART, capacity - LARGEST_MARKER)

    def mark(self, marker: bytes) -> None:
        """Note a result that is only in a message; until that is confirmed, no other follows."""
        if not self._append(marker, (), LARGEST_MARKER, self.capacity):
            raise ValueError("a result follows one that was not confirmed")

    def _append(self, result: bytes, buffers: Sequence[Frame], largest: int, capacity: int) -> bool:
        position, head = self.position, result
        size = _entry.size + len(result)
        if buffers:
            sizes = list(map(len, buffers))
            size += len(sizes) * _NUMBER + sum(sizes)
        if size > largest or position + size - self._confirmed > capacity:
            return False
        if buffers:
            head = array("I", sizes).tobytes() + result
        end = at = position + size
        checksum = _checksum(head, position)
        if buffers:
            checksum = _checked_with(buffers, checksum)
            for buffer in reversed(buffers):
                at -= len(buffer)
                self._write(at, buffer)
        self._write(position, _entry.pack(len(result), checksum, len(buffers)) + head)
        self.position = end
        self._words[_END] = end
        return True

    def confirm(self, position: int) -> None:
        """The master has everything up to this position."""
        self._confirmed = max(self._confirmed, min(position, self.position))

    def _write(self, position: int, data: Frame) -> None:
        start = position % self.capacity
        first = min(len(data), self.capacity - start)
        self._map[_HEADER + start : _HEADER + start + first] = data[:first]
        if first < len(data):
            self._map[_HEADER : _HEADER + len(data) - first] = data[first:]

    def unlink(self) -> None:
        """Remove the file's name: the master has mapped it, or never will."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass

    def close(self) -> None:
        """Give back the memory."""
        self._words.release()
        self._times.release()
        self._map.close()


class JournalReader:
    """The master's side of a worker's journal."""

    def __init__(self, path: str) -> None:
        """Map the file.

        Raises:
            OSError: there is no such file, or it is not the user's own.
            ValueError: it is not a journal.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise PermissionError(f"{path} is not a file of this user")
            self._capacity = status.st_size - _HEADER
            if not LEAST_CAPACITY <= self._capacity <= CAPACITY:
                raise ValueError(f"{path} is not a journal of this version")
            self._map = map_file(descriptor, status.st_size)
        finally:
            os.close(descriptor)
        if self._map[: len(_MAGIC)] != _MAGIC:
            self._map.close()
            raise ValueError(f"{path} is not a journal of this version")
        self._words, self._times = _header(self._map)
        self.recalled = 0
        """Up to here jobs were recalled."""
        self._recalls = 0  # how often, in as many bits as there are for it
        self.position = 0
        """Up to here the results are known, from messages or from `read`."""

    @property
    def running(self) -> int:
        """The sequence number of the job that was started last, or 0."""
        return self._words[_RUNNING]

    @property
    def begun(self) -> bool:
        """Whether the worker did more than to note it: it may have to wait for a decision."""
        return self._words[_WAITING] != self._words[_RUNNING]

    @property
    def started(self) -> float:
        """When that job was started, on the monotonic clock."""
        return self._times[_STARTED]

    def condemn(self, seq: int) -> None:
        """Have the worker start nothing after this job; 0 lets it go on."""
        self._words[_CONDEMNED] = seq

    def recall(self, seq: int) -> None:
        """Have the worker start no job up to this one before `settle`.

        It tells at once of each result up to that of this job.
        """
        self.recalled = seq
        self._recalls = (self._recalls + 1) & _COUNT
        self._words[_RECALLED] = seq << _COUNTED | self._recalls

    def settle(self, seq: int) -> None:
        """What was recalled is taken back, but for this job: the worker may run it."""
        self._words[_SETTLED] = seq << _COUNTED | self._recalls

    def read(self) -> Iterator[tuple[bytes, Sequence[Frame]]]:
        """Encoded results after `position`, which moves as they are taken, with their buffers."""
        start = self.position
        size = self._words[_END] - start
        if not 0 < size <= self._capacity:
            return
        data = self._bytes(start, size)
        at, fixed, unpack = 0, _entry.size, _entry.unpack_from
        while at + fixed <= size:
            length, checksum, count = unpack(data, at)
            body = at + fixed
            end = body + count * _NUMBER + length
            if end > size:
                return
            head = bytes(data[body:end])
            found = _checksum(head, start + at)
            buffers: list[Frame] | tuple[()] = ()
            if count:
                buffers = []
                for nbytes in array("I", head[: count * _NUMBER]):
                    buffers.append(bytearray(data[end : end + nbytes]))
                    end += nbytes
                if end > size:
                    return
                head = head[count * _NUMBER :]
                found = _checked_with(buffers, found)
            if found != checksum:
                return
            yield head, buffers
            self.position = start + end
            at = end

    def _bytes(self, position: int, size: int) -> bytes | memoryview:
        start = position % self._capacity
        first = min(size, self._capacity - start)
        if first == size >= _VIEWED:
            return memoryview(self._map)[_HEADER + start : _HEADER + start + size]
        data = self._map[_HEADER + start : _HEADER + start + first]
        if first < size:
            data += self._map[_HEADER : _HEADER + size - first]
        return data

    def close(self) -> None:
        """Give back the memory."""
        self._words.release()
        self._times.release()
        with contextlib.suppress(BufferError):  # somebody is in the middle of `read`
            self._map.close()
