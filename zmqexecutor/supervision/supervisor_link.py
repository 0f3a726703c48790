"""The connection of a group with its supervisor process, on the group's side."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import threading
import time
from typing import Final, TypeAlias

import msgspec

from ..wire.protocol import Configure, FromSupervisor, GroupFailed, Reaped, Spawned, ToSupervisor
from .supervisor_process import SupervisorProcess, signal_leader

__all__ = ["SEND_TIMEOUT", "TERM_GRACE", "Event", "SupervisorLink"]

TERM_GRACE: Final = 0.5
"""Seconds between SIGTERM and SIGKILL for a supervisor that did not heed `Quit`."""
SEND_TIMEOUT: Final = 10.0
"""Seconds in which a supervisor must take a command from a full socket."""

Event: TypeAlias = Spawned | Reaped | GroupFailed


class SupervisorLink:
    """One supervisor process, which has been told what to do, and the socket pair to it."""

    def __init__(self, config: Configure, supervisor: SupervisorProcess | None = None) -> None:
        """Tell a supervisor what to do. It ends when this is dropped.

        Args:
            config: what it is to do.
            supervisor: the process, if it has been started already.
        """
        message = _encode(config)
        self.ended = False
        self.pids: set[int] = set()
        self._events: list[Event] = []
        self._partial = b""
        self._decoder = msgspec.json.Decoder(FromSupervisor)
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._supervisor = supervisor or SupervisorProcess()
        self._supervisor.configured = True
        self.socket, self.process = self._supervisor.socket, self._supervisor.popen
        try:
            self._send(message, SEND_TIMEOUT)
        except BaseException as error:
            self.kill()
            code = self.wait(TERM_GRACE)
            self.close()
            if isinstance(error, RuntimeError) and code is not None and code >= 0:
                raise RuntimeError(
                    f"the supervisor process ended at once, with exit code {code}; is "
                    f"{sys.executable!r} a Python interpreter that can import zmqexecutor?"
                ) from None
            raise

    def send(self, message: ToSupervisor, timeout: float = SEND_TIMEOUT) -> None:
        """Send a command.

        Raises:
            RuntimeError: the supervisor is gone, or has not taken it within `timeout` seconds.
        """
        self._send(_encode(message), timeout)

    def _send(self, data: bytes, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        poll = select.poll()
        with self._writing:
            try:
                poll.register(self.socket, select.POLLOUT)
                while data:
                    try:
                        data = data[self.socket.send(data) :]
                    except BlockingIOError:
                        left = deadline - time.monotonic()
                        if left <= 0 or not poll.poll(left * 1000):
                            raise RuntimeError(
                                f"supervisor process {self.process.pid} takes no commands since "
                                f"{timeout} seconds; is it stopped? kill() ends the group"
                            )
            except (OSError, ValueError) as error:
                raise RuntimeError(
                    f"supervisor process {self.process.pid} has ended ({error}); "
                    "start the group again"
                ) from None

    @property
    def hung_up(self) -> bool:
        """Whether the end is ours: this process is exiting, and the supervisor cleans up."""
        return not self._supervisor.hang_up.alive

    def receive(self) -> list[Event]:
        """What has come, and what `wait_end` has read in the meantime."""
        with self._reading:
            self._read()
            events, self._events = self._events, []
        return events

    def _read(self) -> None:
        while not self.ended:
            try:
                data = self.socket.recv(65536)
            except BlockingIOError:
                return
            except OSError:  # reset by a supervisor that was killed
                data = b""
            self.ended = not data
            *lines, self._partial = (self._partial + data).split(b"\n")
            for line in lines:
                event = self._decoder.decode(line)
                if isinstance(event, Spawned):
                    self.pids.add(event.pid)
                elif isinstance(event, Reaped):
                    self.pids.discard(event.pid)
                self._events.append(event)

    def wait_readable(self, timeout: float | None) -> None:
        """Until something has come, or for so many seconds."""
        with self._reading:
            if self.ended or self.socket.fileno() < 0:
                return
            # A descriptor of its own: another thread may close ours while we wait.
            watched = self.socket.dup()
        with watched:
            poll = select.poll()
            poll.register(watched, select.POLLIN)
            poll.poll(None if timeout is None else max(0.0, timeout) * 1000)

    def wait_end(self, timeout: float) -> bool:
        """Whether the supervisor has ended within so many seconds; events are kept."""
        deadline = time.monotonic() + timeout
        while True:
            with self._reading:
                self._read()
            left = deadline - time.monotonic()
            if self.ended or left <= 0:
                return self.ended
            self.wait_readable(left)

    def wait(self, timeout: float | None) -> int | None:
        """The supervisor's exit code, or None if it has not ended in so many seconds."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, signum: int) -> None:
        """Signal the supervisor."""
        if self.process.returncode is None:
            signal_leader(self.process.pid, signum)

    def kill(self) -> None:
        """SIGKILL for the processes, with what they have started, and for the supervisor."""
        # Stopped, it starts no more, and keeps the ids of those that have died. Not killed
        # first: the kernel would then kill the processes, but not what they have started.
        self.signal(signal.SIGSTOP)
        try:
            alive = self.process.poll() is None
            for pid in tuple(self.pids):
                signal_leader(pid, signal.SIGKILL, group=alive)
        finally:
            self.signal(signal.SIGKILL)

    def close(self) -> None:
        """Close our end of the link."""
        with self._reading:
            self._supervisor.hang_up()


def _encode(message: ToSupervisor) -> bytes:
    try:
        return msgspec.json.encode(message) + b"\n"
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the command, its env, its working_dir and its directory must be valid text: {error}"
        ) from None
