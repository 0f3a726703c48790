"""The user's terminal, written to by the supervisor for its processes."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable
from typing import Final

__all__ = ["BACKLOG", "Terminal"]

BACKLOG: Final = 256 * 1024
"""Bytes waiting for a reader that does not read, above which text is dropped."""


class Terminal:
    """Our standard error, which is the user's: written to unchanged, never waited for.

    It cannot be made non-blocking, as its description is shared with the user's
    process, so it is asked for room first. Without room `pause` stops the reading
    of processes' pipes, which then fill, so that they wait as if they wrote to the
    terminal themselves; `resume` is called when all is written.
    """

    def __init__(self, pause: Callable[[], object], resume: Callable[[], object]) -> None:
        self._pause, self._resume = pause, resume
        self._pending = bytearray()
        self._waiting = self._broken = False
        self._written = asyncio.Event()
        self._written.set()
        self._poll = select.poll()
        self._poll.register(2, select.POLLOUT)

    def write(self, data: bytes) -> None:
        """Write this soon, or drop it if too much is waiting."""
        if not self._broken and len(self._pending) < BACKLOG:
            self._pending += data
            self._written.clear()
            self._flush()

    async def written(self, timeout: float) -> bool:
        """Whether all is written, at once or within so many seconds."""
        try:
            await asyncio.wait_for(self._written.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._pending:
                if not self._poll.poll(0):
                    if not self._waiting:
                        loop.add_writer(2, self._flush)
                        self._waiting = True
                        self._pause()
                    return
                # A pipe with any room takes this much without blocking.
                del self._pending[: os.write(2, self._pending[: select.PIPE_BUF])]
        except OSError:  # closed, or its reader is gone: nothing to tell anybody
            self._broken = True
            self._pending.clear()
        self._written.set()
        if self._waiting:
            loop.remove_writer(2)
            self._waiting = False
            self._resume()
