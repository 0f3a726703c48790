"""The worker: a process that registers with a master and runs its jobs.

    control thread                              main thread (the caller of `run`)
    ──────────────                              ─────────────────────────────────
    endpoint: Hello ► ◄ Welcome ── session ──►  opens the work socket: Ready ►
    ◄ Drain ── event ──►                        ◄ Jobs: note, run, Results ►
                                                finishes what it holds: Goodbye ►

Jobs run in the main thread, which signal handlers, timers and some libraries
need, and which owns the work socket, so that a job costs no change of threads.
The control thread sleeps unless the master speaks or its connection changes.

A job that is about to run is noted in the journal, where the master may have taken it
back (see `journal`). A result is written there before the next job starts, so that it
is not lost if that job kills the process, and a bell tells the master to read it. It is
told of several results of very short jobs at once, but none waits for longer than
`COALESCE` before the next job. What is too large for the journal, and all results of a
worker that has none, are messages on the work socket.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic, sleep  # as they are now, whatever tasks make of them
from typing import TYPE_CHECKING, Any, Final

import zmq

from ..system.arguments import check_timeout
from ..wire import handshakes, protocol, security
from ..wire.journal import JournalWriter
from ..wire.liveness import WORKER_PATIENCE
from ..wire.protocol import DEFAULT_SERVICE, Frame, Job, check_service
from ..wire.security import has_message
from ..wire.shortcuts import BellRope, Mailbox
from ..wire.wakeup import Wakeup
from ..worker_errors import RegistrationError
from .handler import Handler, Outcome
from .registration import Control, Session
from .targets import Initializer, Target, TargetHandler

if TYPE_CHECKING:
    from ..keys import Keys

__all__ = ["Worker"]

COALESCE: Final = 0.0003
"""Seconds for which results may be held back to travel together."""
LONGEST_REASON: Final = 10_000
"""Characters of what the master is told when it is no use to go on."""


class Worker:
    """Registers at an endpoint and hands the jobs it is sent to a target.

    It outlives its master: when the master goes away, the worker registers again
    with the one that comes to the endpoint next.

    Example:
        A worker that squares numbers::

            def square(job):
                job_id, data = job
                return str(int(data) ** 2)

            worker = Worker("ipc:///tmp/master.ipc", target=square)
            worker.run()
    """

    def __init__(
        self,
        endpoint: str,
        workpoint: str | None = None,
        target: Target | None = None,
        *,
        service: str = DEFAULT_SERVICE,
        targets: Mapping[str, Target] | None = None,
        initializer: Initializer | None = None,
        initargs: tuple[Any, ...] = (),
        teardown: Callable[[Any], object] | None = None,
        allow_pickle: bool = False,
        patience: float | None = WORKER_PATIENCE,
        keys: Keys | str | os.PathLike[str] | None = None,
        allow_plaintext_tcp_from_anyone: bool = False,
    ) -> None:
        """Check the arguments; nothing is opened before `run`.

        Args:
            endpoint: where the master listens to workers that want to register,
                such as `ipc:///tmp/master.ipc` or `tcp://127.0.0.1:5555`.
            workpoint: the address at which this worker gets its jobs, unique to it.
                Without one it connects to an address that the master names.
            target: called with one list, `[job_id, data]`, for each job; returns
                `str` or `bytes`. `data` is `str` or `bytes`, as it was given. If the
                caller has named a codec, both are objects that this codec can carry.
            service: the name of what the target does, for callers to ask for.
            targets: several services, by name, each with its target; in the place of
                `target` and `service`.
            initializer: called once, before the first job. What it returns, a loaded
                model or a connection for example, is the second argument of each call
                of a target. If it raises, `run` raises the same.
            initargs: the initializer's arguments.
            teardown: called with what the initializer returned when `run` ends.
            allow_pickle: whether jobs may be pickled. Who can send such a job can run
                any code in this process.
            patience: seconds to look for a master, at the start and after its loss, or None to
                look for as long as it takes.
            keys: for tcp://, the worker's keys or their directory. None means those in
                the default directory, if it is there; without keys only addresses of
                the loopback interface can be used, in plain text.
            allow_plaintext_tcp_from_anyone: use tcp:// without keys at any address:
                whoever can reach it, or is on the way, can pose as the master.

        Raises:
            TypeError: a target is not callable, or an argument has the wrong type.
            ValueError: an address cannot be used, or not without keys; arguments
                contradict each other.
            OSError: keys are missing, or other users could read them.
        """
        handler = TargetHandler(
            _check_targets(target, service, targets),
            _check_callable(initializer, "initializer"),
            tuple(initargs),
            _check_callable(teardown, "teardown"),
            allow_pickle=allow_pickle,
        )
        if teardown is not None and initializer is None:
            raise ValueError("teardown is called with what the initializer returned: give both")
        access = security.Access.decide(
            endpoint,
            "worker",
            keys,
            allow_plaintext_tcp_from_anyone=allow_plaintext_tcp_from_anyone,
        )
        if workpoint is not None:
            access.check_workpoint(workpoint)
        self._init(endpoint, workpoint, handler, patience, keys=access.keys)

    @classmethod
    def with_handler(
        cls,
        endpoint: str,
        handler: Handler,
        *,
        journals: str | None,
        patience: float | None,
        once: bool = False,
        owned: bool = False,
        keys: Keys | None = None,
    ) -> Worker:
        """A worker whose jobs mean something else than a call of a target.

        Args:
            endpoint: as for `Worker`.
            handler: what runs the jobs.
            journals: a private directory of the master's host, for the journal.
            patience: as for `Worker`.
            once: whether `run` returns when a master is lost that it has worked for.
            owned: whether the process is that master's own, and ends with it.
            keys: the worker's, if it has any.
        """
        worker = cls.__new__(cls)
        worker._init(endpoint, None, handler, patience, journals, keys)
        worker._once = once
        worker._owned = owned
        return worker

    def _init(
        self,
        endpoint: str,
        workpoint: str | None,
        handler: Handler,
        patience: float | None,
        journals: str | None = None,
        keys: Keys | None = None,
    ) -> None:
        self._keys = keys
        self._endpoint = endpoint
        self._workpoint = workpoint
        self._handler = handler
        self._patience = check_timeout("patience", patience)
        self._journals = journals
        self._wakeup = Wakeup()
        self._poller = select.poll()
        self._poller.register(self._wakeup, select.POLLIN)
        self._stopping = False
        self._set_up = False
        self._once = self._owned = False
        self.lost = False
        """Whether the last master has gone, or has taken this worker for lost."""
        self.stopped = False
        """Whether `stop` was called."""
        self._queue: deque[tuple[Job | None, list[Frame], protocol.Jobs | None]] = deque()
        self._received = 0  # number of the last message whose jobs were queued
        self._early: dict[int, tuple[protocol.Jobs, list[Frame]]] = {}  # later ones
        self._untold_since: float | None = None  # of results in the journal
        self._unsent: deque[list[Frame]] = deque()  # messages with results
        self._journal: JournalWriter | None = None
        self._mailbox: Mailbox | None = None
        self._bell: BellRope | None = None
        self._work_used = False  # since it was last found empty
        self._mail = False  # whether the mailbox may have something
        self._confirmed = 0  # position of the journal
        self._needed = 0  # position to be confirmed before the next job starts
        self._abandoned = 0  # number of a job that was started, and was interrupted
        self._pid = os.getpid()

    # ------------------------------------------------------------------ public

    def run(self) -> None:
        """Run jobs until `stop`, or until there is no master for too long.

        In the main thread SIGTERM means `stop`: the job at hand is finished.

        Raises:
            RegistrationError: no master was found in time, or it refused this worker.
            OSError: the workpoint cannot be bound.
        """
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._control = Control(
            context,
            self._endpoint,
            self._workpoint,
            self._wakeup,
            services=self._handler.services,
            patience=self._patience,
            owned=self._owned,
            journals=self._journals,
            keys=self._keys,
        )
        self._control.start()
        previous = self._catch_sigterm()
        try:
            while (session := self._next_session()) is not None:
                self._serve(context, session)
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
            self._control.end()
            try:
                if self._set_up:
                    self._handler.teardown()
            finally:
                # Not `term`: it would wait for a socket that an interrupt kept from being
                # closed.
                context.destroy()

    def stop(self) -> None:
        """Have `run` return after the job at hand. Never blocks; any thread may call it."""
        self.stopped = True
        self._stopping = True
        self._wakeup.set()

    # ---------------------------------------------------------------- sessions

    def _catch_sigterm(self) -> Any:
        """Make SIGTERM stop the worker, where we may and the user has not decided."""
        if self._owned or threading.current_thread() is not threading.main_thread():
            return None
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return None
        return signal.signal(signal.SIGTERM, lambda _signum, _frame: self.stop())

    def _next_session(self) -> Session | None:
        """Wait for a master; None if the worker should end."""
        if self.lost and not self._once:
            self._control.seek()
        while True:
            self._wakeup.clear()  # before the looks that it would have us take
            if self._stopping:
                return None
            while self._control.events:
                event = self._control.events.popleft()
                if isinstance(event, RegistrationError):
                    raise event
                if isinstance(event, Session) and not (self._once and self.lost):
                    self.lost = False
                    return event
            if self._once and self.lost:
                return None
            self._poller.poll()

    def _wait(self) -> None:
        """Sleep until a message may have come, or there is other news."""
        # Not zmq.zmq_poll, which takes longer. The socket's descriptor tells of what has
        # come since the socket was used last, so that is asked before.
        if self._work_used:
            if has_message(self._work):
                return
            self._work_used = False
        for descriptor, _ in self._poller.poll():
            if descriptor == self._work_fd:
                self._work_used = True
            elif descriptor == self._wakeup.fileno():
                self._wakeup.clear()
            else:
                self._mail = True

    def _serve(self, context: zmq.Context[zmq.Socket[bytes]], session: Session) -> None:
        """Run the jobs of one master until it is lost, or lets this worker go."""
        self._queue.clear()
        self._received = 0
        self._early.clear()
        self._untold_since = None
        self._unsent.clear()
        self._journal, self._mailbox, self._bell = session.journal, session.mailbox, session.bell
        self._confirmed = self._needed = self._abandoned = 0
        address = self._workpoint or session.work
        self._work = security.socket(
            context, zmq.DEALER, address, self._keys, lost_after=session.lost_after, bulk=True
        )
        self._work.routing_id = session.worker.encode()
        self._poller.register(self._work, select.POLLIN)
        self._work_fd = self._work.fileno()
        self._work_used = True
        if self._mailbox:
            self._poller.register(self._mailbox, select.POLLIN)
        # On one machine it is only lost together with the control connection.
        if not address.startswith("ipc://"):
            monitor = f"inproc://work-{session.worker}"
            self._work.monitor(monitor, handshakes.WATCHED)
            self._control.watch(handshakes.open_monitor(context, monitor), session.worker)
        try:
            if self._workpoint is not None:
                security.bind(self._work, self._workpoint)
            else:
                self._work.connect(session.work)
            try:
                self._handler.setup(session.setup)
                self._set_up = True
            except BaseException as error:
                reason = f"{type(error).__name__}: {error}"[:LONGEST_REASON]
                reason = reason.encode(errors="replace").decode()
                self._control.send(protocol.Unready(reason))
                raise
            try:
                self._send([protocol.encode(protocol.Ready(session.worker))])
                self._run_jobs()
            finally:
                self._say_goodbye()
        finally:
            self._poller.unregister(self._work)
            self._stop_watch()
            security.close(self._work, self._workpoint)
            if self._mailbox:
                self._poller.unregister(self._mailbox)
            for file in (self._journal, self._mailbox, self._bell):
                if file:
                    file.close()

    def _say_goodbye(self) -> None:
        """Tell the master that what has no result was not started here, but for one."""
        if self._is_over():
            return
        self._flush()
        self._stop_watch()  # the master may answer by closing the connection
        try:
            self._work.send(protocol.encode(protocol.Goodbye(self._abandoned)), zmq.DONTWAIT)
        except zmq.Again:
            return  # nobody is there any more
        self._work.linger = 1000

    def _stop_watch(self) -> None:
        self._work.disable_monitor()  # at first: ZeroMQ would wait for somebody to read it
        self._control.watch(None)

    def _run_jobs(self) -> None:
        """Return when the worker should leave; the queue is empty then."""
        events = self._control.events
        while True:
            if events or self._stopping:
                if self._session_ends():
                    return
            elif self._queue:
                self._run_next()
            else:
                self._flush()
                self._wait()
                self._receive()

    def _session_ends(self) -> bool:
        """Look at what the control thread says; whether to leave this session."""
        events = self._control.events
        while events:
            if events[0] != "drain":
                self.lost = True
                return True  # or given up; `_next_session` goes on from there
            events.popleft()
            self._stopping = True
        if self._stopping:
            while self._queue:
                self._run_next()
            return True
        return False

    # -------------------------------------------------------------------- jobs

    def _receive(self) -> None:
        """Queue the jobs of the messages that have come."""
        if self._mail and self._mailbox:
            self._mail = False
            if (letter := self._mailbox.read()) is not None:
                self._take(protocol.decode_jobs(letter[0]), letter[1])
        if self._work_used:
            try:
                message = protocol.decode_jobs(self._work.recv(zmq.DONTWAIT))
            except zmq.Again:
                return
            # They have come with the message. They are large, and not copied.
            count = sum(job.buffers for job in message.jobs)
            self._take(message, [self._work.recv(copy=False).buffer for _ in range(count)])

    def _take(self, message: protocol.Jobs, buffers: list[Frame]) -> None:
        """Queue the jobs of a message, and of those that have overtaken it.

        A numbered message may come twice (see `offers`).
        """
        if 0 < message.number <= self._received:
            return
        if message.number > self._received + 1:
            self._early[message.number] = message, buffers
            return
        self._enqueue(message, buffers)
        self._received += message.number > 0
        while self._early and (early := self._early.pop(self._received + 1, None)) is not None:
            self._enqueue(*early)
            self._received += 1

    def _enqueue(self, message: protocol.Jobs, buffers: list[Frame]) -> None:
        if message.confirmed > self._confirmed:
            self._confirmed = message.confirmed
            if self._journal:
                self._journal.confirm(message.confirmed)
        first: protocol.Jobs | None = message
        taken = 0
        for job in message.jobs:
            self._queue.append((job, buffers[taken : taken + job.buffers], first))
            taken += job.buffers
            first = None
        if first is not None and first.forget:
            self._queue.append((None, [], first))

    def _run_next(self) -> None:
        job, buffers, message = self._queue.popleft()
        if message is not None:
            # In order with the jobs: one before may still have needed what is forgotten.
            for key in message.forget:
                self._handler.forget(key)
            for shared in message.shared:
                self._handler.define(shared.key, shared.data)
        if job is None:
            return
        if self._needed > self._confirmed:
            self._await_confirmation()
        started = monotonic()
        if self._journal and not self._journal.start(job.seq, started):
            if not self._may_start(job.seq):
                return
            started = monotonic()
            self._journal.start(job.seq, started)
        try:
            outcome = self._handler.run(job, buffers)
        except BaseException:
            # Not what a job raises, but an interrupt that was meant for this process.
            self._abandoned = job.seq
            raise
        if os.getpid() != self._pid:
            os._exit(0)  # the child of a job that forked; the sockets are not its own
        now = monotonic()
        self._answer(job.seq, outcome, started, now)
        if self._untold_since is not None and now - self._untold_since > COALESCE:
            self._flush()
        if outcome.worn:
            self._control.send(protocol.Worn(outcome.worn))

    def _may_start(self, seq: int) -> bool:
        """Hold still while the master is about to kill this process, or to take jobs back.

        It decides within milliseconds, or thinks better of it; if it dies, the control
        thread ends the process.
        """
        assert self._journal is not None
        self._journal.wait_with(seq)
        self._flush()
        while (decision := self._journal.may_start(seq)) is None:
            sleep(0.001)
        if decision:
            self._journal.wait_with(0)
        return decision

    def _answer(self, seq: int, outcome: Outcome, started: float, ended: float) -> None:
        """Make a result safe: in the journal, or on its way as a message."""
        buffers, seconds = outcome.buffers, ended - started
        result = protocol.Result(
            seq,
            outcome.ok,
            outcome.data,
            outcome.codec,
            seconds,
            len(buffers),
            outcome.segment,
            outcome.kept,
        )
        journal = self._journal
        if self._bell and journal and journal.append(protocol.encode(result), buffers):
            if self._untold_since is None:
                self._untold_since = started
            if seq <= journal.recalled:
                self._flush()
            return
        position = 0
        if journal:
            # It exists only in its message. The next job waits until that has come.
            journal.mark(protocol.encode(protocol.Result(seq, outcome.ok, b"", "", seconds, 1)))
            self._needed = position = journal.position
        message = protocol.Results(position, [result], confirm=journal is not None)
        self._unsent.append([protocol.encode(message), *buffers])
        self._flush()

    def _flush(self) -> None:
        """Tell the master of results, in the journal or in a message."""
        while self._unsent:
            if not self._send(self._unsent[0]):
                return
            self._unsent.popleft()
            self._untold_since = None  # a message has it read the journal too
        if self._untold_since is not None and self._ring():
            self._untold_since = None

    def _ring(self) -> bool:
        """Have the master read the journal; False if something else is to be done."""
        assert self._bell is not None
        while not self._bell.ring():
            if self._stopping or self._control.events:
                return False  # the `Goodbye` has it read the journal too
            self._await_room(self._bell)
        return True

    def _await_room(self, way: zmq.Socket[bytes] | BellRope) -> None:
        """Until something can be sent, or there is other news."""
        zmq.zmq_poll([(way, zmq.POLLOUT), (self._wakeup.fileno(), zmq.POLLIN)], -1)
        self._wakeup.clear()

    def _send(self, parts: list[Frame]) -> bool:
        """Send to the master; False if it is not there and something else is to be done."""
        self._work_used = True
        while True:
            try:
                if len(parts) == 1:
                    self._work.send(parts[0], zmq.DONTWAIT)
                else:
                    self._work.send_multipart(parts, zmq.DONTWAIT)
                return True
            except zmq.Again:  # it has not connected yet, or is gone
                if self._stopping or self._control.events:
                    return False
            self._await_room(self._work)

    def _is_over(self) -> bool:
        """Whether the control thread has told that the master is lost, or has failed itself."""
        return any(event != "drain" for event in list(self._control.events))

    def _await_confirmation(self) -> None:
        """Wait until the master has what only a message holds, or is lost."""
        while self._needed > self._confirmed and not self._is_over():
            self._flush()
            self._wait()
            self._receive()


def _check_targets(
    target: Target | None, service: str, targets: Mapping[str, Target] | None
) -> Mapping[str, Target]:
    if targets is None:
        targets = {service: target} if target is not None else {}
    elif target is not None or service != DEFAULT_SERVICE:
        raise ValueError("give either target (and service), or targets by their services")
    if not targets:
        raise TypeError("target must be callable: it is called with [job_id, data]")
    for name, function in targets.items():
        check_service(name)
        if not callable(function):
            raise TypeError(
                f"the target of {name!r} must be callable: it is called with [job_id, data]"
            )
    return targets


def _check_callable(function: Any, what: str) -> Any:
    if function is not None and not callable(function):
        raise TypeError(f"{what} must be callable, not {function!r}")
    return function
