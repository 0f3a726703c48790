"""Ends single tasks: those that run for too long, and those that nobody wants any more.

A task cannot be ended but with its worker. So that the kill hits no other one, the
worker is first told, through its journal, to start nothing after this task:

    look(worker) ── its task is over its time, or unwanted
      │
      ├─ condemn, and ask where it is ─► `Stack`, or a moment ─► still in it?
      │                                                          yes: kill
      │                                                          no: let it go on
      └─ not there yet: look again when it may be

A worker that does not begin with what it was sent, since it is stopped for example, would let
a task with a time limit wait for ever. If it does not answer for ten seconds either, it is
condemned and killed in the same way; what it held runs elsewhere.

The death itself is noticed as any other. `why_ended` then tells what the task's
future gets in the place of a WorkerLostError.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from typing import Final

from ..errors import TaskKilledError, TaskTimeoutError
from .peers import Peer, Stop
from .recalls import SETTLE
from .tasks import Task

__all__ = ["Stops"]

STACK_WAIT: Final = 1.0
"""Seconds that a worker has to say where its task is, before it is killed."""
RETRY: Final = 0.005
"""Seconds until the next look at a task that should end and has not been started."""
STALE_KEPT: Final = 64
"""Looks that nobody waits for, but that may stay until they are due."""
SILENT: Final = 10.0
"""Seconds after which a worker that has begun nothing and does not answer is killed.

One that only takes long to begin, as it imports what the task needs, answers, unless
it holds the interpreter's lock in native code for so long.
"""
UNKILLABLE: Final = 5.0
"""Seconds that the kernel has to end a killed process."""


class Stops:
    """Used by the master thread only."""

    def __init__(
        self,
        *,
        read_journal: Callable[[Peer], None],
        ask_stack: Callable[[Peer], object],
        recall: Callable[[Peer], object],
        kill: Callable[[Peer], None],
        give_up: Callable[[Peer], None],
    ) -> None:
        """Prepare.

        Args:
            read_journal: takes the results that have not come as messages.
            ask_stack: asks a worker where it is, to be answered by `on_stack`.
            recall: takes back the jobs that it has not started.
            kill: kills it.
            give_up: takes it for lost, although its process is there.
        """
        self._read_journal = read_journal
        self._ask_stack = ask_stack
        self._recall = recall
        self._kill = kill
        self._give_up = give_up
        self._looks: list[tuple[float, int, Peer]] = []  # a heap
        self._stale = 0  # entries of it that nobody waits for any more
        self._numbers = itertools.count()

    def sent(self, peer: Peer, tasks: Iterable[Task], now: float) -> None:
        """A worker was sent these tasks."""
        limits = [task.options.timeout for task in tasks if task.options.timeout is not None]
        if limits:
            self._look_at(peer, now + min(limits))

    def end(self, peer: Peer, now: float) -> None:
        """One of the tasks that this worker holds is doomed."""
        self._look_at(peer, now)

    def on_stack(self, peer: Peer, text: str, now: float) -> None:
        """A worker has told where it is."""
        peer.heard_at = now
        if peer.stop is not None and not peer.stop.killed:
            peer.stop.stack = text
            peer.stop.look_at = now + SETTLE
            self._look_at(peer, now + SETTLE)

    def next_deadline(self) -> float | None:
        """When `check` must be called, even if nothing happens."""
        return self._looks[0][0] if self._looks else None

    def check(self, now: float) -> None:
        """Look at the workers whose time has come."""
        while self._looks and self._looks[0][0] <= now:
            due, _, peer = heapq.heappop(self._looks)
            if peer.look_at != due:
                self._stale -= 1  # there was an earlier look, or the worker is gone
                continue
            peer.look_at = None
            if peer.stop is not None:
                self._go_on(peer, peer.stop, now)
            else:
                self._look(peer, now)

    def why_ended(self, peer: Peer, task: Task) -> TaskTimeoutError | TaskKilledError | None:
        """The error of a task whose worker died, if that was our doing."""
        stop = peer.stop
        if stop is None or not stop.killed or stop.task is not task:
            return None
        if task.doomed:
            return TaskKilledError(f"{task.name} was ended after {stop.ran:.3g} s by its kill()")
        where = f". It was here:\n{stop.stack.rstrip()}" if stop.stack else ""
        return TaskTimeoutError(
            f"{task.name} was ended after {stop.ran:.3g} s, since its timeout is "
            f"{task.options.timeout:g} s{where}",
            job=task.name,
            seconds=stop.ran,
            stack=stop.stack,
        )

    def forget(self, peer: Peer) -> None:
        """A worker is lost."""
        self._drop_look(peer)

    def _look_at(self, peer: Peer, due: float) -> None:
        if peer.look_at is None or due < peer.look_at:
            self._drop_look(peer)
            peer.look_at = due
            heapq.heappush(self._looks, (due, next(self._numbers), peer))

    def _drop_look(self, peer: Peer) -> None:
        """Leave the entry where it is; when many are like that, take them all out."""
        if peer.look_at is None:
            return
        peer.look_at = None
        self._stale += 1
        if self._stale > STALE_KEPT and 2 * self._stale > len(self._looks):
            self._looks = [entry for entry in self._looks if entry[2].look_at == entry[0]]
            heapq.heapify(self._looks)
            self._stale = 0

    def _look(self, peer: Peer, now: float) -> None:
        """Find out whether a task of this worker should end, or when to look again."""
        if peer.state is None:
            return
        running, started = peer.running()
        unstarted = False
        for seq, (task, _) in peer.state.held.items():
            limit = task.options.timeout
            if seq == running:
                if task.doomed or (limit is not None and started + limit <= now):
                    self._begin(peer, task, now - started, now)
                    return
                if limit is not None:
                    self._look_at(peer, started + limit)
            elif task.doomed:
                unstarted = True
            elif limit is not None:
                self._look_at(peer, now + limit)
        if unstarted:
            self._recall(peer)
            self._look_at(peer, now + RETRY)
        if peer.state.held and running not in peer.state.held:
            self._look_at_silent(peer, now)

    def _look_at_silent(self, peer: Peer, now: float) -> None:
        """A worker has not begun with what it holds: if that has a time limit, is it there?"""
        assert peer.state is not None
        task = next(iter(peer.state.held.values()))[0]
        if task.options.timeout is None or task.doomed:
            return
        since = max(peer.state.progress, peer.heard_at)
        due = since + max(task.options.timeout, STACK_WAIT)
        if due <= now:
            if peer.asked_at <= since:
                peer.asked_at = now
                self._ask_stack(peer)
            due = peer.asked_at + SILENT
        if due <= now:
            peer.stop = Stop(task, 0.0, now + SETTLE, begun=False)
            peer.condemn(peer.stop.seq)
            due = peer.stop.look_at
        self._look_at(peer, due)

    def _begin(self, peer: Peer, task: Task, ran: float, now: float) -> None:
        wait = SETTLE
        if not task.doomed:
            self._ask_stack(peer)
            wait = STACK_WAIT
        peer.stop = Stop(task, ran, now + wait)
        peer.condemn(peer.stop.seq)
        self._look_at(peer, now + wait)

    def _go_on(self, peer: Peer, stop: Stop, now: float) -> None:
        if stop.look_at > now:
            self._look_at(peer, stop.look_at)
        elif stop.killed:
            self._give_up(peer)
        elif self._is_in(peer, stop, now):
            self._kill(peer)
            stop.killed = True
            stop.look_at = now + UNKILLABLE
            self._look_at(peer, stop.look_at)
        else:
            peer.stop = None
            peer.condemn(0)
            self._look(peer, now)

    def _is_in(self, peer: Peer, stop: Stop, now: float) -> bool:
        """Whether the worker still runs the task, for too long or unwanted; or is still silent."""
        self._read_journal(peer)
        if peer.state is None or stop.seq not in peer.state.held or stop.seq <= peer.finished:
            return False
        running, started = peer.running()
        if not stop.begun:
            return running not in peer.state.held and peer.heard_at < peer.asked_at
        if running != stop.seq:
            return False
        # Its start is looked at again: at first the worker may have stood still before it.
        limit = stop.task.options.timeout
        return stop.task.doomed or (limit is not None and started + limit <= now)
