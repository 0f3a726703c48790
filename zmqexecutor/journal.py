"""What a worker has done, in memory that survives it.

A process that is killed takes with it the results that it has finished but that
ZeroMQ's I/O thread has not sent yet. So a worker writes each result into a small
memory-mapped file, its journal, before it starts the next job, and notes there
which job it is running. The master maps the same file and learns from it

- when the worker has died: which results it had, and which one job it was in;
- when the worker is long in a job: the results that it was about to send in one
  message with others;
- since when it has been running that job.

Two words of the file are the master's. One is the number of a job that it is about to end by
killing the worker. A worker that finds it set starts nothing, so that no other job is
hit, however the two race:

    master                                   worker, between two jobs
    condemn(job); 1 ms later:                note that the next job is running;
      is it still running? kill : condemn(0)   is a job condemned? wait : run it

Either the worker sees that a job is condemned, or the master sees that another runs.

The other one hurries the worker: it tells at once of each result up to this number, and
not together with the next, whose job may be long. What it wrote before, the master sees,
which reads the ring after it has set the word.

The journal is a ring of bytes. A position counts all the bytes ever written, as
a TCP sequence number does. Messages carry the position after their last result,
the master confirms positions, and what it has confirmed may be overwritten.

    worker                                            master
    append(result) ──► ring ──► position ──────────►  read(from its position)
    confirmed ◄──────────── Jobs.confirmed ◄────────  position seen so far

Every entry has a checksum, since on some processors another process may see the
new end of the ring before it sees the bytes. An entry that does not check is one
that has not been written yet. The checksum covers the entry's position too, so
that neither a fresh file's zeros nor the entry of an earlier round pass for it.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
import tempfile
import zlib
from collections.abc import Iterator

__all__ = ["JournalReader", "JournalWriter"]

CAPACITY = 512 * 1024
"""Bytes of results that may wait for confirmation."""
LARGEST_ENTRY = CAPACITY // 4
"""Results of more bytes than this are not kept; see `JournalWriter.append`."""
LARGEST_MARKER = 128
"""Bytes for which there is always room; see `JournalWriter.mark`."""

# The header: magic, the running job's number, end of the ring, when that job
# started (the monotonic clock), number of the condemned job, number up to which
# the worker is hurried.
_HEADER = 64
_MAGIC = b"zmqexjn1"
_running = struct.Struct("<Q")
_RUNNING_AT = 8
_END_AT = 16
_started = struct.Struct("<d")
_STARTED_AT = 24
_CONDEMNED_AT = 32
_HURRIED_AT = 40
_entry = struct.Struct("<II")  # length, checksum


def _checksum(result: bytes, position: int) -> int:
    return zlib.crc32(result, (position + 1) & 0xFFFFFFFF)


class JournalWriter:
    """A worker's side of its journal. Used by the thread that runs the jobs."""

    def __init__(self, directory: str) -> None:
        """Make the file.

        Args:
            directory: a private directory on this host.

        Raises:
            OSError: there is no room for it.
        """
        descriptor, self.path = tempfile.mkstemp(prefix="journal-", dir=directory)
        try:
            # Reserve the space: a full file system must show here, as an error,
            # and not later, as a SIGBUS at the first write to a page.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, _HEADER + CAPACITY)
            else:
                os.write(descriptor, bytes(_HEADER + CAPACITY))
            self._map = mmap.mmap(descriptor, _HEADER + CAPACITY)
        except BaseException:
            os.unlink(self.path)
            raise
        finally:
            os.close(descriptor)
        self._map[: len(_MAGIC)] = _MAGIC
        self._confirmed = 0
        self.position = 0

    def start(self, seq: int, now: float) -> bool:
        """Note that this job is being run from now on; False if it must not start yet."""
        _started.pack_into(self._map, _STARTED_AT, now)
        _running.pack_into(self._map, _RUNNING_AT, seq)
        return _running.unpack_from(self._map, _CONDEMNED_AT) == (0,)

    @property
    def condemned(self) -> bool:
        """Whether the master is about to kill this process for a job that it ran."""
        return _running.unpack_from(self._map, _CONDEMNED_AT)[0] != 0  # type: ignore[no-any-return]

    @property
    def hurried(self) -> int:
        """The master waits for the results of jobs up to this number."""
        return _running.unpack_from(self._map, _HURRIED_AT)[0]  # type: ignore[no-any-return]

    def append(self, result: bytes) -> bool:
        """Keep an encoded result, and say whether there was room for it."""
        return self._append(result, LARGEST_ENTRY, CAPACITY - LARGEST_MARKER)

    def mark(self, marker: bytes) -> None:
        """Note a result that is only in a message; until that is confirmed, no other follows."""
        if not self._append(marker, LARGEST_MARKER, CAPACITY):
            raise ValueError("a result follows one that was not confirmed")

    def _append(self, result: bytes, largest: int, capacity: int) -> bool:
        position, size = self.position, _entry.size + len(result)
        if size > largest or position + size - self._confirmed > capacity:
            return False
        self._write(position, _entry.pack(len(result), _checksum(result, position)) + result)
        self.position = position + size
        _running.pack_into(self._map, _END_AT, position + size)
        return True

    def confirm(self, position: int) -> None:
        """The master has everything up to this position."""
        self._confirmed = max(self._confirmed, min(position, self.position))

    def _write(self, position: int, data: bytes) -> None:
        start = position % CAPACITY
        first = min(len(data), CAPACITY - start)
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
            if status.st_size != _HEADER + CAPACITY:
                raise ValueError(f"{path} is not a journal of this version")
            self._map = mmap.mmap(descriptor, _HEADER + CAPACITY)
        finally:
            os.close(descriptor)
        if self._map[: len(_MAGIC)] != _MAGIC:
            self._map.close()
            raise ValueError(f"{path} is not a journal of this version")
        self.position = 0
        """Up to here the results are known, from messages or from `read`."""

    @property
    def running(self) -> int:
        """The sequence number of the job that was started last, or 0."""
        return int(_running.unpack_from(self._map, _RUNNING_AT)[0])

    @property
    def started(self) -> float:
        """When that job was started, on the monotonic clock."""
        return float(_started.unpack_from(self._map, _STARTED_AT)[0])

    def condemn(self, seq: int) -> None:
        """Have the worker start nothing after this job; 0 lets it go on."""
        _running.pack_into(self._map, _CONDEMNED_AT, seq)

    def hurry(self, seq: int) -> None:
        """Have the worker tell at once of each result up to that of this job."""
        _running.pack_into(self._map, _HURRIED_AT, seq)

    def read(self) -> Iterator[bytes]:
        """The encoded results after `position`, which moves as they are taken."""
        start = self.position
        size = _running.unpack_from(self._map, _END_AT)[0] - start
        if not 0 < size <= CAPACITY:
            return
        data = self._bytes(start, size)
        at, head, unpack = 0, _entry.size, _entry.unpack_from
        while at + head <= size:
            length, checksum = unpack(data, at)
            end = at + head + length
            result = data[at + head : end]
            if len(result) != length or _checksum(result, start + at) != checksum:
                return
            yield result
            self.position = start + end
            at = end

    def _bytes(self, position: int, size: int) -> bytes:
        start = position % CAPACITY
        first = min(size, CAPACITY - start)
        data = self._map[_HEADER + start : _HEADER + start + first]
        if first < size:
            data += self._map[_HEADER : _HEADER + size - first]
        return data

    def close(self) -> None:
        """Give back the memory."""
        self._map.close()
