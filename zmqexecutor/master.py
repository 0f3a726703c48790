"""The master: the one thread that owns the sockets to all workers.

    submit (any thread) ─► inbox ─► ┌────────────────────────┐ ◄── control ROUTER: endpoint
                                    │ master thread          │ ◄── work ROUTER
    futures ◄───────────────────────│   events ─► scheduler  │ ◄── process descriptors
                                    │   decisions ─► sockets │ ◄── the group's supervisor
                                    └────────────────────────┘

A task goes through the inbox to the scheduler, which decides who runs it; its
result comes back on the work socket and completes the future here. All that
happens is an event for the scheduler; all that is done is one of its decisions.
Other threads touch nothing but the inbox and the wake-up, or take an offer (see `offers`).
"""

from __future__ import annotations

import logging
import math
import os
import select
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Final

import msgspec

from . import protocol
from .attendance import Attendance
from .buffers import Segments
from .certificate import lost_error
from .channels import Channels, Entrance
from .clients import Clients, Counts, report
from .dispatch import Dispatcher
from .errors import BrokenPoolError, ProtocolError
from .fleet import WAIT_FOR_EXIT, Fleet, Group
from .offers import Offer
from .peers import Peer, WorkerInfo
from .protocol import DEFAULT_SERVICE, Frame
from .recalls import Recalls
from .retries import Retries
from .roster import Roster
from .scheduler import Scheduler
from .shortcuts import Bell
from .stops import Stops
from .tasks import Task
from .wakeup import Wakeup

__all__ = ["Master", "MasterOptions"]

logger = logging.getLogger(__name__)

PINGED_AFTER: Final = 0.25
"""Part of the time until a silent worker is lost, for a look whether ZeroMQ has noticed."""
LAST_WORDS: Final = 0.5
"""Seconds that the sockets stay open at most, at the end, for workers elsewhere to die."""
LONGEST_WAIT: Final = 3600.0
"""Seconds after which the loop looks again at a deadline that is still further away."""


class MasterOptions(msgspec.Struct, frozen=True):
    """What a master needs to know before it starts.

    Attributes:
        entrances: where workers come in.
        max_workers: how many workers the group may have.
        service: what the group's workers offer.
        allowance: how many jobs a worker does before it is replaced, or None.
        patience: seconds that a job waits while there is no worker, or None.
        lenient: whether it then waits on, and that is only told.
        finish_at_exit: whether pending tasks are finished when the interpreter exits.
        segments: where big buffers of jobs and results are, if not in messages.
    """

    entrances: Sequence[Entrance]
    max_workers: int = 0
    service: str = DEFAULT_SERVICE
    allowance: int | None = None
    patience: float | None = None
    lenient: bool = False
    finish_at_exit: bool = False
    segments: Segments | None = None


class Master:
    """Runs the loop in a thread of its own, from `start` until all is closed."""

    def __init__(
        self,
        options: MasterOptions,
        group: Group | None = None,
        cleanup: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare the master.

        Args:
            options: what it needs to know.
            group: the supervised group of workers that it looks after, if any.
            cleanup: called by the master thread when everything else is closed.
        """
        self._options = options
        self._scheduler: Scheduler[Task] = Scheduler(
            max_workers=options.max_workers,
            wanted=min(1, options.max_workers),
            patience=options.patience,
            lenient=options.lenient,
            service=options.service,
        )
        self._fleet = Fleet(group, self._fail, self._bar)
        self._retries = Retries()
        self._recalls = Recalls(self._read_journal, self._taken_back)
        self._stops = Stops(
            read_journal=self._read_journal,
            ask_stack=lambda peer: peer.tell(protocol.ShowStack()),
            recall=self._recalls.ask,
            kill=self._kill_worker,
            give_up=self._give_up,
        )
        self._counts = Counts()
        self._clients = Clients(
            submit=lambda task: self._scheduler.submit(task, time.monotonic()),
            tell_state=lambda: report(
                self._counts, self._scheduler.lanes(), self._roster, self._channels
            ),
        )
        self._inbox: deque[Task | Callable[[], None]] = deque()
        self._wakeup: Wakeup | None = Wakeup()  # None when the thread has ended
        self._nap: list[None] = []  # not empty while it sleeps and nobody has woken it
        self._offer: Offer | None = None  # while it sleeps
        self._thread = threading.Thread(target=self._run, name="zmqexecutor-master", daemon=True)
        self._opened: Future[None] = Future()
        self._bell: Bell | None = None  # of its own workers
        # Not zmq.Poller: 0.6 us against 3 to 6; the price of it is `Channels.unread`.
        self._poller = select.poll()
        self._handlers: dict[int, Callable[[], object]] = {}  # by the descriptors it polls
        self._dying: list[Peer] = []  # workers elsewhere that were told to
        self._answered: list[tuple[Task, protocol.Result, list[Frame]]] = []
        self._swept: list[int] = []  # dead processes whose segments nobody needs after that
        self._attendance = Attendance()
        self._cleanup = cleanup
        self._pid = os.getpid()
        self._due: float | None = None  # the next deadline, as of the last wait
        self._segments = options.segments
        if self._segments:
            self._segments.on_idle = self._wake
        self._closing = False
        self._cancelling = False  # nothing is tried again
        self._ended = False
        self.broken: BrokenPoolError | None = None
        """Why no task can run any more, once that is so."""
        self.exiting = False
        """Whether the interpreter is exiting and takes no more tasks."""

    # ------------------------------------------------- called by other threads

    def start(self) -> None:
        """Start the thread.

        Raises:
            OSError: an address cannot be used.
        """
        self._thread.start()
        _running.add(self)
        self._opened.result()

    def submit(self, task: Task) -> None:
        """Hand over a task. The caller has checked that the master still takes some."""
        offer = self._offer
        if offer is not None and not self._inbox and offer.take(task):
            if not offer.send(task):
                self._wake()  # to send it in another way
            return
        self._inbox.append(task)
        if nap := self._nap:
            # In this order, and only of this sleep: who is interrupted between the two, or
            # late, must not let others believe that a later one has been ended.
            self._wake()
            nap.clear()
        if self._wakeup is None:
            self._drop_inbox()  # the caller's check and the thread's end have crossed

    def equip(self, setup: bytes) -> None:
        """Say, once, what workers must prepare, for the entrances that have left it open."""
        self._call(lambda: self._equip(setup))

    def wait_for_workers(self, number: int, timeout: float | None) -> None:
        """Wait until so many workers are ready; those of the group are started for it.

        Raises:
            TimeoutError: they were not there in time.
            BrokenPoolError: the pool cannot run tasks any more.
            RuntimeError: it has been shut down.
        """
        self._attendance.wait(
            number,
            timeout,
            want=lambda: self._call(lambda: self._want(number)),
            check=self._check_running,
        )

    def _check_running(self) -> None:
        if self.broken:
            raise self.broken.with_traceback(None)
        if self._wakeup is None or self._closing:
            raise RuntimeError("the pool has been shut down")

    def close(self, *, cancel: bool = False) -> None:
        """End when the tasks handed over are done; `cancel` drops those not sent."""
        self._call(lambda: self._close_when_done(cancel))

    def abort(self, reason: BaseException, *, kill: bool = False) -> None:
        """End now: queued tasks are cancelled, running ones fail for this reason.

        Workers are sent SIGTERM, or SIGKILL if `kill`.
        """
        self._call(lambda: self._end(reason, kill))

    def kill(self, task: Task) -> None:
        """End a task, whether or not it is running."""
        self._call(lambda: self._kill(task))

    def forget_share(self, key: bytes) -> None:
        """Have workers drop a shared object. Any thread, even in garbage collection."""
        if self._wakeup is not None and self._pid == os.getpid():
            self._inbox.append(lambda: self._dispatcher.forget_share(key))
            self._wake()

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        """The workers that are ready, oldest first."""
        return self._attendance.infos()

    @property
    def refused(self) -> Mapping[str, int]:
        """How many connections were refused over TCP with keys since `start`, by reason."""
        refused: Counter[str] = Counter()
        for channels in self._channels:
            refused.update(channels.refused)
        return refused

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end of the thread, at most `timeout` seconds; say if it came."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def end_at_exit(self) -> None:
        """The interpreter exits: do what is to be done before it may."""
        if self._pid != os.getpid():
            return  # a forked child has no such thread
        self.exiting = True
        if self._options.finish_at_exit and not _interrupted():
            self.close()
        else:
            self.abort(CancelledError("the interpreter exits"))
        self.join()

    def _call(self, action: Callable[[], None]) -> None:
        if self._thread.is_alive():
            self._inbox.append(action)
            self._wake()

    def _look_soon(self) -> None:
        """A connection was lost, of a worker perhaps. Any thread may call it."""
        self._call(lambda: self._roster.look_soon(time.monotonic()))

    def _wake(self) -> None:
        if (wakeup := self._wakeup) is not None:
            wakeup.set()

    # ---------------------------------------------------------------- the loop

    def _run(self) -> None:
        try:
            self._open()
        except BaseException as error:
            self._wakeup = None
            self._cleanup()
            self._let_go()
            self._opened.set_exception(error)
            return
        self._opened.set_result(None)
        try:
            while not self._done():
                self._step()
        except BaseException as error:  # a defect of ours: no future may hang for it
            logger.exception("the master thread failed")
            self._break(f"the master thread failed: {error!r}")
        finally:
            self._shut()

    def _step(self) -> None:
        handlers = self._handlers
        for descriptor in self._wait():
            if descriptor in handlers:  # the supervisor's may just have been replaced
                handlers[descriptor]()
        if self._inbox:
            self._read_inbox()
        now = time.monotonic()
        if self._due is not None and self._due <= now:
            self._check_deadlines(now)
        self._decide(now)
        self._dispatcher.confirm()
        if self._answered or self._swept:
            self._finish_answered()

    def _answer_bell(self) -> None:
        """Take the results of those workers that say that they have some."""
        assert self._bell
        for pid in self._bell.rung_by():
            for peer in self._roster.of_process(pid):
                self._read_journal(peer)

    def _bar(self, barred: bool) -> None:
        """Whether the group's workers must not connect for now."""
        for channels in self._channels:
            if channels.entrance.group_only:
                channels.bar(barred)

    def _check_deadlines(self, now: float) -> None:
        self._fleet.check_deadlines(now)
        self._recalls.check(now)
        self._stops.check(now)
        for task in self._retries.due(now):
            self._scheduler.submit(task, now)
        if self._roster.next_ping is not None and self._roster.next_ping <= now:
            self._roster.ping(now)
        if self._roster.next_look is not None and self._roster.next_look <= now:
            self._roster.see_off(now)
        if self._segments and self._segments.trim_at and self._segments.trim_at <= now:
            self._segments.trim()

    def _decide(self, now: float) -> None:
        for decision in self._scheduler.decide(now):
            self._dispatcher.carry_out(decision)

    def _open(self) -> None:
        self._channels: list[Channels] = []
        try:
            for entrance in self._options.entrances:
                if entrance.bell:
                    self._bell = Bell(entrance.bell)
                self._channels.append(Channels(entrance, self._look_soon))
        except BaseException:
            self._close_channels()
            raise
        lost_after = min(entrance.lost_after for entrance in self._options.entrances)
        self._roster = Roster(lost_after * PINGED_AFTER, self._fleet, self._lose)
        self._dispatcher = self._make_dispatcher()
        # Sockets first: what workers have said comes before the news that they are dead.
        for channels in self._channels:
            for descriptor, socket, handle in (
                (channels.work_fd, channels.work, self._on_work),
                (channels.control_fd, channels.control, self._on_control),
            ):
                read = partial(channels.read, socket, partial(handle, channels))
                self._watch(descriptor, read)
        assert self._wakeup is not None
        self._watch(self._wakeup.fileno(), self._wakeup.clear)
        self._watch(self._roster.fileno(), self._roster.read_deaths)
        if self._bell:
            self._watch(self._bell.fileno(), self._answer_bell)
        self._fleet.start()
        if self._fleet.failure:  # of which no descriptor will tell
            self._break(self._fleet.failure)
        self._watch_fleet()

    def _watch(self, descriptor: int, handle: Callable[[], object]) -> None:
        """Have it called whenever the descriptor, unless that is -1, is readable."""
        if descriptor != -1:
            self._handlers[descriptor] = handle
            self._poller.register(descriptor, select.POLLIN)

    def _make_dispatcher(self) -> Dispatcher:
        return Dispatcher(
            self._roster,
            self._fleet,
            self._stops,
            self._recalls,
            lose=self._lose,
            read_journal=self._read_journal,
            endpoint=self._options.entrances[-1].endpoint,
            patience=self._options.patience,
        )

    def _wait(self) -> list[int]:
        """Wait for the next event or deadline; which descriptors are ready."""
        self._nap = [None]
        timeout: int | None = None
        unread = [fd for channels in self._channels if channels.used for fd in channels.unread()]
        if self._inbox or unread:
            timeout = 0
            self._due = 0.0  # look at all deadlines: none was computed
        else:
            deadlines = [
                deadline
                for deadline in (
                    self._scheduler.next_deadline(),
                    self._fleet.next_deadline(),
                    self._recalls.next_deadline(),
                    self._stops.next_deadline(),
                    self._retries.next_deadline(),
                    self._roster.next_ping,
                    self._roster.next_look,
                    self._segments.trim_at if self._segments else None,
                )
                if deadline is not None
            ]
            self._due = min(deadlines) if deadlines else None
            if self._due is not None:
                # Rounded up to whole milliseconds: not to wake just before the time.
                seconds = min(LONGEST_WAIT, self._due - time.monotonic())
                timeout = max(0, math.ceil(seconds * 1000))
        try:
            if timeout != 0:
                self._make_offer()
            ready = self._poller.poll(timeout)
        finally:
            self._nap = []
            if self._offer is not None:
                self._withdraw_offer(self._offer)
        return [*unread, *(descriptor for descriptor, _ in ready)]

    def _make_offer(self) -> None:
        if self.broken:
            return
        state = self._scheduler.spare_worker()
        peer = self._roster.get(state.key) if state else None
        if state and peer and peer.mailed:
            self._offer = Offer(peer, state.lanes[0].service, state.next_seq)

    def _withdraw_offer(self, offer: Offer) -> None:
        """Before anything else happens: what it has brought counts as sent."""
        self._offer = None
        if (task := offer.withdraw()) is not None:
            assert offer.peer.state
            self._scheduler.sent(offer.peer.state, task, time.monotonic())
            self._dispatcher.take_up(offer, task)

    def _watch_fleet(self) -> None:
        """Poll the supervisor that is there now: call it when that may have changed."""
        old, new = self._fleet.polled, self._fleet.fileno()
        if old != new:
            if old != -1:
                self._poller.unregister(old)
                del self._handlers[old]
            self._watch(new, self._read_fleet)
            self._fleet.polled = new

    def _read_inbox(self) -> None:
        inbox, scheduler, now = self._inbox, self._scheduler, time.monotonic()
        for _ in range(len(inbox)):
            item = inbox.popleft()
            if not isinstance(item, Task):
                item()
            elif self.broken:
                item.fail(self.broken)
            else:
                scheduler.submit(item, now)

    # ------------------------------------------------------- events of workers

    def _on_control(
        self, channels: Channels, identity: bytes, frame: Frame, _: list[Frame]
    ) -> None:
        message = protocol.decode_control_to_master(frame)
        if isinstance(message, protocol.Hello):
            self._roster.register(channels, identity, message)
            return
        if isinstance(message, (protocol.Ask, protocol.Call)):
            self._clients.on_message(channels, identity, message)
            return
        peer = self._roster.get(identity)
        if peer is None or peer.channels is not channels:
            self._expel(channels, identity)
        elif isinstance(message, protocol.Unready):
            if peer.grouped:
                self._fleet.stop()  # first: then all that it has logged is there
                self._break(message.reason)
            else:
                logger.warning("worker %s left: %s", peer.hello.worker, message.reason)
                self._lose(peer, 0)
        elif isinstance(message, protocol.Stack):
            self._stops.on_stack(peer, message.text, time.monotonic())
        elif not peer.state:
            raise ProtocolError("a worker that is not ready cannot be worn")
        else:
            logger.info("worker %d is replaced: %s", peer.hello.pid, message.reason)
            self._scheduler.wear_out(peer.state)

    def _on_work(
        self, channels: Channels, identity: bytes, frame: Frame, buffers: list[Frame]
    ) -> None:
        message = protocol.decode_work_from_worker(frame)
        peer = self._roster.get(identity)
        if peer is None or peer.channels is not channels:
            self._expel(channels, identity)
            return
        if isinstance(message, protocol.Results):
            if peer.state is None:
                raise ProtocolError("results from a worker that is not ready")
            self._read_journal(peer)  # what comes before it
            peer.received(message.position)
            if message.confirm:
                self._dispatcher.waits(peer)
            self._on_results(peer, message.results, buffers)
        elif isinstance(message, protocol.Ready):
            self._on_ready(peer)
        else:
            self._lose(peer, message.abandoned)

    def _expel(self, channels: Channels, identity: bytes) -> None:
        """From a worker that was taken for lost, or of another master, or a stranger."""
        channels.tell(identity, protocol.Expelled())

    def _on_ready(self, peer: Peer) -> None:
        if peer.state is not None:
            raise ProtocolError("a worker was ready before")
        peer.state = self._scheduler.worker_ready(
            peer.identity,
            time.monotonic(),
            services=peer.hello.services,
            grouped=peer.grouped,
            ahead=peer.journal is not None,
            allowance=self._options.allowance,
        )
        peer.since = time.time()
        if peer.grouped:
            self._fleet.worker_ready(peer.hello.pid)
        self._attendance.come(peer)

    def _on_results(
        self, peer: Peer, results: Sequence[protocol.Result], buffers: list[Frame]
    ) -> None:
        assert peer.state is not None
        tasks = self._scheduler.results(peer.state, results, time.monotonic())
        done = taken = 0
        for task, result in zip(tasks, results, strict=True):
            frames = buffers
            if buffers:
                frames = buffers[taken : taken + result.buffers]
                taken += result.buffers
            if task is not None:
                done += 1
                if not result.ok:
                    self._counts.failed += 1
                if task.lease is not None:
                    task.lease.returned(result.kept)
                self._answered.append((task, result, frames))
        self._counts.done += done
        peer.done += done
        if results:
            peer.finished = max(peer.finished, results[-1].seq)
        self._dispatcher.settle(peer)

    def _finish_answered(self) -> None:
        """Complete the tasks whose results have come, when all else of this step is done.

        Workers have their next jobs by then, and the thread that waits for a future gets
        the interpreter's lock as soon as this one waits again.
        """
        answered, self._answered = self._answered, []
        for task, result, frames in answered:
            if (error := task.finish(result, frames)) is not None:
                self._fail(task, error)
        while self._swept and self._segments:
            self._segments.sweep(self._swept.pop())  # not before: results may be in segments

    def _read_journal(self, peer: Peer) -> None:
        """Take results that the worker has written down but that have not come."""
        if peer.journal and peer.state:
            results = []
            for entry in peer.journal.read():
                result = protocol.decode_result(entry)
                if result.buffers:
                    # It comes as a message, or not at all; it is not confirmed before.
                    peer.finished = max(peer.finished, result.seq)
                    break
                results.append(result)
            if results:
                self._on_results(peer, results, [])

    def _taken_back(self, peer: Peer, seqs: list[int]) -> None:
        assert peer.state
        doomed = peer.doomed()
        self._scheduler.recalled(peer.state, seqs)
        self._dispatcher.settle(peer)
        _kill_queued(doomed)

    # -------------------------------------------------------- deaths, the group

    def _read_fleet(self) -> None:
        for event in self._fleet.receive():
            if isinstance(event, protocol.Reaped):
                self._roster.lose_process(event.pid)
                self._fleet.reaped(event)
        if self._fleet.supervisor_died():
            # Its workers cannot be handed to another: they are killed, and replaced.
            self._fleet.restart()
            self._roster.lose_unwatched()
        if self._fleet.failure and not self.broken:
            self._break(self._fleet.failure)
        self._watch_fleet()

    def _lose(self, peer: Peer, running: int | None) -> None:
        """A worker is gone; `running` is 0 if it is known to have run nothing."""
        if self._roster.get(peer.identity) is not peer:
            return
        self._read_journal(peer)
        if running is None:
            running = peer.last_run()
        self._roster.remove(peer)
        self._stops.forget(peer)
        self._recalls.forget(peer)
        self._dispatcher.lost(peer)
        if peer.state:
            doomed = peer.doomed()
            lost = self._scheduler.worker_lost(peer.state, running, time.monotonic())
            if lost is not None:
                self._bury(peer, lost)
            _kill_queued(task for task in doomed if task is not lost)
            self._attendance.leave(peer)
        if self._segments and peer.grouped:
            self._swept.append(peer.hello.pid)
        peer.close()

    def _bury(self, peer: Peer, task: Task) -> None:
        """A worker died while it ran this task."""
        self._counts.lost += 1
        if (error := self._stops.why_ended(peer, task)) is not None:
            self._fail(task, error)
        elif task.doomed:
            task.kill()  # it died by itself before we came to it
        else:
            began = peer.journal.started if peer.journal else peer.sent_at
            seconds, pid = time.monotonic() - began, peer.hello.pid
            if peer.grouped:
                self._fleet.bury(task, pid, seconds)
            else:
                host = peer.hello.host
                self._fail(
                    task, lost_error(task.name, pid, None, seconds, replaced=False, host=host)
                )

    def _fail(self, task: Task, error: BaseException) -> None:
        """A task has failed: the end of it, unless it is to be tried again."""
        last = self._ended or self._cancelling or self.broken
        delay = None if last else task.retry_after(error)
        if delay is None:
            task.fail(error)
        else:
            self._retries.add(task, time.monotonic() + delay)

    def _kill(self, task: Task) -> None:
        if task.future.done():
            return
        peer = self._roster.get(task.worker.key) if task.worker else None
        if peer is None:
            self._retries.drop(task)
            task.kill()  # and if it is queued, it will not be sent
        else:
            task.doomed = True
            self._stops.end(peer, time.monotonic())

    def _kill_worker(self, peer: Peer) -> None:
        if peer.state:
            self._scheduler.drain(peer.state)  # until it is dead, it may look idle
        self._roster.kill(peer)

    def _give_up(self, peer: Peer) -> None:
        """It has outlived its kill: whatever it is doing, it does it for nobody."""
        self._expel(peer.channels, peer.identity)
        self._lose(peer, None)

    def _equip(self, setup: bytes) -> None:
        for channels in self._channels:
            if channels.setup is None:
                channels.setup = setup
        self._roster.equipped()

    def _want(self, workers: int) -> None:
        """Have as many of the group's workers as this takes."""
        self._scheduler.want(workers - self._attendance.joined())

    # ---------------------------------------------------------------- the end

    def _close_when_done(self, cancel: bool) -> None:
        self._closing = True
        self._attendance.tell()
        self._drop_unwanted()
        if cancel:
            self._cancelling = True
            for task in self._retries.take_all():
                task.cancel()
            self._decide(time.monotonic())
            # Those for which a worker is being started count as sent already.
            for task in self._scheduler.cancel_queued(keep=self._scheduler.starting):
                task.cancel()

    def _drop_unwanted(self) -> None:
        """Let nothing wait for tasks that were cancelled while no worker was there."""
        self._scheduler.drop_unwanted(time.monotonic())

    def _end(self, reason: BaseException, kill: bool) -> None:
        self._closing = self._ended = True
        if kill:
            self._fleet.kill()
        for peer in self._roster:
            if peer.channels.entrance.python and peer.state and peer.state.held:
                peer.tell(protocol.Die())  # nobody wants what it does
                self._dying.append(peer)
        for task in self._scheduler.cancel_queued():
            task.cancel()
        self._fail_held(reason)

    def _break(self, reason: str) -> None:
        if self.broken is None:
            self.broken = BrokenPoolError(f"the pool cannot run tasks any more: {reason}")
        self._attendance.tell()
        for task in self._scheduler.cancel_queued():
            task.fail(self.broken)
        self._fail_held(self.broken)
        self._fleet.stop()
        self._watch_fleet()

    def _fail_held(self, reason: BaseException) -> None:
        for peer in self._roster:
            if peer.state:
                for task, _ in peer.state.held.values():
                    task.fail(reason)
                peer.state.held.clear()
        self._fleet.fail_lost(reason)
        for task in self._retries.take_all():
            task.fail(reason)

    def _done(self) -> bool:
        if self._ended:
            return True
        if not self._closing or self._inbox or self._fleet.waiting or self._retries:
            return False
        return (len(self._scheduler) == 0 and self._scheduler.busy == 0) or self.broken is not None

    def _shut(self) -> None:
        """Let the group's workers go, and close everything."""
        self._closing = True
        self._finish_answered()
        try:
            if self._fleet.group and not self._ended and not self.broken:
                self._fleet.keep_no_more()
                for peer in self._roster:
                    if peer.grouped:
                        peer.tell(protocol.Drain())
                self._fleet.leave(self._roster.see_out(WAIT_FOR_EXIT))
            self._fleet.stop()
            self._see_them_die()
        finally:
            self._roster.close()
            self._close_channels()
            self._wakeup = None  # closed when no other thread is in the middle of using it
            self._attendance.clear()
            self._drop_inbox()
            self._cleanup()
            self._let_go()

    def _close_channels(self) -> None:
        for channels in self._channels:
            channels.close()
        if self._bell:
            self._bell.close()

    def _see_them_die(self) -> None:
        """Wait for the workers that were told to, a little.

        Who is told, and sees the connection end before it has read that, never reads it:
        ZeroMQ drops it (`ZMQ_IMMEDIATE`).
        """
        deadline = time.monotonic() + LAST_WORDS
        while self._dying and time.monotonic() < deadline:
            self._dying = [peer for peer in self._dying if peer.tell(protocol.Ping())]
            time.sleep(0.005)
        self._dying.clear()

    def _let_go(self) -> None:
        """Break the cycles of references: nothing should wait for a garbage collection."""
        self._fleet = Fleet(None)
        self._handlers.clear()  # a traceback that somebody keeps may lead to it
        for name in ("_recalls", "_stops", "_roster", "_dispatcher", "_clients"):
            vars(self).pop(name, None)
        if self._segments:
            self._segments.on_idle = int

    def _drop_inbox(self) -> None:
        """After the end of the loop: complete what came too late. Any thread may do it."""
        while True:
            try:
                item = self._inbox.popleft()
            except IndexError:
                return
            if isinstance(item, Task):
                item.fail(self.broken or CancelledError("the pool has been shut down"))


def _kill_queued(tasks: Iterable[Task]) -> None:
    """Complete those that no worker holds now; when their turn comes they are not sent."""
    for task in tasks:
        if task.worker is None:
            task.kill()


def _interrupted() -> bool:
    """Whether the program ends because of Ctrl-C, after which nobody wants to wait."""
    return getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1")


_running: weakref.WeakSet[Master] = weakref.WeakSet()


def _end_all() -> None:
    for master in list(_running):
        master.end_at_exit()


# Before the interpreter waits for threads, as concurrent.futures does it; what
# `atexit` offers comes too late to finish work that needs threads.
threading._register_atexit(_end_all)  # type: ignore[attr-defined]
