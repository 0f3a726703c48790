"""One process of a supervised group, as Circus knows it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sys
import time
from typing import Final

import psutil
from circus.process import Process
from circus.watcher import Watcher

from ..wire.protocol import Reaped
from .last_words import LastWords
from .launch import Launched, Launcher

__all__ = ["PIPE_BYTES", "SupervisedProcess"]

PIPE_BYTES: Final = 64 * 1024
"""What a pipe holds."""
CPU_TOLERANCE: Final = 0.75
"""Part of the limit that a process must have used for a SIGKILL to be the limit's.

Linux counts whole clock ticks for the limit, which on a busy or virtual machine is more
than what it tells later.
"""

_CRASHES = {
    -signum
    for signum in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
}
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


class _Handle(psutil.Process):  # type: ignore[misc]
    """What Circus asks of a process: psutil's answers, and the pipe of its standard error."""

    def __init__(self, popen: Launched) -> None:
        super().__init__(popen.pid)
        self.popen = popen
        self.stdout = None
        self.stderr = popen.stderr

    @property
    def returncode(self) -> int | None:
        return self.popen.returncode


class SupervisedProcess(Process):  # type: ignore[misc]
    """One process of the group."""

    def __init__(
        self,
        group: Watcher,
        launcher: Launcher,
        wid: int,
        popen: Launched | None = None,
    ) -> None:
        """Start it, or take one over that is started already (`popen`)."""
        self.ended = asyncio.Event()
        self.words = LastWords()
        self._usage: resource.struct_rusage | None = None
        self.born = asyncio.get_running_loop().time()
        self._popen = popen or launcher.start(wid)
        super().__init__(
            group.name,
            wid,
            group.cmd,
            working_dir=group.working_dir,
            env=group.env,
            rlimits=group.rlimits,
            watcher=group,
            pipe_stdout=False,
        )

    def spawn(self) -> None:
        """Circus's start of a process. Its own takes a command apart that we know exactly."""
        self.started = time.time()
        self._worker = _Handle(self._popen)

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
        popen = self._popen
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
        if self.stderr.closed:
            return b""
        fd = self.stderr.fileno()
        os.set_blocking(fd, False)
        try:
            return os.read(fd, PIPE_BYTES)
        except OSError:  # nothing there, but a process it started holds the pipe open
            return b""
