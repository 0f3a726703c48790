"""Jobs that wait: by priority, and in the order in which they came."""

from __future__ import annotations

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
    priority cost as much as there are priorities in use.
    """

    def __init__(self) -> None:
        self._levels: dict[int, deque[J]] = {}
        self._first: deque[J] = deque()  # the highest level, empty only if all is

    def __bool__(self) -> bool:
        return bool(self._first)

    def __len__(self) -> int:
        return sum(map(len, self._levels.values()))

    def __iter__(self) -> Iterator[J]:
        return (job for level in self._in_order() for job in level)

    def append(self, job: J) -> None:
        """A job arrives."""
        level = self._levels.get(job.priority)
        if level is None:
            level = self._new_level(job.priority)
        level.append(job)

    def put_back(self, jobs: Sequence[J]) -> None:
        """Jobs that have been taken come back, before all others of their priority."""
        for job in reversed(jobs):
            level = self._levels.get(job.priority)
            if level is None:
                level = self._new_level(job.priority)
            level.appendleft(job)

    def first(self) -> J:
        """The job to be taken next, which stays."""
        return self._first[0]

    def take_first(self) -> J:
        """Take the job that comes first."""
        job = self._first.popleft()
        if not self._first and len(self._levels) > 1:
            self._drop_level(max(self._levels))
        return job

    def take_last(self) -> J:
        """Take the job that comes last."""
        lowest = min(self._levels)
        job = self._levels[lowest].pop()
        if not self._levels[lowest] and len(self._levels) > 1:
            self._drop_level(lowest)
        return job

    def oldest(self) -> Iterator[J]:
        """The job of each priority that came first."""
        return (level[0] for level in self._levels.values() if level)

    def _in_order(self) -> list[deque[J]]:
        return [self._levels[priority] for priority in sorted(self._levels, reverse=True)]

    def _new_level(self, priority: int) -> deque[J]:
        if not self._first:
            self._levels.clear()  # the last level is kept when it has become empty
        level = self._levels[priority] = deque()
        self._first = self._levels[max(self._levels)]
        return level

    def _drop_level(self, priority: int) -> None:
        del self._levels[priority]
        self._first = self._levels[max(self._levels)]
