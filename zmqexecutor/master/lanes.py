"""The scheduler's state: jobs, workers, and a lane for each service.

A lane has the jobs that wait for one service, and the workers that could take them. A
worker that offers several services is in several lanes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import msgspec

from ..wire.protocol import DEFAULT_SERVICE
from .queues import JobQueue

__all__ = ["Job", "Lane", "WorkerState"]


class Job(msgspec.Struct, eq=False, kw_only=True):
    """What the scheduler knows of a job; the master's jobs add the payload."""

    # A Struct, not a class with slots: it takes a fifth of the time to make.

    kind: Hashable
    """Jobs of one kind are expected to take about the same time."""
    size: int = 0
    """Bytes that have to be sent."""
    priority: int = 0
    service: str = DEFAULT_SERVICE
    queued_at: float = 0.0
    worker: Any = None
    """The `WorkerState` of who holds it."""
    seq: int = 0
    """Its number there."""

    def wanted(self) -> bool:
        """Whether it is worth waiting for a worker."""
        return True

    def start(self) -> bool:
        """Called just before the job is first sent: False drops a cancelled one."""
        return True


J = TypeVar("J", bound=Job)


class Lane(Generic[J]):
    """Of one service. A worker that offers several services is in the lane of each."""

    __slots__ = ("alone_since", "hungry", "idle", "queue", "service", "workers")

    def __init__(self, service: str, now: float) -> None:
        self.service = service
        self.queue: JobQueue[J] = JobQueue()
        self.idle: OrderedDict[bytes, WorkerState[J]] = OrderedDict()
        """Workers that hold no job, longest without one first."""
        self.hungry: OrderedDict[bytes, WorkerState[J]] = OrderedDict()
        """Workers that run a job and could be sent others ahead, in the order to serve them."""
        self.workers = 0
        """How many workers offer the service, whatever they do."""
        self.alone_since = now
        """Since when there are none."""


class WorkerState(Generic[J]):
    """What the scheduler knows of a worker."""

    __slots__ = (
        "active",
        "aging",
        "ahead",
        "allowance",
        "busy",
        "draining",
        "grouped",
        "held",
        "key",
        "lanes",
        "leaving",
        "load",
        "next_seq",
        "progress",
        "recalling",
        "stalled",
        "waited",
    )

    def __init__(
        self,
        key: bytes,
        lanes: list[Lane[J]],
        *,
        grouped: bool,
        ahead: bool,
        allowance: int | None,
    ) -> None:
        self.key = key
        self.lanes = lanes
        """Of the services that it offers, in the order in which it serves them next."""
        self.grouped = grouped
        """Whether it is one of the master's own group."""
        self.ahead = ahead
        """Whether jobs may be sent ahead of the running one."""
        self.allowance = allowance
        """How many more jobs it may be sent in its life, or None."""
        self.held: dict[int, tuple[J, float]] = {}
        """Jobs sent and not answered with their expected seconds, in order sent."""
        self.load = 0.0
        """Expected seconds of work held."""
        self.next_seq = 1
        self.progress = 0.0
        """When it last got its first job, gave a result, or was found stalled."""
        self.busy = False
        self.stalled = False
        """Whether it showed no progress for `STALL` in the job that it runs."""
        self.recalling = False
        """Whether jobs may be on their way back, which none that comes later should overtake."""
        self.waited = 0.0
        """Seconds without progress, in steps of `STALL`, that were to be expected."""
        self.active = False
        """Whether it may be sent jobs, rather than stand by."""
        self.aging = False
        """Whether a successor has been asked for."""
        self.leaving = False
        """Whether it is worn out, and its successor ready."""
        self.draining = False

    def release(self, seq: int) -> J | None:
        """Take this job from the worker."""
        entry = self.held.pop(seq, None)
        if entry is None:
            return None
        self.load = self.load - entry[1] if self.held else 0.0
        entry[0].worker = None
        return entry[0]
