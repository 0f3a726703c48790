"""What the master knows of each worker, and how it learns of a worker's death."""

from __future__ import annotations

import os
import select
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from .journal import JournalReader
from .protocol import Hello, Shared
from .scheduler import WorkerState
from .tasks import Shared as SharedData
from .tasks import Task

__all__ = ["DeathWatch", "Peer", "WorkerInfo"]

SHARED_KEPT: Final = 512
"""Shared objects (functions) that a worker keeps; more than fit in one message."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A registered worker, as `JobRunner.workers` shows it.

    Attributes:
        id: unique to the worker process.
        pid: its process id.
        host: the name of its host.
        since: when it became ready, in seconds since the epoch.
    """

    id: str
    pid: int
    host: str
    since: float


class Peer:
    """A worker that has registered."""

    def __init__(self, hello: Hello, identity: bytes, journal: JournalReader | None) -> None:
        self.hello = hello
        self.identity = identity
        """Routing id of the worker's sockets."""
        self.journal = journal
        self.state: WorkerState[Task] | None = None
        """The scheduler's record of it, once it is ready."""
        self.since = time.time()
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def info(self) -> WorkerInfo:
        """The public view of this worker."""
        return WorkerInfo(self.hello.worker, self.hello.pid, self.hello.host, self.since)

    def introduce(self, needed: SharedData, new: list[Shared], forget: list[bytes]) -> None:
        """Note that a job needs this; what the worker lacks, or may drop, is appended."""
        key = needed.key
        if key in self._known:
            self._known.move_to_end(key)
            return
        self._known[key] = None
        new.append(Shared(key, needed.data))
        if len(self._known) > SHARED_KEPT:
            forget.append(self._known.popitem(last=False)[0])

    @property
    def confirmed(self) -> int:
        """How far the results in the worker's journal are known here."""
        return self.journal.position if self.journal else 0

    def close(self) -> None:
        """Give back what it holds."""
        if self.journal:
            self.journal.close()


class DeathWatch:
    """Turns the deaths of local processes into readiness of one descriptor.

    On Linux each process has a descriptor of its own, all of them behind one
    epoll descriptor, so that any number of workers costs the master's poll one
    entry. Elsewhere nothing is ever ready, and the news comes from the supervisor.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll() if hasattr(os, "pidfd_open") else None
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
        except OSError:
            return True  # an old kernel, or no descriptors left: others will tell
        self._pids[descriptor] = pid
        self._descriptors[pid] = descriptor
        self._epoll.register(descriptor, select.EPOLLIN)
        return True

    def remove(self, pid: int) -> None:
        """Watch it no longer."""
        descriptor = self._descriptors.pop(pid, None)
        if descriptor is not None and self._epoll:
            del self._pids[descriptor]
            self._epoll.unregister(descriptor)
            os.close(descriptor)

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
