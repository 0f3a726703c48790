"""What a workload is, and what it is given."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers import BASE, OURS, PEERS, NotOfferedError, Peer, warm

clock = time.perf_counter
Figures = dict[str, Any]
"""Name of a figure: a number (seconds, per second or bytes), or a list for a plot."""


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        rounds: how often all is repeated, at most.
        patience: seconds after which no further round begins.
        slow_rounds: how often what takes long is repeated, at most.
        seconds: for how long a rate is taken, roughly; slow pools are given fewer tasks.
        submits: the most tasks of one rate.
        cell: the time limit of one peer in one workload, in seconds.
        part: what workloads of a fixed size multiply their size with.
        pending: the largest number of pending tasks.
        workers: the largest number of workers.
        fakes: the largest number of simulated workers.
        array: the largest array in MiB.
    """

    rounds: int
    patience: float
    slow_rounds: int
    seconds: float
    submits: int
    cell: float
    part: float
    pending: int
    workers: int
    fakes: int
    array: int


SCALES = {
    "tiny": Scale(1, 60, 1, 0.02, 50, 30, 0.01, 100, 2, 8, 1),
    "quick": Scale(2, 65, 1, 0.04, 5_000, 3, 0.05, 10_000, 4, 200, 10),
    "full": Scale(3, math.inf, 3, 0.6, 10_000, 20, 0.5, 1_000_000, 64, 1000, 100),
}


@dataclass
class Bench:
    """One peer at one scale; its pool is made when a workload first asks for it."""

    name: str
    workers: int
    scale: Scale
    _pool: Any = field(default=None, init=False)

    @property
    def peer(self) -> Peer:
        return PEERS[self.name]

    @property
    def pool(self) -> Any:
        if self._pool is None:
            self._pool = self.peer.make(self.workers)
            if not self.peer.limit:
                warm(self._pool, self.workers)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def fit(self, count: int, per_second: float) -> int:
        """At most so many tasks, and fewer if they would take much longer than planned."""
        return max(10, min(count, int(per_second * self.scale.seconds * 2)))

    def sized(self, count: int, least: int = 1) -> int:
        return max(least, int(count * self.scale.part))


@dataclass(frozen=True)
class Figure:
    """A column of a table.

    Attributes:
        key: its name in what the workload returns, after `workload:` in files.
        title: its head in the table.
        unit: of the table: "/s", "s", "ms", "µs", "MiB/s", "MiB" or "B"; empty for plots.
    """

    key: str
    title: str
    unit: str


@dataclass(frozen=True)
class Workload:
    """Something to be done by every peer.

    Attributes:
        name: for `--only`.
        group: the table it belongs to.
        figures: what `run` returns.
        run: takes the figures once.
        peers: those that take part; empty for all that are no limits.
        own_pool: whether it makes pools itself, so that there must be no other one.
        slow: whether it takes long, as those do that make pools.
        rounds: at most so many rounds.
        cell: a time limit of its own in seconds at full scale, 0 for the scale's.
    """

    name: str
    group: str
    figures: tuple[Figure, ...]
    run: Callable[[Bench], Figures]
    peers: tuple[str, ...] = ()
    own_pool: bool = False
    slow: bool = False
    rounds: int = 99
    cell: float = 0

    def rounds_at(self, scale: Scale) -> int:
        return min(self.rounds, scale.slow_rounds if self.slow or self.own_pool else scale.rounds)

    def concerns(self, peer: str) -> bool:
        return peer in self.peers if self.peers else not PEERS[peer].limit


TWO = (OURS, BASE)


def try_once(pool: Any, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Run it once, to see whether the pool can.

    Raises:
        NotOfferedError: it cannot; most pools fail to pickle lambdas, for example.
    """
    try:
        pool.submit(fn, *args, **kwargs).result()
    except NotOfferedError:
        raise
    except Exception as error:
        if "pickle" in repr(error).lower() or isinstance(error, AttributeError):
            raise NotOfferedError("cannot") from error
        raise


def median_time(bench: Bench, action: Callable[[], object], least: int = 3) -> float:
    """The median time of an action, repeated for as long as the scale says."""
    action()
    times: list[float] = []
    end = clock() + bench.scale.seconds
    while len(times) < least or (clock() < end and len(times) < 200):
        start = clock()
        action()
        times.append(clock() - start)
    return statistics.median(times)
