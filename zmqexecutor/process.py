"""One process of a supervised group, started by Circus."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
from typing import Any, Final

from circus.process import Process

from .last_words import LastWords
from .protocol import Reaped

__all__ = ["PIPE_BYTES", "SupervisedProcess"]

PIPE_BYTES: Final = 64 * 1024
"""What a pipe holds."""
CPU_TOLERANCE: Final = 0.75
"""Part of the limit that a process must have used for a SIGKILL to be the limit's.

Linux counts whole clock ticks for the limit, which on a busy or virtual machine is more
than what it tells later.
"""

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
_CRASHES = {
    -signum
    for signum in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
}
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


class SupervisedProcess(Process):  # type: ignore[misc]
    """One process of the group."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.ended = asyncio.Event()
        self.words = LastWords()
        self._usage: resource.struct_rusage | None = None
        self.born = asyncio.get_running_loop().time()
        self._supervisor = os.getpid()
        super().__init__(*args, **options)  # starts it

    def format_args(self, sockets_fds: object = None) -> list[str]:  # noqa: ARG002
        """The exact argv. Circus would split it and replace other things with a `$` too."""
        wid = str(self.wid)
        return [part.replace("$(circus.wid)", wid).replace("$WID", wid) for part in self.cmd]

    def _null_streams(self, streams: list[Any]) -> None:
        """Called by Circus in the new process, before its program is there."""
        super()._null_streams(streams)
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self._supervisor:  # it ended before that took effect
                os._exit(1)

    def signal_all(self, signum: int) -> None:
        """Signal the process and what it started; it leads a session of its own."""
        for send in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                send(self.pid, signum)

    async def wait_ended(self, timeout: float) -> bool:
        """Whether it has been reaped within so many seconds."""
        try:
            await asyncio.wait_for(self.ended.wait(), timeout)
        except asyncio.TimeoutError:
            return self.ended.is_set()
        return True

    def poll(self) -> int | None:
        """Its exit status if it has ended. As Popen's, but what it used is noted."""
        popen: subprocess.Popen[bytes] = self._worker.poll.__self__  # inside psutil's
        if popen.returncode is None:
            try:
                pid, status, usage = os.wait4(popen.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it
                return popen.poll()
            if pid:
                popen.returncode = os.waitstatus_to_exitcode(status)
                self._usage = usage
        return popen.returncode

    def certificate(self, *, out_of_memory: bool) -> Reaped:
        """How it ended, once it has been reaped.

        Args:
            out_of_memory: whether the kernel was killing for want of memory then.
        """
        exitcode = self.returncode()
        crashed = exitcode is not None and (exitcode > 0 or exitcode in _CRASHES)
        stderr, fault = self.words.tell(crashed=crashed)
        return Reaped(
            self.pid,
            exitcode,
            stderr,
            peak_rss=self._usage.ru_maxrss * _RSS_UNIT if self._usage else 0,
            oom_killed=out_of_memory and exitcode == -signal.SIGKILL,
            fault=fault,
            limit=self._limit_reached(),
        )

    def _limit_reached(self) -> str:
        """The limit of processor time, if that is what ended it."""
        seconds = self.rlimits.get("cpu")
        if seconds is None or self._usage is None:
            return ""
        used = self._usage.ru_utime + self._usage.ru_stime
        struck = self.returncode() == -signal.SIGXCPU or (
            self.returncode() == -signal.SIGKILL and used >= seconds * CPU_TOLERANCE
        )
        return f"cpu={seconds}" if struck else ""

    def drain(self) -> bytes:
        """What is left in its standard error now; never waits for more."""
        if self.stderr is None or self.stderr.closed:
            return b""
        fd = self.stderr.fileno()
        os.set_blocking(fd, False)
        try:
            return os.read(fd, PIPE_BYTES)
        except OSError:  # nothing there, but a process it started holds the pipe open
            return b""
