"""A lane: the jobs that wait for one service, and the workers that could take them."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from .queues import JobQueue

if TYPE_CHECKING:
    from .scheduler import Job, WorkerState

__all__ = ["DEFAULT_SERVICE", "Lane"]

DEFAULT_SERVICE: Final = "default"
"""What a worker offers, and a job asks for, where nobody names a service."""

J = TypeVar("J", bound="Job")


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
