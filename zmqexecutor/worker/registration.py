"""A worker's control thread: it registers with the master, and obeys it."""

from __future__ import annotations

import os
import platform
import signal
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import msgspec
import zmq

from ..system.interpreter import PACKAGE
from ..system.machine import machine_id
from ..wire import handshakes, protocol, security
from ..wire.journal import JournalWriter
from ..wire.shortcuts import BellRope, Mailbox
from ..wire.wakeup import Wakeup
from ..worker_errors import ProtocolError, RegistrationError

if TYPE_CHECKING:
    from ..keys import Keys

__all__ = ["Control", "Session"]

LAST_WORDS: Final = 100
"""Milliseconds for what the master has said before it closed the work connection."""
RETRY_AFTER: Final = 200
"""Milliseconds between two handshakes, if the first has failed."""


class Session(msgspec.Struct, frozen=True):
    """A master has welcomed the worker."""

    worker: str
    work: str
    setup: bytes
    lost_after: float
    """Seconds of silence after which the master takes the worker for lost."""
    journal: JournalWriter | None
    mailbox: Mailbox | None
    bell: BellRope | None


Event: TypeAlias = Session | RegistrationError | Literal["lost", "drain"]


class Control(threading.Thread):
    """Owns the control socket; tells the main thread what matters to it in `events`."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        workpoint: str | None,
        main: Wakeup,
        *,
        services: Sequence[str],
        patience: float | None,
        owned: bool,
        journals: str | None,
        keys: Keys | None = None,
    ) -> None:
        """Prepare the thread.

        Args:
            context: where its socket belongs.
            endpoint: where the master listens.
            workpoint: where the worker will bind its work socket, or None.
            main: wakes that thread.
            services: what the worker offers.
            patience: seconds to look for a master, or None to look for as long as it takes.
            owned: whether the process ends with its master.
            journals: directory for the journal, or None for no journal.
            keys: what protects the connection, or None if nothing does.
        """
        super().__init__(name="zmqexecutor-control", daemon=True)
        self._context = context
        self._endpoint = endpoint
        self._workpoint = workpoint
        self._main = main
        self._services = services
        self._patience = patience
        self._owned = owned
        self._journals = journals
        self._keys = keys
        self._open = self._connected = False
        self._failure = ""  # why the last handshake failed
        self._wakeup = Wakeup()
        self._outbox: deque[protocol.ControlFromWorker] = deque()
        self._monitors: deque[tuple[zmq.Socket[bytes] | None, str]] = deque()
        self._work_monitor: zmq.Socket[bytes] | None = None
        self._watched = ""  # the name to which that belongs
        self._work = handshakes.Connections()
        self._work_address = ""
        self._ending = False
        self._welcomed = False
        self._parted = False  # from a master that was lost, and no other is looked for
        self._seeking = False  # asked for by the main thread
        self._worker = ""
        self._journal: JournalWriter | None = None
        self._mailbox: Mailbox | None = None
        self._main_thread = threading.get_ident()
        self._deadline = self._by_patience()
        self.events: deque[Event] = deque()
        """What the main thread should know, in this order."""

    # ---------------------------------------------- called by the main thread

    def send(self, message: protocol.ControlFromWorker) -> None:
        """Send this soon."""
        self._outbox.append(message)
        self._wakeup.set()

    def watch(self, monitor: zmq.Socket[bytes] | None, worker: str = "") -> None:
        """Give the master up when the work connection is lost, also while a job runs.

        Args:
            monitor: tells of that connection; it is this thread's from now on. None for
                the end of the watch: nothing that it tells after that counts.
            worker: the name that the connection belongs to.
        """
        self._monitors.append((monitor, worker))
        self._wakeup.set()

    def seek(self) -> None:
        """Look for the next master: what belonged to the one that was lost is closed."""
        self._seeking = True
        self._wakeup.set()

    def end(self) -> None:
        """Send what is left, and wait for the end of the thread."""
        self._ending = True
        self._wakeup.set()
        self.join()

    # ---------------------------------------------------------------- the loop

    def run(self) -> None:
        """Register, and obey the master, until `end`."""
        self._poller = zmq.Poller()
        self._poller.register(self._wakeup.fileno(), zmq.POLLIN)
        try:
            self._connect()
            while not self._ending:
                self._step()
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    self._give_up()
            self._send_outbox()
        except RegistrationError as error:
            self._tell(error)
        except Exception as error:
            self._tell(RegistrationError(f"the control thread failed: {error!r}"))
        finally:
            # The work connection's monitor stays: ZeroMQ would wait for somebody to read it.
            if self._open:
                self._disconnect(linger=1000)

    def _by_patience(self) -> float | None:
        return None if self._patience is None else time.monotonic() + self._patience

    def _connect(self) -> None:
        """Open the socket under a name that no master knows yet.

        What is still under way from this worker to an earlier master, whose place
        at the same addresses another one has taken, then means nothing to that one.
        """
        self._open = self._connected = False
        self._worker = uuid.uuid4().hex
        self._socket = security.socket(self._context, zmq.DEALER, self._endpoint, keys=self._keys)
        # Nothing is kept for a master that is not there: it would come too late.
        self._socket.immediate = True
        self._socket.routing_id = self._worker.encode()
        self._monitor = self._socket.get_monitor_socket(
            zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED | handshakes.FAILED
        )
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._socket.connect(self._endpoint)
        self._open = True

    def _disconnect(self, linger: int = 0) -> None:
        self._open = False
        self._poller.unregister(self._socket)
        self._poller.unregister(self._monitor)
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close(linger)
        self._drop_files()

    def _drop_files(self) -> None:
        for file in (self._journal, self._mailbox):
            if file:
                file.unlink()
                file.close()
        self._journal = self._mailbox = None

    def _step(self) -> None:
        timeout = None
        if self._deadline is not None:
            timeout = max(0, int((self._deadline - time.monotonic()) * 1000) + 1)
        ready = dict(self._poller.poll(timeout))
        if self._wakeup.fileno() in ready:
            self._wakeup.clear()
        self._take_monitors()
        if self._work_monitor is not None and self._work_monitor in ready:
            self._on_work_connection(self._work_monitor)
        elif self._parted:
            if self._seeking:
                self._seeking = self._parted = False
                self._deadline = self._by_patience()
                self._connect()
        elif self._monitor in ready:
            monitor = self._monitor
            event, value = handshakes.read_event(monitor.recv_multipart())
            self._read_messages()  # those that came before a connection was lost
            if self._monitor is monitor and not self._parted:
                self._on_connection(event, value)
        elif self._socket in ready:
            self._read_messages()
        self._send_outbox()

    def _read_messages(self) -> None:
        while not self._parted:
            try:
                parts = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._on_message(parts)

    def _send_outbox(self) -> None:
        while self._outbox:
            message = self._outbox.popleft()
            if not self._parted:
                self._send(message)

    def _send(self, message: protocol.ControlFromWorker) -> None:
        try:
            self._socket.send(protocol.encode(message), zmq.DONTWAIT)
        except zmq.Again:
            pass  # the master is gone, and with it the need for this message

    def _tell(self, event: Event) -> None:
        self.events.append(event)
        self._main.set()

    def _give_up(self) -> None:
        within = f"within {self._patience:g} s"
        if self._welcomed and self._workpoint:
            raise RegistrationError(
                f"the master at {self._endpoint} has not connected to the workpoint "
                f"{self._workpoint} {within}: that address must be one of this host, and its port "
                "open to the master's; or leave the workpoint out"
            )
        if self._welcomed:
            raise RegistrationError(
                f"the master at {self._endpoint} answers, but its work address "
                f"{self._work_address} cannot be reached {within}: that port must be open too; "
                "the master's work_address says which it is"
            )
        if self._failure:
            raise RegistrationError(f"{self._failure} (tried for {self._patience:g} s)")
        raise RegistrationError(
            f"no master answered at {self._endpoint} {within}; is a master running there?"
        )

    # ------------------------------------------------------------------ events

    def _on_connection(self, event: int, value: int) -> None:
        if event & handshakes.FAILED:
            failure = handshakes.explain(event, value, self._endpoint, self._keys)
            if failure.final:
                raise RegistrationError(failure.reason)
            self._failure = failure.reason
            return  # what comes next is the disconnection
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self._connected = True
            self._failure = ""
            self._register()
            if self._owned:
                self._deadline = None  # that master welcomes us when it wants
            return
        self._begin_again()

    def _take_monitors(self) -> None:
        while self._monitors:
            monitor, worker = self._monitors.popleft()
            self._watch_no_more()
            if monitor is None:
                continue
            self._work_monitor, self._watched = monitor, worker
            self._work = handshakes.Connections()
            self._poller.register(monitor, zmq.POLLIN)
            if worker == self._worker:
                self._deadline = self._by_patience()

    def _watch_no_more(self) -> None:
        if self._work_monitor is not None:
            self._poller.unregister(self._work_monitor)
            self._work_monitor.close()
            self._work_monitor = None

    def _on_work_connection(self, monitor: zmq.Socket[bytes]) -> None:
        lost = self._work.lost(*handshakes.read_event(monitor.recv_multipart()))
        if self._watched != self._worker:
            return  # that master has been given up already
        if self._work.established:
            self._deadline = None
        if lost and self._socket.poll(LAST_WORDS):
            self._read_messages()  # perhaps the master's last word, such as `Die`
        if lost and self._watched == self._worker:
            self._begin_again()  # a message may be lost, of which nobody would ever know

    def _begin_again(self) -> None:
        """Look for a master, or another one, under a new name."""
        self._disconnect()
        if self._welcomed:
            self._part()
            return
        if not self._connected:
            # Not at once again and again, if what listens there is not a master.
            zmq.zmq_poll([(self._wakeup.fileno(), zmq.POLLIN)], RETRY_AFTER)
        self._connect()

    def _part(self) -> None:
        """The master is lost. The next one is looked for when the main thread says `seek`.

        That may still be in a job, with its work socket open under the old name: a master
        that connected to that at our workpoint would for ever take us for who we were.
        """
        if self._owned:
            _end(signal.SIGTERM)  # the master is dead, and nobody waits for our result
            os._exit(1)
        self._welcomed = False
        self._parted = True
        self._deadline = None
        self._worker = ""
        self._tell("lost")

    def _register(self) -> None:
        """Ask for registration, on each new connection."""
        self._drop_files()
        if self._journals is not None:
            # Without room for a journal the master sends one job at a time.
            with suppress(OSError):
                self._journal = JournalWriter(self._journals)
                self._mailbox = Mailbox(self._journal.path + ".in")
        self._send(
            protocol.Hello(
                version=protocol.VERSION,
                worker=self._worker,
                pid=os.getpid(),
                host=socket.gethostname(),
                machine=machine_id(),
                workpoint=self._workpoint,
                journal=self._journal.path if self._journal else None,
                python=platform.python_version(),
                services=list(self._services),
                mailbox=self._mailbox.path if self._mailbox else None,
            )
        )

    def _on_message(self, parts: list[bytes]) -> None:
        try:
            message = protocol.decode_control_from_master(parts[0])
        except ProtocolError:
            return  # not a master of ours: `_deadline` ends this if none comes
        if isinstance(message, protocol.Welcome):
            self._on_welcome(message)
        elif isinstance(message, protocol.Refused):
            raise RegistrationError(f"the master refused this worker: {message.reason}")
        elif isinstance(message, protocol.Drain):
            self._tell("drain")
        elif isinstance(message, protocol.Expelled):
            self._begin_again()
        elif isinstance(message, protocol.Die):
            _end(signal.SIGKILL)
        elif isinstance(message, protocol.ShowStack):
            self._send(protocol.Stack(_stack_of(self._main_thread)))

    def _on_welcome(self, message: protocol.Welcome) -> None:
        if self._welcomed:
            return
        if message.version != protocol.VERSION:
            raise RegistrationError(
                f"the master speaks protocol {message.version}, this worker {protocol.VERSION}"
            )
        journal, mailbox, bell = self._journal, self._mailbox, None
        self._journal = self._mailbox = None
        for file in (journal, mailbox):
            if file:
                file.unlink()  # the master has opened it; no file is left to clean up
        if journal and message.bell:
            with suppress(OSError):
                bell = BellRope(message.bell)
        self._welcomed = True
        self._deadline = None
        work = self._work_address = security.reachable(message.work, self._endpoint)
        self._tell(
            Session(self._worker, work, message.setup, message.lost_after, journal, mailbox, bell)
        )


def _end(signum: int) -> None:
    """Signal this process, and what its jobs have started if it leads a session of its own."""
    pid = os.getpid()
    send = os.killpg if os.getsid(0) == pid else os.kill
    send(pid, signum)


def _stack_of(thread: int) -> str:
    """Where a thread is, without the frames of ours that called what it runs."""
    import traceback  # of no use until somebody asks

    frame = sys._current_frames().get(thread)
    if frame is None:
        return ""
    stack = traceback.extract_stack(frame)
    if stack and stack[0].filename == "<string>":
        del stack[0]  # the code that `python -c` was started with
    while stack and stack[0].filename.startswith(PACKAGE + os.sep):
        del stack[0]
    text = "".join(traceback.format_list(stack))
    return text.encode(errors="replace").decode()  # names of files may not be UTF-8
