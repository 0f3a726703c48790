"""Jobs that wait: by priority, and in the order in which they came."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

__all__ = ["JobQueue"]


class Prioritized(Protocol):
    """What can wait in a `JobQueue`."""

    priority: int


J = TypeVar("J", bound=Prioritized)


class JobQueue(Generic[J]):
    """The highest priority comes first, and within one the job that came first.

    A step costs the same however many jobs wait; the first and the last job of a
    priority cost little more, even if each job has a priority of its own.
    """

    def __init__(self) -> None:
        self._levels: dict[int, deque[J]] = {}
        self._priorities: list[int] = []  # of the levels, lowest first
        self.front: deque[J] = deque()
        """Those of the highest priority, the first of all first. Empty only if none wait."""
        self._length = 0

    def __bool__(self) -> bool:
        return bool(self.front)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[J]:
        return (job for priority in reversed(self._priorities) for job in self._levels[priority])

    def append(self, job: J) -> None:
        """A job arrives."""
        level = self._levels.get(job.priority)
        if level is None:
            level = self._new_level(job.priority)
        level.append(job)
        self._length += 1

    def put_back(self, jobs: Sequence[J]) -> None:
        """Jobs that have been taken come back, before all others of their priority."""
        for job in reversed(jobs):
            level = self._levels.get(job.priority)
            if level is None:
                level = self._new_level(job.priority)
            level.appendleft(job)
        self._length += len(jobs)

    def take_first(self) -> J:
        """Take the job that comes first."""
        job = self.front.popleft()
        self._length -= 1
        if not self.front and self._length:
            del self._levels[self._priorities.pop()]
            self.front = self._levels[self._priorities[-1]]
        return job

    def take_last(self) -> J:
        """Take the job that comes last."""
        lowest = self._levels[self._priorities[0]]
        job = lowest.pop()
        self._length -= 1
        if not lowest and self._length:
            del self._levels[self._priorities.pop(0)]
        return job

    def oldest(self) -> Iterator[J]:
        """The job of each priority that came first."""
        return (level[0] for level in self._levels.values() if level)

    def _new_level(self, priority: int) -> deque[J]:
        if not self.front:
            self._levels.clear()  # the last level is kept when it has become empty
            self._priorities.clear()
        level = self._levels[priority] = deque()
        insort(self._priorities, priority)
        self.front = self._levels[self._priorities[-1]]
        return level
