"""What the master makes of its group of supervised workers: starts, deaths, ends."""

from __future__ import annotations

import logging
import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from ..supervision.restarts import PERIOD, RESTARTS, Restarts
from ..system.descriptors import check_descriptors
from ..wire.protocol import GroupFailed, Reaped, Spawned
from .certificate import ending, lost_error
from .tasks import Task

__all__ = ["Fleet", "Group"]

logger = logging.getLogger(__name__)

STARTS_BEFORE_BROKEN: Final = 3
"""Workers in a row that may die before they are ready."""
WAIT_FOR_EXIT_STATUS: Final = 3.0
"""Seconds that a lost task waits for the supervisor's word on how its worker died."""
DESCRIPTORS_OF_A_WORKER: Final = 5
"""What a worker takes in this process: two connections, one to learn of its death, its
journal (before Python 3.13 a mapping keeps one) and its mailbox."""
SPARE_DESCRIPTORS: Final = 4
"""For what other threads may open while workers connect."""
LOOK_FOR_DESCRIPTORS: Final = 0.5
"""Seconds between two looks for file descriptors, while there are too few."""
WAIT_FOR_EXIT: Final = 5.0
"""Seconds that workers have for their exit handlers, when they retire and at shutdown."""


class Group(Protocol):
    """A supervised group of workers, as the master uses it (`Workers` is one)."""

    def start(self) -> None:
        """Start the supervisor, and with it the group."""

    def restart(self) -> None:
        """Start the group anew after its supervisor has died."""

    @property
    def supervisor_pid(self) -> int | None:
        """The process id of the supervisor."""

    def fileno(self) -> int:
        """A descriptor that is readable when `receive` has news."""

    def receive(self) -> Sequence[Spawned | Reaped | GroupFailed]:
        """What has happened since the last call."""

    @property
    def closed(self) -> bool:
        """Whether the supervisor has gone without being asked."""

    @property
    def hung_up(self) -> bool:
        """Whether that is because this process is exiting."""

    def scale(self, numprocesses: int, *, spare: bool = False) -> None:
        """Keep this many alive; `spare` leaves surplus ones to end by themselves."""

    def stop(self, *, with_children: bool = False) -> None:
        """Stop workers and supervisor, in bounded steps; perhaps what workers started, too."""

    @property
    def pids(self) -> frozenset[int]:
        """The living processes, as far as `receive` has told."""

    def terminate(self) -> None:
        """Have the supervisor end if all of its processes have."""

    def kill(self) -> None:
        """The same at once, by SIGKILL."""


class Fleet:
    """Used by the master thread only. Without a group it never has any news."""

    def __init__(
        self,
        group: Group | None,
        fail: Callable[[Task, BaseException], None] = Task.fail,
        bar: Callable[[bool], object] = bool,
    ) -> None:
        """Prepare.

        Args:
            group: the workers, if any are ours.
            fail: called with a task whose worker died, and what that means for it.
            bar: called with whether new workers must not connect.
        """
        self._fail_task = fail
        self._bar = bar
        self._look_at: float | None = None  # for descriptors; while there are too few
        self.group = group
        self.polled = -1
        """The descriptor that the master's poll watches."""
        self.failure = ""
        """Why the group cannot run tasks any more, once that is so."""
        self._alive: set[int] = set()
        self._ready: set[int] = set()
        # By pid, with the seconds that the task ran, and a deadline.
        self._lost: dict[int, tuple[Task, float | None, float]] = {}
        self._wanted = 1
        self._failed_starts = 0
        self._restarts = Restarts()
        self._started = False
        self._stopped = False
        self._left = False  # whether the workers have had time to end by themselves

    def start(self) -> None:
        """Start the group; a failure is told in `failure`."""
        if self.group and not self._stopped:
            try:
                self.group.start()
                self._started = True
            except (OSError, RuntimeError) as error:
                self.failure = f"the supervisor could not be started: {error}"

    def fileno(self) -> int:
        """The descriptor to poll for reading, or -1."""
        return self.group.fileno() if self.group and self._started and not self._stopped else -1

    def has(self, pid: int) -> bool:
        """Whether this process is one of the group's, as far as that can be told."""
        if self.group is None or pid in self._alive:
            return True
        try:  # before the supervisor's word has come
            with open(f"/proc/{pid}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            return not os.path.exists("/proc/self/stat")
        except OSError:
            return True
        return parent == self.group.supervisor_pid

    def receive(self) -> list[Spawned | Reaped | GroupFailed]:
        """News of the group. Pass each `Reaped` on to `reaped`."""
        events = list(self.group.receive()) if self.group else []
        for event in events:
            if isinstance(event, Spawned):
                self._alive.add(event.pid)
                self._look_for_descriptors()
            elif isinstance(event, GroupFailed):
                self.failure = event.reason
        return events

    def worker_ready(self, pid: int) -> None:
        """A worker can take tasks: starting workers works."""
        if self.group:
            self._ready.add(pid)
            self._failed_starts = 0

    def reaped(self, event: Reaped) -> None:
        """A process of the group has ended."""
        self._alive.discard(event.pid)
        if event.pid in self._lost:
            task, seconds, _ = self._lost.pop(event.pid)
            self._fail(task, event.pid, event, seconds)
        if event.pid in self._ready:
            self._ready.discard(event.pid)
            # Not a failure to start: without this word, the supervisor would put
            # off the replacement of workers that die young one after the other.
            self.scale(self._wanted)
            return
        if self._look_at is not None:
            return  # it could not connect
        self._failed_starts += 1
        if self._failed_starts == STARTS_BEFORE_BROKEN:  # more may have died by now
            self.failure = (
                f"{self._failed_starts} workers in a row ended before they were ready, the last "
                f"{ending(event)}"
            )

    def bury(self, task: Task, pid: int, seconds: float | None = None) -> None:
        """A worker died after it ran this task for so long; say how, once it is known."""
        if (earlier := self._lost.pop(pid, None)) is not None:
            # It had only lost its connection then, and registered again.
            self._fail(earlier[0], pid, None, earlier[1])
        if pid in self._alive:
            self._lost[pid] = (task, seconds, time.monotonic() + WAIT_FOR_EXIT_STATUS)
        else:
            self._fail(task, pid, None, seconds)

    def _fail(self, task: Task, pid: int, end: Reaped | None, seconds: float | None) -> None:
        error = lost_error(task.name, pid, end, seconds, replaced=self.group is not None)
        self._fail_task(task, error)

    @property
    def waiting(self) -> bool:
        """Whether a lost task still waits for its worker's exit status."""
        return bool(self._lost)

    def next_deadline(self) -> float | None:
        """When `check_deadlines` must be called, even if nothing happens."""
        # All wait equally long, so the first one lost is the first one due.
        first = next((deadline for _, _, deadline in self._lost.values()), None)
        if first is None or self._look_at is None:
            return self._look_at if first is None else first
        return min(first, self._look_at)

    def _look_for_descriptors(self) -> None:
        """Let a new worker connect only if this process has descriptors for it.

        If ZeroMQ has none left when it accepts a connection, it ends the process.
        """
        before, self._look_at = self._look_at, None
        try:
            starting = max(1, len(self._alive) - len(self._ready))
            check_descriptors(starting * DESCRIPTORS_OF_A_WORKER + SPARE_DESCRIPTORS)
        except OSError as error:
            self._look_at = time.monotonic() + LOOK_FOR_DESCRIPTORS
            if before is None:
                logger.warning("new workers cannot connect for now, tasks may wait: %s", error)
        if (before is None) != (self._look_at is None):
            self._bar(self._look_at is not None)

    def check_deadlines(self, now: float) -> None:
        """Wait no longer for exit statuses that are overdue, and look what else is due."""
        if self._look_at is not None and self._look_at <= now:
            self._look_for_descriptors()
        for pid in [pid for pid, (*_, deadline) in self._lost.items() if deadline <= now]:
            task, seconds, _ = self._lost.pop(pid)
            self._fail(task, pid, None, seconds)

    def fail_lost(self, reason: BaseException) -> None:
        """Wait no longer for any exit status."""
        for task, *_ in self._lost.values():
            task.fail(reason)
        self._lost.clear()

    def supervisor_died(self) -> bool:
        """Whether the supervisor is gone and should be restarted."""
        group = self.group
        return group is not None and not self._stopped and group.closed and not group.hung_up

    def restart(self) -> None:
        """Start a new supervisor, unless too many have died lately."""
        assert self.group is not None
        self.check_deadlines(float("inf"))
        self._alive.clear()
        self._ready.clear()
        if not self._restarts.add(time.monotonic()):
            self.stop()
            self.failure = (
                f"the supervisor died {RESTARTS + 1} times within {PERIOD:.0f} seconds. If it "
                f"could not start, standard error says why; check that {sys.executable!r} runs, "
                "PYTHONHOME suits it, and it can import zmqexecutor"
            )
            return
        try:
            self.group.restart()
        except (OSError, RuntimeError) as error:
            self.failure = f"the supervisor could not be started again: {error}"

    def scale(self, workers: int) -> None:
        """Keep this many workers; what is too much is not stopped, but not replaced."""
        self._wanted = workers
        if self.group and not self._stopped:
            try:
                self.group.scale(workers, spare=True)  # what is too much is about to leave
            except (OSError, RuntimeError):
                pass  # the supervisor is gone, which `supervisor_died` will tell

    def leave(self, ended: set[int] | None) -> None:
        """Wait until the workers that were ready, and told to leave, have ended; bounded.

        Args:
            ended: those that have, if that was waited for. If these are all that there are,
                the supervisor may end, even if it has not come to its first look at them.
        """
        if not self.group or self._stopped:
            return
        self._left = True
        if ended is not None:
            if self.group.pids <= ended:
                self.group.terminate()
            return
        deadline = time.monotonic() + WAIT_FOR_EXIT
        while self._ready and not self.group.closed and self.fileno() != -1:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return
            poll = select.poll()
            poll.register(self.fileno(), select.POLLIN)
            poll.poll(remaining * 1000)
            for event in self.receive():
                if isinstance(event, Reaped):
                    self._ready.discard(event.pid)

    def stop(self) -> None:
        """Stop the group in bounded steps.

        Workers that were not let go before may run tasks: what these have started ends too.
        """
        if self.group and not self._stopped:
            self._stopped = True
            self.group.stop(with_children=not self._left)

    def kill(self) -> None:
        """Stop the group at once."""
        if self.group and not self._stopped:
            self.group.kill()
