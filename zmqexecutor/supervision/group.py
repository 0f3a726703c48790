"""The processes of a supervised group: a Circus watcher that acts on events.

Circus's own watcher looks once per second; here each change is one step of the
event loop, on the event that causes it (see `supervisor`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any, Final

from circus.stream import Redirector
from circus.watcher import Watcher

from ..system.limits import refusal
from ..system.machine import oom_kills
from ..wire.protocol import FromSupervisor, GroupFailed, Spawned
from .launch import KILL_WAIT, Launcher
from .process import PIPE_BYTES, SupervisedProcess
from .terminal import Terminal

__all__ = ["SupervisedGroup"]

EARLY: Final = 1.0
"""Seconds. A process that ends sooner after its start died early."""
EARLY_ALLOWED: Final = 5
"""Early deaths in a row (or twice the group's size, if more) that are respawned at once."""
FIRST_DELAY: Final = 0.1
"""Seconds before the respawn after the next early death; doubled after each further one."""
LONGEST_DELAY: Final = 5.0
"""Seconds; no respawn waits longer."""
SPAWN_TRIES: Final = 3
"""Failures in a row to start a process, after which the group has failed."""
LAST_WORDS: Final = 0.25
"""Seconds that a slow reader of standard error has at the end."""
OOM_PERIOD: Final = 1.0
"""Seconds after the kernel killed for want of memory in which a SIGKILL counts as its own."""


class ClosingRedirector(Redirector):  # type: ignore[misc]
    """Circus's reader of pipes, which closes them when nobody can write any more."""

    def remove_fd(self, fd: int) -> None:
        entry = self.pipes.get(fd)
        super().remove_fd(fd)
        if entry is not None:
            entry[2].close()


class SupervisedGroup(Watcher):  # type: ignore[misc]
    """The processes. Its methods are Circus's; each change is one step of the loop."""

    def __init__(self, launcher: Launcher, report: Callable[[FromSupervisor], None]) -> None:
        """Prepare.

        Args:
            launcher: starts the processes, and has the first of them.
            report: is told what happens.
        """
        config = launcher.config
        super().__init__(
            "group",
            config.cmd,
            # Circus warns at 0, asks for the path of a directory that may have been
            # removed at None, and runs the .pth files of PYTHONPATH for copy_env.
            numprocesses=max(1, config.numprocesses),
            working_dir=config.working_dir or ".",
            graceful_timeout=config.graceful_timeout,
            stderr_stream={"stream": self._on_stderr},
            rlimits=config.rlimits,
        )
        self._launcher = launcher
        self.env = {**os.environ, **(config.env or {})}
        self.numprocesses = config.numprocesses
        self.spare = False
        self.with_children = False
        """Whether what is asked to end is asked with what it has started."""
        self._report = report
        self._terminal = Terminal(self._pause, self._resume)
        self._kills: set[asyncio.Future[bool]] = set()
        self._early_deaths = self._spawn_failures = 0
        self._not_before = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._oom_kills, self._oom_at = oom_kills(), -OOM_PERIOD

    @property
    def _redirector_class(self) -> Callable[..., ClosingRedirector]:
        return functools.partial(ClosingRedirector, buffer=PIPE_BYTES)

    @property
    def _nextwid(self) -> int:
        used = {process.wid for process in self.processes.values()}
        return next(wid for wid in range(1, len(used) + 2) if wid not in used)

    # ------------------------------------------------------------- standard error

    def _on_stderr(self, chunk: dict[str, Any]) -> None:
        process = self.processes.get(chunk["pid"])
        if process is not None:
            process.words.add(chunk["data"])
        self._terminal.write(chunk["data"])

    async def last_words(self) -> None:
        """Give the terminal a moment for what it has not taken yet."""
        await self._terminal.written(LAST_WORDS)

    def _pause(self) -> None:
        if self.stream_redirector:
            self.stream_redirector.stop()

    def _resume(self) -> None:
        if self.stream_redirector:
            self.stream_redirector.start()

    # ------------------------------------------------------------- size

    def scale(self, numprocesses: int, spare: bool) -> None:
        """Change the size, and forget earlier failures: whoever asks knows better."""
        self.numprocesses = numprocesses
        self.spare = spare
        self._early_deaths = self._spawn_failures = 0
        self._not_before = 0.0
        self.manage()

    def manage(self) -> None:
        """Reap the dead, then stop what is too much or start what is missing."""
        self.reap_processes()
        if not self.is_active():
            return
        living = [process for process in self.processes.values() if not process.stopping]
        if not self.spare:
            for process in living[self.numprocesses :]:  # in order of birth
                self._retire(process)
        for _ in range(self.numprocesses - len(living)):
            if self._must_wait() or not self.spawn_process():
                break

    def _retire(self, process: SupervisedProcess) -> None:
        """Ask it to end, and see to it that it does, while its successor may start."""
        self._ask_to_end(process, self.stop_signal)
        kill = asyncio.ensure_future(self.kill_process(process))
        self._kills.add(kill)
        kill.add_done_callback(self._kills.discard)

    async def _reload(self, graceful: bool = True, sequential: bool = False) -> None:  # noqa: ARG002
        """Replace all processes at once (`circusctl reload`)."""
        for process in list(self.processes.values()):
            if not process.stopping:
                self._retire(process)
        self.manage()

    async def manage_processes(self) -> None:
        """Circus's name for it, called by its commands."""
        self.manage()

    async def spawn_processes(self) -> None:
        """Likewise."""
        self.manage()

    def _must_wait(self) -> bool:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._spawn_failures >= SPAWN_TRIES:
            return True
        loop = asyncio.get_running_loop()
        if loop.time() < self._not_before:
            self._timer = loop.call_at(self._not_before, self.manage)
            return True
        return False

    def _back_off(self, times: int) -> None:
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(times, 10))
        self._not_before = asyncio.get_running_loop().time() + delay

    # ------------------------------------------------------------- one process

    async def _start(self) -> None:
        if self.is_stopped():
            self._create_redirectors()
            self._resume()
            self._status = "active"
            while self._launcher.first:
                popen = self._launcher.first.pop(0)
                self._keep(SupervisedProcess(self, self._launcher, self._nextwid, popen))
        self.manage()

    def spawn_process(self, recovery_wid: int | None = None) -> bool:
        """Start one process; False if that failed."""
        try:
            process = SupervisedProcess(self, self._launcher, recovery_wid or self._nextwid)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self._spawn_failures += 1
            if self._spawn_failures == SPAWN_TRIES:
                self._report(GroupFailed(self._explain(error)))
            self._back_off(self._spawn_failures - 1)
            self._must_wait()
            return False
        self._spawn_failures = 0
        self._report(Spawned(process.pid))
        self._keep(process)
        return True

    def _keep(self, process: SupervisedProcess) -> None:
        self.processes[process.pid] = process
        if self.stream_redirector:
            self.stream_redirector.add_redirections(process)
        self.notify_event("spawn", {"process_pid": process.pid, "time": process.started})

    def reap_process(self, pid: int, status: int | None = None) -> None:  # noqa: ARG002
        """Report the process's end, if it has ended. Never waits, as Circus's own does."""
        process = self.processes.get(pid)
        if process is None or process.poll() is None:
            return
        if data := process.drain():
            self._on_stderr({"pid": pid, "data": data})
        del self.processes[pid]
        # Its pipe stays: what it left running may write to it. ClosingRedirector closes it.
        process.ended.set()
        lived = asyncio.get_running_loop().time() - process.born
        self._early_deaths = 0 if lived >= EARLY else self._early_deaths + (not process.stopping)
        excess = self._early_deaths - max(EARLY_ALLOWED, 2 * self.numprocesses)
        if excess > 0:
            self._back_off(excess - 1)
        self._report(process.certificate(out_of_memory=self._out_of_memory()))
        self.notify_event("reap", {"process_pid": pid, "exit_code": process.returncode()})

    def _out_of_memory(self) -> bool:
        """Whether the kernel has killed for want of memory just now."""
        kills, now = oom_kills(), asyncio.get_running_loop().time()
        if kills > self._oom_kills:
            self._oom_kills, self._oom_at = kills, now
        return now - self._oom_at < OOM_PERIOD

    def reap_processes(self) -> None:
        """Report all that have ended."""
        for pid in list(self.processes):
            self.reap_process(pid)
        self._launcher.reap_others(self.processes)

    async def kill_process(
        self,
        process: SupervisedProcess,
        stop_signal: int | None = None,
        graceful_timeout: float | None = None,
    ) -> bool:
        """SIGTERM, or another signal; after so many seconds SIGKILL; until it has ended."""
        grace = self.graceful_timeout if graceful_timeout is None else graceful_timeout
        if not process.stopping and grace > 0:
            self._ask_to_end(process, stop_signal or self.stop_signal)
        process.stopping = True
        if not await process.wait_ended(grace):
            process.signal_all(signal.SIGKILL)
            await process.wait_ended(KILL_WAIT)
        return True

    def _ask_to_end(self, process: SupervisedProcess, signum: int) -> None:
        self.reap_process(process.pid)
        if process.ended.is_set():
            return  # by itself: what it has left running may go on
        process.stopping = True
        send = os.killpg if self.with_children else os.kill
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(process.pid, signum)
            send(process.pid, signal.SIGCONT)  # a stopped one would not hear it

    def kill_all(self) -> None:
        """SIGKILL for every process, at once."""
        for process in self.processes.values():
            process.signal_all(signal.SIGKILL)

    def _explain(self, error: Exception) -> str:
        if self.rlimits and isinstance(error, subprocess.SubprocessError):
            return f"cannot start {self.cmd[0]!r}: {refusal(self.rlimits)}"
        return _explain(error, self.cmd[0], self.working_dir)


def _explain(error: Exception, program: str, working_dir: str) -> str:
    """Why no process can be started: what, cause, next step."""
    code = getattr(error, "errno", None)
    if code in (errno.ENOENT, errno.ENOTDIR, errno.EACCES) and not os.path.isdir(working_dir):
        step = f"make the working directory {working_dir!r}, or give another"
    elif code in (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR):
        step = "check that the command names an executable program, by its path or found on PATH"
    elif code in (errno.EMFILE, errno.ENFILE):
        step = "raise the limit of open files (ulimit -n), or close some"
    elif code in (errno.EAGAIN, errno.ENOMEM):
        step = "the machine has no room for another process; check ulimit -u and free memory"
    else:
        step = "see the error"
    return f"cannot start {program!r}: {error} ({step})"
