"""Workloads of tasks that use what a script has made: objects of its classes, and its globals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import __main__
from benchmarks import tasks
from benchmarks.base import Bench, Figure, Figures, Workload, clock, median_time, try_once
from benchmarks.peers import NotOfferedError

MANY = 4000
"""Tasks that are given to the pool at once, 2000 of them in a full run."""


def _arguments(make: Callable[[int], Any]) -> Callable[[Bench], Figures]:
    def run(bench: Bench) -> Figures:
        work = [make(number) for number in range(bench.sized(MANY, 4))]
        try:
            list(bench.pool.map(tasks.nothing, work[: 2 * bench.workers], 1))
        except AttributeError as error:
            raise NotOfferedError("not there") from error  # the worker has another __main__
        start = clock()
        results = list(bench.pool.map(tasks.nothing, work, 1))
        seconds = clock() - start
        if results != [None] * len(work):
            raise ValueError(f"other results than {len(work)} times None")
        return {"seconds": seconds / len(work)}

    return run


def _records(number: int) -> list[dict[str, Any]]:
    return [{"id": number + index, "name": f"item {index}", "tags": ["a"]} for index in range(100)]


def _global(make: Callable[[], Any], mebibytes: int = 0) -> Callable[[Bench], Figures]:
    def run(bench: Bench) -> Figures:
        """Each task uses what a global of the script is bound to."""
        if mebibytes > bench.scale.array:
            raise NotOfferedError("-")
        # The program that runs the peer has both in its __main__ module.
        __main__.table = make()
        pool = bench.peer.make(bench.workers)
        try:
            try_once(pool, __main__.look_up, 7)
            if mebibytes:
                return {"seconds": median_time(bench, lambda: pool.call(__main__.look_up, 7))}
            count = bench.sized(MANY // 4, 4)
            start = clock()
            futures = [pool.submit(__main__.look_up, index % 100) for index in range(count)]
            results = [future.result() for future in futures]
            seconds = clock() - start
            if results != [__main__.look_up(index % 100) for index in range(count)]:
                raise ValueError("other results than those of the program itself")
            return {"seconds": seconds / count}
        except TypeError as error:
            raise NotOfferedError("not there") from error  # the worker imports the script anew
        finally:
            pool.shutdown()
            __main__.table = None

    return run


def _array(mebibytes: int) -> Callable[[], Any]:
    def make() -> Any:
        import numpy as np

        return np.ones(mebibytes * tasks.MIB, dtype=np.uint8)

    return make


WORKLOADS = [
    Workload(name, "Objects as arguments", (Figure("seconds", f"{title}, each", "µs"),), run)
    for name, title, run in (
        ("named-tuples", "a named tuple", _arguments(lambda n: __main__.Pair(n, n / 2))),
        ("objects", "an object", _arguments(lambda n: __main__.Point(n, n / 2))),
        ("records", "100 records", _arguments(_records)),
    )
]
WORKLOADS += [
    Workload(
        f"global-{name}",
        "A global that tasks use",
        (Figure("seconds", f"{title}, a task", unit),),
        _global(make, mebibytes),
        own_pool=True,
    )
    for name, title, unit, mebibytes, make in (
        ("records", "300 records", "µs", 0, lambda: _records(0) * 3),
        (
            "objects",
            "1000 objects",
            "µs",
            0,
            lambda: [__main__.Point(n, n / 2) for n in range(1000)],
        ),
        ("texts", "1000 texts", "µs", 0, lambda: {n: str(n) for n in range(1000)}),
        ("10k-texts", "10 000 texts", "µs", 0, lambda: {n: str(n) for n in range(10_000)}),
        *((f"{size}M", f"{size} MiB array", "ms", size, _array(size)) for size in (1, 10, 100)),
    )
]
