"""The process that keeps a group of processes alive, with Circus's arbiter.

    user's process                  this process                   N processes
    ┌──────────────┐  Configure   ┌───────────────────────────┐
    │ Workers      │  Scale, Quit │ Supervisor                │ fork, exec
    │              ├─────────────►│   _Group (Circus watcher) ├─────────────► pid
    │              │◄─────────────┤   _Arbiter (Circus)       │◄───────────── SIGCHLD
    └──────────────┘  Spawned,    └───────────────────────────┘  stderr
          │           Reaped            ▲
          └─ pidfd and end of file ─────┘

Circus gives the arbiter, its control and event endpoints (usable with
`circusctl --endpoint ipc://<directory>/circus`), the start of processes and the
states of a group. What it does by looking once per second is done here on the
event that causes it: SIGCHLD reaps and respawns, the end of a process ends the
wait of whoever stops it. All of that happens in steps of the event loop that
are never interrupted, so that Circus's lock around its commands, which refuses
instead of queueing ("already running"), is not needed and not taken.

Everything ends when the parent ends: on Linux its pidfd tells, elsewhere the
end of file on the socket pair. On Linux the kernel kills the processes when this
process is killed (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final

import msgspec
import zmq
from circus.arbiter import Arbiter
from circus.controller import Controller
from circus.process import Process
from circus.stream import Redirector
from circus.watcher import Watcher
from tornado.ioloop import IOLoop

from .protocol import (
    Configure,
    FromSupervisor,
    GroupFailed,
    Reaped,
    Scale,
    Spawned,
    ToSupervisor,
)
from .terminal import BACKLOG, Terminal

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
ORPHAN_GRACE: Final = 1.0
"""Seconds between SIGTERM and SIGKILL when the parent is gone."""
KILL_WAIT: Final = 0.5
"""Seconds in which the kernel should have ended a killed process."""
TAIL_BYTES: Final = 4096
TAIL_LINES: Final = 20
"""What is kept of a process's standard error for its `Reaped`."""
LONGEST_MESSAGE: Final = 64 * 1024 * 1024

_CHUNK = 64 * 1024  # what a pipe holds
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


class _Process(Process):  # type: ignore[misc]
    """One process of the group."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.ended = asyncio.Event()
        self.tail = bytearray()
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

    def drain(self) -> bytes:
        """What is left in its standard error now; never waits for more."""
        if self.stderr is None or self.stderr.closed:
            return b""
        fd = self.stderr.fileno()
        os.set_blocking(fd, False)
        try:
            return os.read(fd, _CHUNK)
        except OSError:  # nothing there, but a process it started holds the pipe open
            return b""


class _Redirector(Redirector):  # type: ignore[misc]
    """Circus's reader of pipes, which closes them when nobody can write any more."""

    def remove_fd(self, fd: int) -> None:
        entry = self.pipes.get(fd)
        super().remove_fd(fd)
        if entry is not None:
            entry[2].close()


class _Group(Watcher):  # type: ignore[misc]
    """The processes. Its methods are Circus's; each change is one step of the loop."""

    def __init__(self, config: Configure, report: Callable[[FromSupervisor], None]) -> None:
        stderr = {"stream": self._on_stderr} if config.capture_stderr else None
        super().__init__(
            "group",
            config.cmd,
            # Circus warns at 0, asks for the path of a directory that may have been
            # removed at None, and runs the .pth files of PYTHONPATH for copy_env.
            numprocesses=max(1, config.numprocesses),
            working_dir=config.working_dir or ".",
            graceful_timeout=config.graceful_timeout,
            stderr_stream=stderr,
        )
        self.env = {**os.environ, **(config.env or {})}
        self.numprocesses = config.numprocesses
        self.spare = False
        self._report = report
        self._terminal = Terminal(self._pause, self._resume)
        self._kills: set[asyncio.Future[bool]] = set()
        self._early_deaths = self._spawn_failures = 0
        self._not_before = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def _process_class(self) -> type[_Process]:
        return _Process

    @property
    def _redirector_class(self) -> Callable[..., _Redirector]:
        return functools.partial(_Redirector, buffer=_CHUNK)

    @property
    def _nextwid(self) -> int:
        used = {process.wid for process in self.processes.values()}
        return next(wid for wid in range(1, len(used) + 2) if wid not in used)

    # ------------------------------------------------------------- standard error

    def _on_stderr(self, chunk: dict[str, Any]) -> None:
        process = self.processes.get(chunk["pid"])
        if process is not None:
            process.tail += chunk["data"]
            del process.tail[:-TAIL_BYTES]
        self._terminal.write(chunk["data"])

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

    def _retire(self, process: _Process) -> None:
        """Ask it to end, and see to it that it does, while its successor may start."""
        self._ask_to_end(process, self.stop_signal)
        kill = asyncio.ensure_future(self.kill_process(process))
        self._kills.add(kill)
        kill.add_done_callback(self._kills.discard)

    async def _reload(self, graceful: bool = True, sequential: bool = False) -> None:  # noqa: ARG002
        """Replace all processes at once (`circusctl reload`)."""
        for process in self.processes.values():
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
        self.manage()

    def spawn_process(self, recovery_wid: int | None = None) -> bool:
        """Start one process; False if that failed."""
        try:
            process = self._process_class(
                self.name,
                recovery_wid or self._nextwid,
                self.cmd,
                working_dir=self.working_dir,
                env=self.env,
                rlimits=self.rlimits,
                watcher=self,
                pipe_stdout=False,
                pipe_stderr=self.stderr_stream is not None,
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self._spawn_failures += 1
            if self._spawn_failures == SPAWN_TRIES:
                self._report(GroupFailed(_explain(error, self.cmd[0], self.working_dir)))
            self._back_off(self._spawn_failures - 1)
            self._must_wait()
            return False
        self._spawn_failures = 0
        self.processes[process.pid] = process
        self._report(Spawned(process.pid))
        if self.stream_redirector:
            self.stream_redirector.add_redirections(process)
        self.notify_event("spawn", {"process_pid": process.pid, "time": process.started})
        return True

    def reap_process(self, pid: int, status: int | None = None) -> None:  # noqa: ARG002
        """Report the process's end, if it has ended. Never waits, as Circus's own does."""
        process = self.processes.get(pid)
        if process is None or process.poll() is None:
            return
        if data := process.drain():
            self._on_stderr({"pid": pid, "data": data})
        del self.processes[pid]
        # Its pipe stays: what it left running may write to it. _Redirector closes it.
        process.ended.set()
        lived = asyncio.get_running_loop().time() - process.born
        self._early_deaths = 0 if lived >= EARLY else self._early_deaths + (not process.stopping)
        excess = self._early_deaths - max(EARLY_ALLOWED, 2 * self.numprocesses)
        if excess > 0:
            self._back_off(excess - 1)
        text = process.tail.decode(errors="replace")
        lines = text.splitlines(keepends=True)[-TAIL_LINES:]
        self._report(Reaped(pid, process.returncode(), "".join(lines)))
        self.notify_event("reap", {"process_pid": pid, "exit_code": process.returncode()})

    def reap_processes(self) -> None:
        for pid in list(self.processes):
            self.reap_process(pid)

    async def kill_process(
        self,
        process: _Process,
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

    def _ask_to_end(self, process: _Process, signum: int) -> None:
        process.stopping = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signum)
            os.kill(process.pid, signal.SIGCONT)  # a stopped one would not hear it

    def kill_all(self) -> None:
        """SIGKILL for every process, at once."""
        for process in self.processes.values():
            process.signal_all(signal.SIGKILL)


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


class _OurSignals:
    """Stands for Circus's own signal handlers: `Supervisor` sets the handlers."""

    def stop(self) -> None:
        """There is nothing to restore."""


class _Controller(Controller):  # type: ignore[misc]
    """Circus's command endpoint, which leaves the signals to us."""

    def _init_syshandler(self) -> None:
        self.sys_hdl = _OurSignals()


class _Arbiter(Arbiter):  # type: ignore[misc]
    """Circus's arbiter of one group."""

    def __init__(self, group: _Group, directory: str, quit_: Callable[[], None]) -> None:
        # It would ask the name service for our host's full name, which can take
        # seconds where there is none; the name is only shown.
        socket.getfqdn = lambda name="": name or socket.gethostname()
        super().__init__(
            [group],
            f"ipc://{directory}/circus",
            f"ipc://{directory}/events",
            check_delay=-1,  # never by the clock: SIGCHLD tells
            multicast_endpoint=None,
            loop=IOLoop.current(),
            proc_name="zmqexecutor supervisor",
        )
        self._quit = quit_

    def _init_context(self, context: Any) -> None:
        self.context = context or zmq.Context.instance()
        self._ensure_ioloop()
        self.ctrl = _Controller(self.endpoint, None, self.context, self.loop, self, -1)

    def reap_processes(self) -> None:
        """Only our processes; Circus's own waits for any child."""
        for watcher in self.watchers:
            watcher.reap_processes()

    def stop(self) -> None:
        """What `circusctl quit` asks for."""
        self._quit()

    async def end(self) -> None:
        """Stop the processes, close Circus's sockets, remove their files."""
        self._stopping = True
        await self._stop_watchers(close_output_streams=True)
        self.stop_controller_and_close_sockets()
        for endpoint in (self.endpoint, self.pubsub_endpoint):
            with contextlib.suppress(OSError):
                os.unlink(endpoint.removeprefix("ipc://"))


class Supervisor:
    """Carries out what the parent asks, until it says `Quit` or is gone."""

    def __init__(self, link: socket.socket, parent: int) -> None:
        self._link = link
        self._parent = parent
        self._quit = asyncio.Event()
        self._orphaned = asyncio.Event()
        self._arbiter: _Arbiter | None = None
        self._group: _Group | None = None
        self._directory: str | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def serve(self) -> None:
        """Run until it is over; then nothing of the group is left."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._on_child)
        loop.add_signal_handler(signal.SIGTERM, self._quit.set)
        for ignored in (signal.SIGINT, signal.SIGHUP):
            # An empty handler, as an ignored signal would be ignored in the
            # processes too: what is caught here is back to default after an exec.
            loop.add_signal_handler(ignored, lambda: None)
        self._watch_parent(loop)
        reader, self._writer = await asyncio.open_unix_connection(
            sock=self._link, limit=LONGEST_MESSAGE
        )
        obeying = asyncio.ensure_future(self._obey(reader))
        try:
            await _first(self._quit.wait(), self._orphaned.wait())
            await self._end()
        finally:
            if not self._orphaned.is_set():
                await self._say_goodbye()
            elif self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
            obeying.cancel()

    def _watch_parent(self, loop: asyncio.AbstractEventLoop) -> None:
        # Where there are no pidfds, the end of file on the link has to do: a child
        # that the parent forked, and that outlives it, delays that.
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # gone already, or forbidden in a sandbox
                loop.add_reader(os.pidfd_open(self._parent), self._orphaned.set)
        if os.getppid() != self._parent:  # it was gone before, and its id may be another's
            self._orphaned.set()

    def _on_child(self) -> None:
        if self._group is not None:
            self._group.manage()

    async def _obey(self, reader: asyncio.StreamReader) -> None:
        decoder = msgspec.json.Decoder(ToSupervisor)
        try:
            while line := await reader.readline():
                await self._carry_out(decoder.decode(line))
        except ConnectionError:
            pass
        except Exception:  # a defect; the group must not outlive its only commander
            traceback.print_exc()
        finally:
            self._orphaned.set()

    async def _carry_out(self, message: ToSupervisor) -> None:
        if isinstance(message, Configure):
            try:
                await self._configure(message)
            except (OSError, ValueError, zmq.ZMQError) as error:
                reason = f"cannot run Circus's arbiter in {message.directory!r}: {error}"
                self._report(GroupFailed(reason))
        elif isinstance(message, Scale):
            if self._group is not None:
                self._group.scale(message.numprocesses, message.spare)
        else:
            if self._group is not None and message.graceful_timeout is not None:
                self._group.graceful_timeout = message.graceful_timeout
            self._quit.set()

    async def _configure(self, config: Configure) -> None:
        self._directory = config.directory
        self._group = _Group(config, self._report)
        self._arbiter = _Arbiter(self._group, config.directory, self._quit.set)
        try:
            await self._arbiter.start()
        except BaseException:
            self._arbiter = self._group = None
            raise

    def _report(self, message: FromSupervisor) -> None:
        assert self._writer is not None
        if isinstance(message, Reaped) and self._backlog() > BACKLOG:
            message = msgspec.structs.replace(message, stderr="")
        if not self._writer.is_closing():
            self._writer.write(msgspec.json.encode(message) + b"\n")

    def _backlog(self) -> int:
        assert self._writer is not None
        return self._writer.transport.get_write_buffer_size()

    async def _end(self) -> None:
        if self._arbiter is None or self._group is None:
            return
        ending = asyncio.ensure_future(self._arbiter.end())
        # The user's grace may be long, but not when there is no user any more.
        await _first(ending, self._orphaned.wait())
        if not ending.done():
            await asyncio.wait({ending}, timeout=ORPHAN_GRACE)
            self._group.kill_all()
        await ending

    async def _say_goodbye(self) -> None:
        """Close the link, once the parent has been sent what it did not read so far."""
        assert self._writer is not None
        with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
            self._writer.close()
            await asyncio.wait_for(self._writer.wait_closed(), KILL_WAIT)


async def _first(*awaitables: Any) -> None:
    """Until the first of them is done. The others, if they are coroutines, are cancelled."""
    waits = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait, awaitable in zip(waits, awaitables, strict=True):
        if wait is not awaitable:
            wait.cancel()


def _claim_link(fd: int) -> socket.socket:
    """The link, on a descriptor that is not one of the three that processes inherit."""
    if fd < 3:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(fd)
        fd = moved
    os.set_inheritable(fd, False)
    for standard in range(3):
        try:
            os.fstat(standard)
        except OSError:  # closed by the user: what is opened next must not land there
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(standard, True)
    return socket.socket(fileno=fd)


def main(fd: int, parent: int) -> None:
    """Be the supervisor; never returns.

    Args:
        fd: our end of the socket pair.
        parent: the process id of the user's process.
    """
    code = 1
    try:
        # A thread that blocks signals passes that on to the processes it starts.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        link = _claim_link(fd)

        async def serve() -> None:
            await Supervisor(link, parent).serve()

        asyncio.run(serve(), debug=False)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Nothing of the interpreter's own end is needed, and some of it could wait.
        os._exit(code)
