"""Short cuts between a master and its own workers, for what is small.

ZeroMQ hands a message to a thread of its own, which sends it to another one in the other
process, which hands it on: three changes of threads each way, most of the time that a
tiny task takes. Where both processes share a private directory, the kernel takes it
there with one change:

    master                                                    worker
    Post.send(jobs) ────────── datagram socket ────────────►  Mailbox.read()
    Bell.rung_by() ◄──────────── named pipe ────────────────  BellRope.ring()
        and it reads the journal ◄── memory ── in which the worker has written the result

They only save time. What does not fit in, or finds them full, or broken, goes through
ZeroMQ as if they were not there; jobs say by their numbers in which order they are meant.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import stat
from collections.abc import Sequence

from .protocol import Frame

__all__ = ["Bell", "BellRope", "Mailbox", "Post"]

LARGEST_LETTER = 400 * 1024
"""Bytes; more goes through ZeroMQ. Linux takes 416 KiB at once if asked for its most."""
MOST_BUFFERS = 255
"""In one letter."""
RINGS_AT_ONCE = 1024
"""Read from the bell in one step."""
_NUMBER = array.array("I").itemsize


class Bell:
    """Workers tell the master that their journals hold results. The master's end."""

    def __init__(self, path: str) -> None:
        """Make the named pipe.

        Raises:
            OSError: there can be none here.
        """
        os.mkfifo(path, 0o600)
        # For writing too: without a writer it would be readable for ever.
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor that is readable when somebody has rung."""
        return self._descriptor

    def rung_by(self) -> set[int]:
        """The ids of the processes that have rung since."""
        try:
            numbers = os.read(self._descriptor, RINGS_AT_ONCE * _NUMBER)
        except BlockingIOError:
            return set()
        return set(array.array("I", numbers[: len(numbers) - len(numbers) % _NUMBER]))

    def close(self) -> None:
        """Hear nothing any more."""
        os.close(self._descriptor)


class BellRope:
    """A worker's end of the bell."""

    def __init__(self, path: str) -> None:
        """Take hold of it.

        Raises:
            OSError: there is no bell, or nobody who would hear it.
        """
        self._number = array.array("I", [os.getpid()]).tobytes()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor that is writable when the master can be told."""
        return self._descriptor

    def ring(self) -> bool:
        """Tell the master; False if it has not listened for so long that the pipe is full."""
        try:
            os.write(self._descriptor, self._number)
        except BlockingIOError:
            return False
        except BrokenPipeError:
            pass  # it is gone, which will be noticed elsewhere
        return True

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)


class Mailbox:
    """Where a worker takes messages with jobs.

    A letter is a byte that tells how many buffers it has, their sizes (`array` of "I"), the
    message, and the buffers.
    """

    def __init__(self, path: str) -> None:
        """Bind the socket.

        Raises:
            OSError: there can be none here.
        """
        self.path = path
        self._room = memoryview(bytearray(LARGEST_LETTER))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            self._socket.bind(path)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """The descriptor that is readable when there is a message."""
        return self._socket.fileno()

    def read(self) -> tuple[memoryview, list[Frame]] | None:
        """The next message, until `read` is called again, and its buffers; None without one."""
        room = self._room
        try:
            end = self._socket.recv_into(room)
        except BlockingIOError:
            return None
        count = room[0]
        if not count:
            return room[1:end], []
        start = 1 + count * _NUMBER
        buffers: list[Frame] = []
        for size in reversed(array.array("I", room[1:start].tobytes())):
            buffers.append(bytearray(room[end - size : end]))
            end -= size
        buffers.reverse()
        return room[start:end], buffers

    def unlink(self) -> None:
        """Remove the socket's name: the master has connected to it, or never will."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        """Take no more."""
        self._socket.close()


class Post:
    """The master's way to a worker's mailbox. It is closed when nobody has it any more."""

    def __init__(self, path: str) -> None:
        """Connect to it.

        Raises:
            OSError: there is no mailbox, or it is not the user's own.
        """
        status = os.lstat(path)
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(f"{path} is not a socket of this user")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST_LETTER)
        self._socket.connect(path)

    def send(self, message: bytes, buffers: Sequence[Frame] = ()) -> bool:
        """Send a message and its buffers; False if they must take another way."""
        try:
            if not buffers:
                if len(message) >= LARGEST_LETTER:
                    return False
                self._socket.send(b"\0" + message)
            else:
                sizes = list(map(len, buffers))
                size = 1 + len(sizes) * _NUMBER + len(message) + sum(sizes)
                if len(sizes) > MOST_BUFFERS or size > LARGEST_LETTER:
                    return False
                head = bytes([len(sizes)]) + array.array("I", sizes).tobytes()
                self._socket.sendmsg([head, message, *buffers])
        except OSError:  # full, too large for this system, or the worker is gone
            return False
        return True

    def __del__(self) -> None:
        # Not by a method: another thread may be about to use it, whose descriptor could
        # then be somebody else's (see `Wakeup`).
        if hasattr(self, "_socket"):
            self._socket.close()
