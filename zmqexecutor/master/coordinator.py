"""What the master does about each event: it has the scheduler decide, and carries that out.

    messages of workers ─► on_control, on_work ─┐                ┌─► dispatcher ─► workers
    results in journals ─► read_journal ────────┼─► scheduler ───┤
    deaths, the group ───► lose, read_fleet ────┤   (decide)     └─► fleet: more workers
    tasks, requests ─────► submit, kill, ... ───┘
                                                 futures ◄─ finish ◄─ results, losses

It has no thread and no poll of its own, and waits for nothing before `see_out`, which makes it
possible to take its steps one by one in a test: `loop` calls it, in the master thread, with what
has happened.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from ..errors import BrokenPoolError, ProtocolError
from ..wire import protocol
from ..wire.buffers import Segments
from ..wire.protocol import DEFAULT_SERVICE, Frame
from .attendance import Attendance
from .certificate import lost_error
from .channels import Channels, Entrance
from .clients import Clients, Counts, report
from .dispatch import Dispatcher
from .fleet import WAIT_FOR_EXIT, Fleet, Group
from .inbox import late_error
from .offers import Offer
from .peers import Peer
from .recalls import Recalls
from .retries import Retries
from .roster import Roster
from .scheduler import Scheduler
from .stops import Stops
from .tasks import Task

__all__ = ["Coordinator", "MasterOptions"]

logger = logging.getLogger(__name__)

PINGED_AFTER: Final = 0.25
"""Part of the time until a silent worker is lost, for a look whether ZeroMQ has noticed."""
LAST_WORDS: Final = 0.5
"""Seconds that the sockets stay open at most, at the end, for workers elsewhere to die."""


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


class Coordinator:
    """Used by the master thread only, but for what is said to be for any thread."""

    def __init__(
        self,
        options: MasterOptions,
        group: Group | None = None,
        watch_group: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin without workers and tasks.

        Args:
            options: what it needs to know.
            group: the supervised group of workers that it looks after, if any.
            watch_group: called when the descriptor that tells of the group's news may be
                another one now.
        """
        self._options = options
        self._watch_group = watch_group
        self._segments = options.segments
        self._scheduler: Scheduler[Task] = Scheduler(
            max_workers=options.max_workers,
            wanted=min(1, options.max_workers),
            patience=options.patience,
            lenient=options.lenient,
            service=options.service,
        )
        self.fleet = Fleet(group, self._fail, self._bar)
        self._retries = Retries()
        self._recalls = Recalls(self.read_journal, self._taken_back)
        self._stops = Stops(
            read_journal=self.read_journal,
            ask_stack=lambda peer: peer.tell(protocol.ShowStack()),
            recall=self._recalls.ask,
            kill=self._kill_worker,
            give_up=self._give_up,
        )
        lost_after = min(entrance.lost_after for entrance in options.entrances)
        self.roster = Roster(lost_after * PINGED_AFTER, self.fleet, self.lose, self._drain)
        self._dispatcher = Dispatcher(
            self.roster,
            self.fleet,
            self._stops,
            self._recalls,
            lose=self.lose,
            read_journal=self.read_journal,
            endpoint=options.entrances[-1].endpoint,
            patience=options.patience,
        )
        self._counts = Counts()
        self._clients = Clients(
            submit=lambda task: self.submit(task, time.monotonic()),
            tell_state=lambda: report(
                self._counts, self._scheduler.lanes(), self.roster, self.channels
            ),
        )
        self._dying: list[Peer] = []  # workers elsewhere that were told to
        self._answered: deque[tuple[Task, protocol.Result, list[Frame]]] = deque()
        self._swept: list[int] = []  # dead processes whose segments nobody needs after that
        self._cancelling = False  # nothing is tried again
        self._ended = False
        self.channels: list[Channels] = []
        """Of the entrances, once they are open. Any thread may look."""
        self.attendance = Attendance()
        """The workers that are ready. For any thread."""
        self.closing = False
        """Whether it ends when all is done. Any thread may look."""
        self.broken = ""
        """Why no task can run any more, once that is so. Any thread may look."""

    # ------------------------------------------------------------------ steps

    def submit(self, task: Task, now: float) -> None:
        """A task has come."""
        if self.broken or self._ended:
            task.fail(late_error(self.broken))
        else:
            self._scheduler.submit(task, now)

    def decide(self, now: float) -> None:
        """Have done what follows from all that has happened."""
        for decision in self._scheduler.decide(now):
            self._dispatcher.carry_out(decision)

    def confirm(self) -> None:
        """Answer the workers that wait for a word, when they have not got any."""
        self._dispatcher.confirm()

    def next_deadline(self) -> float | None:
        """When `check_deadlines` must be called, even if nothing happens."""
        deadlines = [
            deadline
            for deadline in (
                self._scheduler.next_deadline(),
                self.fleet.next_deadline(),
                self._recalls.next_deadline(),
                self._stops.next_deadline(),
                self._retries.next_deadline(),
                self.roster.next_ping,
                self.roster.next_look,
                self.roster.next_kill,
                self._segments.trim_at if self._segments else None,
            )
            if deadline is not None
        ]
        return min(deadlines) if deadlines else None

    def check_deadlines(self, now: float) -> None:
        """Do what is due."""
        self.fleet.check_deadlines(now)
        self._recalls.check(now)
        self._stops.check(now)
        for task in self._retries.due(now):
            self._scheduler.submit(task, now)
        if self.roster.next_ping is not None and self.roster.next_ping <= now:
            self.roster.ping(now)
        if self.roster.next_look is not None and self.roster.next_look <= now:
            self.roster.see_off(now)
        if self.roster.next_kill is not None and self.roster.next_kill <= now:
            self.roster.kill_overdue(now)
        trim_at = self._segments.trim_at if self._segments else None
        if self._segments and trim_at is not None and trim_at <= now:
            self._segments.trim()

    def make_offer(self) -> Offer | None:
        """An idle worker, for a thread that submits a task while the master thread sleeps."""
        state = None if self.broken else self._scheduler.spare_worker()
        peer = self.roster.get(state.key) if state else None
        if state and peer and peer.mailed:
            return Offer(peer, state.lanes[0].service, state.next_seq)
        return None

    def withdraw(self, offer: Offer) -> None:
        """Before anything else happens: what the offer has brought counts as sent."""
        if (task := offer.withdraw()) is not None:
            assert offer.peer.state
            self._scheduler.sent(offer.peer.state, task, time.monotonic())
            self._dispatcher.take_up(offer, task)

    # ------------------------------------------------------- events of workers

    def on_control(self, channels: Channels, identity: bytes, frame: Frame, _: list[Frame]) -> None:
        """A message on the control socket.

        Raises:
            ProtocolError: it makes no sense, and nothing was done.
        """
        message = protocol.decode_control_to_master(frame)
        if isinstance(message, protocol.Hello):
            self.roster.register(channels, identity, message)
            return
        if isinstance(message, (protocol.Ask, protocol.Call)):
            self._clients.on_message(channels, identity, message)
            return
        peer = self.roster.get(identity)
        if peer is None or peer.channels is not channels:
            self._expel(channels, identity)
        elif isinstance(message, protocol.Unready):
            if peer.grouped:
                self.fleet.stop()  # first: then all that it has logged is there
                self.break_off(message.reason)
            else:
                logger.warning("worker %s left: %s", peer.hello.worker, message.reason)
                self.lose(peer, 0)
        elif isinstance(message, protocol.Stack):
            self._stops.on_stack(peer, message.text, time.monotonic())
        elif not peer.state:
            raise ProtocolError("a worker that is not ready cannot be worn")
        else:
            logger.info("worker %d is replaced: %s", peer.hello.pid, message.reason)
            self._scheduler.wear_out(peer.state)

    def on_work(
        self, channels: Channels, identity: bytes, frame: Frame, buffers: list[Frame]
    ) -> None:
        """A message on the work socket.

        Raises:
            ProtocolError: it makes no sense, and nothing was done.
        """
        message = protocol.decode_work_from_worker(frame)
        peer = self.roster.get(identity)
        if peer is None or peer.channels is not channels:
            self._expel(channels, identity)
            return
        if isinstance(message, protocol.Results):
            if peer.state is None:
                raise ProtocolError("results from a worker that is not ready")
            self.read_journal(peer)  # what comes before it
            peer.received(message.position)
            if message.confirm:
                self._dispatcher.waits(peer)
            self._on_results(peer, message.results, buffers)
        elif isinstance(message, protocol.Ready):
            self._on_ready(peer)
        else:
            self.lose(peer, message.abandoned)

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
            self.fleet.worker_ready(peer.hello.pid)
        self.attendance.come(peer)

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

    def finish(self) -> None:
        """Complete the tasks whose results have come, when all else of this step is done.

        Workers have their next jobs by then, and the thread that waits for a future gets
        the interpreter's lock as soon as this one waits again.
        """
        answered = self._answered
        while answered:
            task, result, frames = answered.popleft()
            if (error := task.finish(result, frames)) is not None:
                self._fail(task, error)
        while self._swept and self._segments:
            self._segments.sweep(self._swept.pop())  # not before: results may be in segments

    def read_journal(self, peer: Peer) -> None:
        """Take results that the worker has written down but that have not come."""
        if peer.journal and peer.state:
            results = []
            frames: list[Frame] = []
            for entry, buffers in peer.journal.read():
                result = protocol.decode_result(entry)
                if result.buffers != len(buffers):
                    # It comes as a message, or not at all; it is not confirmed before.
                    peer.finished = max(peer.finished, result.seq)
                    break
                results.append(result)
                if buffers:
                    frames += buffers
            if results:
                self._on_results(peer, results, frames)

    def _taken_back(self, peer: Peer, seqs: list[int]) -> None:
        assert peer.state
        doomed = peer.doomed()
        self._scheduler.recalled(peer.state, seqs)
        self._dispatcher.settle(peer)
        _kill_queued(doomed)

    # -------------------------------------------------------- deaths, the group

    def start_group(self) -> None:
        """Have the group started; if it cannot be, the pool is broken."""
        self.fleet.start()
        if self.fleet.failure:  # of which no descriptor will tell
            self.break_off(self.fleet.failure)
        self._watch_group()

    def read_fleet(self) -> None:
        """The group has news."""
        for event in self.fleet.receive():
            if isinstance(event, protocol.Reaped):
                self.roster.lose_process(event.pid)
                self.fleet.reaped(event)
        if self.fleet.supervisor_died():
            # Its workers cannot be handed to another: they are killed, and replaced.
            self.fleet.restart()
            self.roster.lose_unwatched()
        if self.fleet.failure and not self.broken:
            self.break_off(self.fleet.failure)
        self._watch_group()

    def lose(self, peer: Peer, running: int | None) -> None:
        """A worker is gone; `running` is 0 if it is known to have run nothing."""
        if self.roster.get(peer.identity) is not peer:
            return
        self.read_journal(peer)
        if running is None:
            running = peer.last_run()
        self.roster.remove(peer)
        self._stops.forget(peer)
        self._recalls.forget(peer)
        self._dispatcher.nothing_to_tell(peer)
        if peer.state:
            doomed = peer.doomed()
            lost = self._scheduler.worker_lost(peer.state, running, time.monotonic())
            if lost is not None:
                self._bury(peer, lost)
            _kill_queued(task for task in doomed if task is not lost)
            self.attendance.leave(peer)
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
                self.fleet.bury(task, pid, seconds)
            else:
                host = peer.hello.host
                self._fail(
                    task, lost_error(task.name, pid, None, seconds, replaced=False, host=host)
                )

    def _fail(self, task: Task, error: BaseException) -> None:
        """A task has failed: the end of it, unless it is to be tried again."""
        delay = None
        if not (self._ended or self._cancelling or self.broken):
            try:
                delay = task.retry_after(error)
            except Exception as problem:  # of a class in the user's `retry_on`
                BaseException.__setattr__(problem, "__cause__", error)  # it may be frozen
                error = problem
        if delay is None:
            task.fail(error)
        else:
            self._retries.add(task, time.monotonic() + delay)

    def kill(self, task: Task) -> None:
        """End a task, whether or not it is running."""
        if task.future.done():
            return
        peer = self.roster.get(task.worker.key) if task.worker else None
        if peer is None:
            self._retries.drop(task)
            task.kill()  # and if it is queued, it will not be sent
        else:
            task.doomed = True
            self._stops.end(peer, time.monotonic())

    def _drain(self, peer: Peer) -> None:
        if peer.state:
            self._scheduler.drain(peer.state)

    def _kill_worker(self, peer: Peer) -> None:
        self._drain(peer)  # until it is dead, it may look idle
        self.roster.kill(peer)

    def _give_up(self, peer: Peer) -> None:
        """It has outlived its kill: whatever it is doing, it does it for nobody."""
        self._expel(peer.channels, peer.identity)
        self.lose(peer, None)

    def forget_share(self, key: bytes) -> None:
        """Have workers drop a shared object."""
        self._dispatcher.forget_share(key)

    def equip(self, setup: bytes) -> None:
        """Say, once, what workers must prepare, for the entrances that have left it open."""
        for channels in self.channels:
            if channels.setup is None:
                channels.setup = setup
        self.roster.equipped()

    def want(self, workers: int) -> None:
        """Have as many of the group's workers as this takes."""
        self._scheduler.want(workers - self.attendance.joined())

    def _bar(self, barred: bool) -> None:
        """Whether the group's workers must not connect for now."""
        for channels in self.channels:
            if channels.entrance.group_only:
                channels.bar(barred)

    # ---------------------------------------------------------------- the end

    def close_when_done(self, cancel: bool) -> None:
        """Be done when all tasks are; `cancel` drops those not sent."""
        self.closing = True
        self.attendance.tell()
        self._drop_unwanted()
        if cancel:
            self._cancelling = True
            for task in self._retries.take_all():
                task.cancel()
            self.decide(time.monotonic())
            # Those for which a worker is being started count as sent already.
            for task in self._scheduler.cancel_queued(keep=self._scheduler.starting):
                task.cancel()

    def _drop_unwanted(self) -> None:
        """Let nothing wait for tasks that were cancelled while no worker was there."""
        self._scheduler.drop_unwanted(time.monotonic())

    def end(self, reason: BaseException, kill: bool) -> None:
        """Be done now: queued tasks are cancelled, those with workers fail.

        Args:
            reason: what they fail with.
            kill: whether the group's processes are killed at once.
        """
        self.closing = self._ended = True
        self.attendance.tell()
        if kill:
            self.fleet.kill()
        for peer in self.roster:
            if peer.channels.entrance.python and peer.state and peer.state.held:
                peer.tell(protocol.Die())  # nobody wants what it does
                self._dying.append(peer)
        for task in self._scheduler.cancel_queued():
            task.cancel()
        self._fail_held(reason)

    def break_off(self, reason: str) -> None:
        """No task can run any more: all that there are fail."""
        self.broken = self.broken or f"the pool cannot run tasks any more: {reason}"
        error = BrokenPoolError(self.broken)
        self.attendance.tell()
        for task in self._scheduler.cancel_queued():
            task.fail(error)
        self._fail_held(error)
        self.fleet.stop()
        self._watch_group()

    def _fail_held(self, reason: BaseException) -> None:
        for peer in self.roster:
            if peer.state:
                for task, _ in peer.state.held.values():
                    task.fail(reason)
                peer.state.held.clear()
        self.fleet.fail_lost(reason)
        for task in self._retries.take_all():
            task.fail(reason)

    def done(self, unread: bool = False) -> bool:
        """Whether there is nothing more to do, or to wait for.

        Args:
            unread: whether other threads have left something.
        """
        if self._ended:
            return True
        if not self.closing or unread or self.fleet.waiting or self._retries:
            return False
        return (len(self._scheduler) == 0 and self._scheduler.busy == 0) or self.broken != ""

    def see_out(self) -> None:
        """Let the group's workers go, if it is not too late for that, and stop the group."""
        self.closing = True
        self.finish()
        if self.fleet.group and not self._ended and not self.broken:
            self.fleet.scale(0)
            for peer in self.roster:
                if peer.grouped:
                    peer.tell(protocol.Drain())
            self.fleet.leave(self.roster.see_out(WAIT_FOR_EXIT))
        self.fleet.stop()
        self._see_them_die()

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

    def let_go(self) -> None:
        """Break the cycles of references: nothing should wait for a garbage collection."""
        self.fleet = Fleet(None)
        self._watch_group = lambda: None
        for name in ("_recalls", "_stops", "roster", "_dispatcher", "_clients"):
            vars(self).pop(name, None)


def _kill_queued(tasks: Iterable[Task]) -> None:
    """Complete those that no worker holds now; when their turn comes they are not sent."""
    for task in tasks:
        if task.worker is None:
            task.kill()
