"""A wake-up for a thread that waits in a poll, from any other thread."""

from __future__ import annotations

import os

__all__ = ["Wakeup"]


class Wakeup:
    """Makes its file descriptor readable; setting it never blocks.

    The waiting thread polls `fileno()` and calls `clear()` before it looks at
    what others left for it, so that nothing is left unseen: what comes after
    the look sets the wake-up again. Setting it many times is like setting it
    once, and a full pipe is as good as a set one.
    """

    def __init__(self) -> None:
        self._read = self._write = -1
        if hasattr(os, "eventfd"):
            self._read = self._write = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            self._read, self._write = os.pipe()
            os.set_blocking(self._read, False)
            os.set_blocking(self._write, False)

    def fileno(self) -> int:
        """The descriptor to poll for reading."""
        return self._read

    def set(self) -> None:
        """Wake the waiting thread now, or keep it from its next sleep."""
        try:
            os.write(self._write, b"\1\0\0\0\0\0\0\0")
        except BlockingIOError:
            pass

    def clear(self) -> None:
        """Forget what was set so far."""
        try:
            while len(os.read(self._read, 4096)) == 4096:
                pass
        except BlockingIOError:
            pass

    def __del__(self) -> None:
        # Not by a method: another thread could then write to a descriptor that has
        # been closed, and is by now somebody else's.
        if self._read != -1:
            os.close(self._read)
        if self._write != self._read:
            os.close(self._write)
