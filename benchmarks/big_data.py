"""Workloads of arrays and bytes, of which the time is in the moving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import tasks
from benchmarks.base import SCALES, Bench, Figure, Figures, Workload, clock, median_time
from benchmarks.peers import PEERS, NotOfferedError

SIZES = {"64k": 1 / 16, "1M": 1.0, "10M": 10.0, "100M": 100.0}
"""In MiB."""
MANY = 200
"""Arrays that are given to the pool at once, 100 of them in a full run."""
DIRECTIONS: dict[str, tuple[Callable[..., Any], str, int]] = {
    "argument": (tasks.length, "as argument", 1),
    "result": (tasks.give, "as result", 1),
    "both": (tasks.give_back, "there and back", 2),
}


def _bandwidth(direction: str, mebibytes: float, as_bytes: bool = False) -> Callable[..., Figures]:
    task, _, ways = DIRECTIONS[direction]

    def run(bench: Bench) -> Figures:
        import numpy as np

        if mebibytes > bench.scale.array:
            raise NotOfferedError("-")
        size = int(mebibytes * tasks.MIB)
        data: Any = bytes(size) if as_bytes else np.ones(size, dtype=np.uint8)
        argument = size if task is tasks.give else data
        result = bench.pool.call(task, argument)
        if task is not tasks.length and len(result) != size:
            raise ValueError(f"{len(result)} bytes came back, not {size}")
        seconds = median_time(bench, lambda: bench.pool.call(task, argument))
        return {"bandwidth": mebibytes * ways / seconds}

    return run


def _many(task: Callable[..., Any], kibibytes: int) -> Callable[[Bench], Figures]:
    def run(bench: Bench) -> Figures:
        """So many at once that none of them waits for another's way."""
        import numpy as np

        if bench.scale.part < SCALES["full"].part and kibibytes != 150:
            raise NotOfferedError("-")
        size = kibibytes * 1024
        count = bench.sized(MANY, 4)
        work: Any = [size] * count
        if task is not tasks.give:
            work = [np.full(size, number % 256, dtype=np.uint8) for number in range(count)]
        list(bench.pool.map(task, work[: 2 * bench.workers], 1))
        start = clock()
        results = list(bench.pool.map(task, work, 1))
        seconds = clock() - start
        if len(results) != count:
            raise ValueError(f"{len(results)} results of {count} tasks")
        return {"seconds": seconds / count}

    return run


def _one(mebibytes: int) -> Callable[[Bench], Figures]:
    def run(bench: Bench) -> Figures:
        """All tasks have the same array among their arguments."""
        import numpy as np

        if mebibytes > bench.scale.array:
            raise NotOfferedError("-")
        array = np.ones(mebibytes * tasks.MIB, dtype=np.uint8)
        count = bench.sized(MANY, 4)
        list(bench.pool.map(tasks.length, [array] * bench.workers, 1))
        start = clock()
        results = list(bench.pool.map(tasks.length, [array] * count, 1))
        seconds = clock() - start
        if results != [len(array) + 2] * count:
            raise ValueError(f"other results than {count} times {len(array) + 2}")
        return {"seconds": seconds / count}

    return run


_ALL = tuple(name for name in PEERS if name not in ("serial loop", "zmq futures"))

WORKLOADS = [
    Workload(
        f"{direction}-{size}",
        f"Arrays {title}",
        (Figure("bandwidth", f"{size}iB" if size[-1] == "M" else "64 KiB", "MiB/s"),),
        _bandwidth(direction, mebibytes),
        _ALL,
        slow=mebibytes > 1,
    )
    for direction, (_, title, _) in DIRECTIONS.items()
    for size, mebibytes in SIZES.items()
]
WORKLOADS.append(
    Workload(
        "bytes-10M",
        "Bytes as argument",
        (Figure("bandwidth", "10MiB", "MiB/s"),),
        _bandwidth("argument", 10, as_bytes=True),
        _ALL,
        slow=True,
    )
)
WORKLOADS += [
    Workload(
        f"many-{direction}s-{size}k",
        "Many arrays at once",
        (Figure("seconds", f"{size} KiB {title}, each", "µs"),),
        _many(task, size),
        tuple(name for name, peer in PEERS.items() if not peer.limit),
    )
    for direction, (task, title, _) in DIRECTIONS.items()
    if direction != "both"
    for size in (16, 64, 150, 600)
]
WORKLOADS += [
    Workload(
        f"one-argument-{size}",
        "One array for 100 tasks",
        (Figure("seconds", f"{SIZES[size]:g} MiB, a task", "ms"),),
        _one(int(SIZES[size])),
        tuple(name for name, peer in PEERS.items() if not peer.limit),
        slow=True,
    )
    for size in ("1M", "10M")
]
