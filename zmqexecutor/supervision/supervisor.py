"""The process that keeps a group of processes alive, with Circus's arbiter.

    user's process                  this process                   N processes
    ┌──────────────┐  Configure   ┌───────────────────────────┐
    │ Workers      │  Scale, Quit │ Supervisor                │ fork, exec
    │              ├─────────────►│   SupervisedGroup ────────┼─────────────► pid
    │              │◄─────────────┤   Circus's arbiter        │◄───────────── SIGCHLD
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
import os
import shutil
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import zmq
from circus.arbiter import Arbiter
from circus.controller import Controller
from tornado.ioloop import IOLoop

from ..wire.protocol import FromSupervisor, GroupFailed, Quit, Reaped, Scale, ToSupervisor
from .group import SupervisedGroup
from .launch import KILL_WAIT, Launcher, end_now
from .terminal import BACKLOG

ORPHAN_GRACE: Final = 1.0
"""Seconds between SIGTERM and SIGKILL when the parent is gone."""
LONGEST_MESSAGE: Final = 64 * 1024 * 1024


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

    def __init__(self, group: SupervisedGroup, directory: str, quit_: Callable[[], None]) -> None:
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

    def __init__(
        self,
        link: socket.socket,
        parent: int,
        launcher: Launcher,
        unsent: bytes = b"",
    ) -> None:
        """Prepare.

        Args:
            link: our end of the socket pair.
            parent: the process id of the user's process.
            launcher: starts the processes of the group, and has the first of them.
            unsent: the end of the reports of that, which has not been sent.
        """
        self._link = link
        self._parent = parent
        self._launcher = launcher
        self._unsent = unsent
        self._quit = asyncio.Event()
        self._orphaned = asyncio.Event()
        self._arbiter: _Arbiter | None = None
        self._group: SupervisedGroup | None = None
        self._directory: str | None = None
        self._remove_directory = False
        self._writer: asyncio.StreamWriter | None = None

    async def serve(self, terminated: Sequence[int] = ()) -> None:
        """Run until it is over; then nothing of the group is left."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._on_child)
        loop.add_signal_handler(signal.SIGTERM, self._quit.set)
        for ignored in (signal.SIGINT, signal.SIGHUP):
            # An empty handler, as an ignored signal would be ignored in the
            # processes too: what is caught here is back to default after an exec.
            loop.add_signal_handler(ignored, lambda: None)
        self._watch_parent(loop)
        if terminated:
            self._quit.set()
        reader, self._writer = await asyncio.open_unix_connection(
            sock=self._link, limit=LONGEST_MESSAGE
        )
        self._writer.write(self._unsent)
        # First: what is said while Circus starts holds for what dies meanwhile.
        obeying = asyncio.ensure_future(self._obey(reader))
        await self._configure()
        try:
            await _first(self._quit.wait(), self._orphaned.wait())
            await self._end()
        finally:
            orphaned = self._orphaned.is_set()
            # Otherwise the parent may start another supervisor in the same directory.
            if self._directory is not None and (orphaned or self._remove_directory):
                shutil.rmtree(self._directory, ignore_errors=True)
            if not orphaned:
                await self._say_goodbye()
            obeying.cancel()
            # asyncio closes its end of this before it gives its handlers back, and a
            # signal between the two would write words to standard error.
            signal.set_wakeup_fd(-1)

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
        if isinstance(message, Scale):
            if self._group is not None:
                self._group.scale(message.numprocesses, message.spare)
        elif isinstance(message, Quit):
            if self._group is not None:
                self._group.graceful_timeout = message.graceful_timeout
                self._group.with_children = message.with_children
            self._remove_directory = message.remove_directory
            self._quit.set()

    async def _configure(self) -> None:
        directory = self._directory = self._launcher.config.directory
        self._group = SupervisedGroup(self._launcher, self._report)
        try:
            self._arbiter = _Arbiter(self._group, directory, self._quit.set)
            await self._arbiter.start()
        except (OSError, ValueError, zmq.ZMQError) as error:
            self._arbiter = self._group = None
            for popen in self._launcher.first:
                self._report(Reaped(popen.pid, end_now(popen), ""))
            self._report(GroupFailed(f"cannot run Circus's arbiter in {directory!r}: {error}"))

    def _report(self, message: FromSupervisor) -> None:
        assert self._writer is not None
        if isinstance(message, Reaped) and self._backlog() > BACKLOG:
            message = msgspec.structs.replace(message, stderr="", fault="")
        if not self._writer.is_closing():
            self._writer.write(msgspec.json.encode(message) + b"\n")

    def _backlog(self) -> int:
        assert self._writer is not None
        return self._writer.transport.get_write_buffer_size()

    async def _end(self) -> None:
        if self._arbiter is None or self._group is None:
            return
        if self._orphaned.is_set():
            self._group.with_children = True
        ending = asyncio.ensure_future(self._arbiter.end())
        # The user's grace may be long, but not when there is no user any more.
        await _first(ending, self._orphaned.wait())
        if not ending.done():
            await asyncio.wait({ending}, timeout=ORPHAN_GRACE)
            self._group.kill_all()
        await ending
        await self._group.last_words()

    async def _say_goodbye(self) -> None:
        """Close the link, once the parent has been sent what it did not read so far."""
        assert self._writer is not None
        with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
            self._writer.close()
            await asyncio.wait_for(self._writer.wait_closed(), KILL_WAIT)


def supervise(
    link: socket.socket,
    parent: int,
    launcher: Launcher,
    unsent: bytes,
    terminated: Sequence[int],
) -> None:
    """Be the supervisor, until it is over. The arguments are those of `Supervisor`.

    If `terminated` has something in it when the handlers of signals have been set, it is
    over at once.
    """

    async def serve() -> None:
        await Supervisor(link, parent, launcher, unsent).serve(terminated)

    asyncio.run(serve(), debug=False)


async def _first(*awaitables: Any) -> None:
    """Until the first of them is done. The others, if they are coroutines, are cancelled."""
    waits = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait, awaitable in zip(waits, awaitables, strict=True):
        if wait is not awaitable:
            wait.cancel()
