"""What the master knows of each worker, and how it learns of a worker's death."""

from __future__ import annotations

import os
import select
import signal
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ..payload.shares import Share
from ..wire.journal import JournalReader
from ..wire.protocol import (
    DEFAULT_SERVICE,
    ControlFromMaster,
    Frame,
    Hello,
    Job,
    Jobs,
    Shared,
    encode,
)
from ..wire.shortcuts import Post
from .channels import Channels
from .lanes import WorkerState
from .tasks import Task

__all__ = ["DeathWatch", "Peer", "Stop", "WorkerInfo"]

SHARED_KEPT: Final = 512
"""Shared objects (functions) that a worker keeps; more than fit in one message."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A registered worker, as `JobRunner.workers` shows it.

    Attributes:
        id: unique to this worker's registration.
        pid: its process id.
        host: the name of its host.
        since: when it became ready, in seconds since the epoch.
        services: what it offers.
        state: "idle", "busy", or "leaving" if it will be sent no more jobs.
        jobs_done: how many jobs it has answered.
    """

    id: str
    pid: int
    host: str
    since: float
    services: tuple[str, ...] = (DEFAULT_SERVICE,)
    state: Literal["idle", "busy", "leaving"] = "idle"
    jobs_done: int = 0

    @property
    def age(self) -> float:
        """For how many seconds it has been ready."""
        return max(0.0, time.time() - self.since)


class Stop:
    """A task that is being ended, by killing its worker; see `stops`."""

    __slots__ = ("begun", "killed", "look_at", "ran", "seq", "stack", "task")

    def __init__(self, task: Task, ran: float, look_at: float, *, begun: bool = True) -> None:
        self.task = task
        self.seq = task.seq
        """Its number at this worker; if it fails and is tried again, it gets another."""
        self.ran = ran
        self.look_at = look_at
        self.stack = ""
        self.begun = begun
        """Whether the worker runs it. If it does not begin, that is to run elsewhere."""
        self.killed = False


class Peer:
    """A worker that has registered."""

    def __init__(
        self,
        hello: Hello,
        identity: bytes,
        channels: Channels,
        journal: JournalReader | None = None,
        post: Post | None = None,
    ) -> None:
        self.hello = hello
        self.channels = channels
        """The way to it."""
        self.identity = identity
        """Routing id of the worker's sockets."""
        self.journal = journal
        self._post = post
        self._number = 0  # of the last message with jobs, if there is a post
        self.welcomed = False
        """Whether it has been told what to prepare."""
        self.state: WorkerState[Task] | None = None
        """The scheduler's record of it, once it is ready."""
        self.since = time.time()
        self.sent_at = 0.0
        """When it was sent jobs last."""
        self.finished = 0
        """The last job that it is known to have finished."""
        self.done = 0
        """How many jobs it has answered."""
        self.look_at: float | None = None
        """When `stops` looks at it next."""
        self.offered: Mapping[str, object] = {}
        """Has, as "task", what a thread sends it, of which the master does not know yet."""
        self.asked_at = 0.0
        """When it was asked last whether it is there."""
        self.heard_at = 0.0
        """When it last answered such a question."""
        self.stop: Stop | None = None
        """The task for which it is about to be killed."""

        self._position = 0
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._shares: set[bytes] = set()
        self._forgotten: list[bytes] = []

    @property
    def grouped(self) -> bool:
        """Whether it is a process of the master's own group."""
        return self.channels.entrance.group_only

    @property
    def maps_segments(self) -> bool:
        """Whether it can map our segments: these are in the group's private directory.

        A journal says nothing about that. Any worker of this host may have one, and one of
        the group need not: there may have been no room for it.
        """
        return self.grouped

    def info(self) -> WorkerInfo:
        """The public view of this worker, once it is ready. Any thread may ask for it."""
        assert self.state is not None
        return WorkerInfo(
            self.hello.worker,
            self.hello.pid,
            self.hello.host,
            self.since,
            tuple(self.hello.services),
            "leaving" if self.state.draining else "busy" if self._is_busy() else "idle",
            self.done,
        )

    @property
    def holding(self) -> bool:
        """Whether it has been sent a job that it has not answered."""
        return self.state is not None and bool(self.state.held)

    def _is_busy(self) -> bool:
        return self.holding or self.offered.get("task") is not None

    def tell(self, message: ControlFromMaster) -> bool:
        """Send a control message; False if there is no way to it."""
        return self.channels.tell(self.identity, message)

    def send_jobs(
        self,
        jobs: list[Job],
        shared: list[Shared],
        forget: list[bytes],
        buffers: Sequence[Frame] = (),
    ) -> bool:
        """Send jobs, or without any a confirmation; False if there is no way to it."""
        if self._post is None:
            frame = encode(Jobs(self.confirmed, jobs, shared, forget))
            return self.channels.send_work(self.identity, frame, buffers)
        self._number += 1
        frame = encode(Jobs(self.confirmed, jobs, shared, forget, self._number))
        if self._post.send(frame, buffers):
            return True
        return self.channels.send_work(self.identity, frame, buffers)

    @property
    def mailed(self) -> bool:
        """Whether small messages go by its mailbox, and no other way may be needed now."""
        return self._post is not None and self.journal is not None and not self._forgotten

    def knows(self, shared: Shared) -> bool:
        """Whether the worker has it."""
        return shared.key in self._known

    @property
    def next_number(self) -> int:
        """That of the next message with jobs."""
        return self._number + 1

    def post(self, message: Jobs, buffers: Sequence[Frame]) -> bool:
        """Put a message into its mailbox, uncounted; False if it does not go in.

        Another thread may call it, even when this worker has been given up.
        """
        post = self._post
        return post is not None and post.send(encode(message), buffers)

    def posted(self) -> None:
        """Count the message that another thread has sent."""
        self.sent_at = time.monotonic()
        self._number += 1

    def heard_out(self) -> bool:
        """Whether its work connection has ended, and all that came by it is read."""
        frame = encode(Jobs(self.confirmed, []))
        return not self.channels.send_work(self.identity, frame) and self.channels.is_read()

    def introduce(self, needed: Shared, new: list[Shared], forget: list[bytes]) -> None:
        """Note that a job needs this; what the worker lacks, or may drop, is appended."""
        key = needed.key
        if key in self._known:
            self._known.move_to_end(key)
            return
        self._known[key] = None
        new.append(needed)
        if len(self._known) > SHARED_KEPT:
            forget.append(self._known.popitem(last=False)[0])

    def introduce_share(self, share: Share, new: list[Shared]) -> None:
        """Note that a job uses this; it stays until nobody in the parent has it."""
        if share.key not in self._shares:
            self._shares.add(share.key)
            new.append(Shared(share.key, share.contents(mapped=self.maps_segments)))

    def forget_share(self, key: bytes) -> bool:
        """Nobody has it any more; whether the worker has to be told, by `take_forgotten`."""
        if key not in self._shares:
            return False
        self._shares.remove(key)
        self._forgotten.append(key)
        return True

    def take_forgotten(self) -> list[bytes]:
        """What the worker is to forget with the next message."""
        forgotten, self._forgotten = self._forgotten, []
        return forgotten

    def running(self) -> tuple[int, float]:
        """The number of the job that it started last, or 0, and when that was.

        Without a journal it is sent one job at a time, which it starts at once.
        """
        if self.journal:
            return self.journal.running, self.journal.started
        held = self.state.held if self.state else {}
        return next(iter(held), 0), self.sent_at

    def doomed(self) -> list[Task]:
        """The tasks it holds that nobody wants any more."""
        held = self.state.held if self.state else {}
        return [task for task, _ in held.values() if task.doomed]

    def condemn(self, seq: int) -> None:
        """Have it start nothing after this job; 0 lets it go on."""
        if self.journal:
            self.journal.condemn(seq)

    def last_run(self) -> int | None:
        """After its death: the job that it was in, or 0; None if nobody knows."""
        if not self.journal:
            return None
        if not self.journal.begun:
            return 0
        running = self.journal.running
        if self.stop and self.stop.killed and not (self.stop.begun and self.stop.seq == running):
            return 0  # noted, but not begun: when it was killed, another still ran, or none
        return running

    def received(self, position: int) -> None:
        """Results up to this position of the worker's journal have come."""
        self._position = max(self._position, position)
        if self.journal:
            self.journal.position = max(self.journal.position, position)

    @property
    def confirmed(self) -> int:
        """How far the results in the worker's journal are known here.

        Even if it could not be mapped here: the worker may wait for it.
        """
        return self.journal.position if self.journal else self._position

    def close(self) -> None:
        """Give back what it holds."""
        self.stop = None  # and with it the task's arguments
        if self.journal:
            self.journal.close()
        self._post = None


class DeathWatch:
    """Turns the deaths of local processes into readiness of one descriptor.

    On Linux each process has a descriptor of its own, all of them behind one
    epoll descriptor, so that any number of workers costs the master's poll one
    entry. Elsewhere nothing is ever ready, and the news comes from the supervisor.
    """

    def __init__(self) -> None:
        # gevent takes `epoll` out of the module.
        linux = hasattr(os, "pidfd_open") and hasattr(select, "epoll")
        self._epoll = select.epoll() if linux else None
        self._pids: dict[int, int] = {}  # descriptor: pid
        self._descriptors: dict[int, int] = {}

    def fileno(self) -> int:
        """The descriptor to poll for reading, or -1."""
        return self._epoll.fileno() if self._epoll else -1

    def add(self, pid: int) -> bool:
        """Watch a process; False if it is gone already."""
        if not self._epoll or pid in self._descriptors:
            return True
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            return True  # no such number, an old kernel, or no descriptors left: others will tell
        self._pids[descriptor] = pid
        self._descriptors[pid] = descriptor
        self._epoll.register(descriptor, select.EPOLLIN)
        return True

    def kill(self, pid: int) -> None:
        """SIGKILL for a watched process, and for what it started in its session."""
        descriptor = self._descriptors.get(pid)
        try:
            if os.getpgid(pid) == pid:  # not yet reaped, so the id is still its own
                os.killpg(pid, signal.SIGKILL)
            if descriptor is not None:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            # It is dead already (macOS: EPERM for a group of zombies), or has become
            # another user's; `Stops` gives it up if it does not end.
            pass

    def remove(self, pid: int) -> None:
        """Watch it no longer."""
        descriptor = self._descriptors.pop(pid, None)
        if descriptor is not None and self._epoll:
            del self._pids[descriptor]
            self._epoll.unregister(descriptor)
            os.close(descriptor)

    def watches(self, pid: int) -> bool:
        """Whether its death will be known here."""
        return pid in self._descriptors

    def wait(self, timeout: float) -> None:
        """Wait until a watched process has died, at most for so many seconds."""
        if self._epoll:
            self._epoll.poll(timeout, 1)

    def dead(self) -> list[int]:
        """The watched processes that have died."""
        if not self._epoll:
            return []
        return [self._pids[descriptor] for descriptor, _ in self._epoll.poll(0)]

    def close(self) -> None:
        """Watch nothing any more."""
        for pid in list(self._descriptors):
            self.remove(pid)
        if self._epoll:
            self._epoll.close()
