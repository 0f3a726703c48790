"""Tasks that have failed and wait for another try."""

from __future__ import annotations

import heapq
import itertools

from .tasks import Task

__all__ = ["Retries"]


class Retries:
    """Used by the master thread only."""

    def __init__(self) -> None:
        self._waiting: set[Task] = set()
        self._order: list[tuple[float, int, Task]] = []  # a heap, also of tasks dropped since
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, task: Task, due: float) -> None:
        """Try this task again at that time (the monotonic clock)."""
        self._waiting.add(task)
        heapq.heappush(self._order, (due, next(self._numbers), task))

    def drop(self, task: Task) -> None:
        """Do not try this task again, if it waits here."""
        self._waiting.discard(task)
        while self._order and self._order[0][2] not in self._waiting:
            heapq.heappop(self._order)

    def due(self, now: float) -> list[Task]:
        """Take the tasks whose time has come."""
        tasks = []
        while self._order and self._order[0][0] <= now:
            task = self._order[0][2]
            tasks.append(task)
            self.drop(task)
        return tasks

    def take_all(self) -> list[Task]:
        """Take them all: they will not be tried again."""
        tasks = list(self._waiting)
        self._waiting.clear()
        self._order.clear()
        return tasks

    def next_deadline(self) -> float | None:
        """When `due` must be called."""
        return self._order[0][0] if self._order else None
