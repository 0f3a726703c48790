"""A short way for news: workers tell the master that their journals hold results.

A message takes two more threads of ZeroMQ's from one process to the other, and its
bytes are in the `journal` anyway. So a worker with one small result to tell rings a
bell, a named pipe in the pool's private directory, and the master reads its journal.
"""

from __future__ import annotations

import array
import os

__all__ = ["Bell", "BellRope", "path_of_bell"]

MOST_BYTES = 4096
"""Read from the pipe at once, in numbers of four."""


def path_of_bell(directory: str) -> str:
    """Where the bell of the master is that has this private directory."""
    return os.path.join(directory, "bell")


class Bell:
    """The master's end."""

    def __init__(self, path: str) -> None:
        """Make the pipe.

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
        """The processes that have rung since."""
        try:
            numbers = os.read(self._descriptor, MOST_BYTES)
        except BlockingIOError:
            return set()
        return set(array.array("I", numbers[: len(numbers) & ~3]))

    def close(self) -> None:
        """Nobody can ring any more."""
        os.close(self._descriptor)


class BellRope:
    """A worker's end."""

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
