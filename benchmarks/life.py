"""Workloads that make pools: start, loss and renewal of workers, and what grows."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from typing import Any

from benchmarks import fakes, tasks
from benchmarks.base import TWO, Bench, Figure, Figures, Workload, clock
from benchmarks.peers import OURS, NotOfferedError, warm

_PROGRAM = """
from time import perf_counter as clock
start = clock()
{statement}
imported = clock()
pool = {making}
made = clock()
{calling}
first = clock()
{closing}
print(imported - start, made - imported, first - imported, clock() - first)
"""


def _program(bench: Bench) -> Figures:
    """A program of one task, as a user starts it: nothing is imported yet."""
    peer = bench.peer
    program = _PROGRAM.format(
        statement=peer.statement,
        making=peer.making.format(workers=bench.workers),
        calling=peer.calling,
        closing=peer.closing,
    )

    def run() -> Figures:
        start = clock()
        done = subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        )
        whole = clock() - start
        names = ("import", "constructor", "first", "shutdown")
        seconds = map(float, done.stdout.split()[-len(names) :])
        return {"whole": whole, **dict(zip(names, seconds, strict=True))}

    run()  # reads the files from disk, and compiles them
    return run()


def _memory(bench: Bench) -> Figures:
    pool = bench.peer.make(bench.workers)
    try:
        warm(pool, bench.workers)
        resident, proportional = pool.call(tasks.memory)
        return {"rss": resident / tasks.MIB, "pss": proportional / tasks.MIB}
    finally:
        pool.shutdown()


def _all_at_work(bench: Bench) -> Figures:
    """How much longer than they take tasks of 0.1 s need, one for each worker of a new pool."""
    bench.peer.load()
    start = clock()
    pool = bench.peer.make(bench.workers)
    try:
        for future in [pool.submit(tasks.sleep, 0.1) for _ in range(bench.workers)]:
            future.result()
        return {"seconds": clock() - start - 0.1}
    finally:
        pool.shutdown()


def _recovery(bench: Bench) -> Figures:
    pool = bench.peer.make(1)
    try:
        pool.submit(tasks.nothing).result()
        time.sleep(0.5)  # what pools still prepare in the background
        start = clock()
        pool.submit(tasks.die)
        try:
            pool.submit(tasks.nothing).result()
        except Exception as error:
            # mpire has no exception of its own for it.
            if isinstance(error, BrokenExecutor) or "died" in str(error):
                raise NotOfferedError("pool broken") from error
            raise
        return {"seconds": clock() - start}
    finally:
        pool.shutdown()


def _recycling(bench: Bench) -> Figures:
    """How many times longer tasks of 10 ms take if a worker is replaced after each 25."""
    if not bench.peer.recycles:
        raise NotOfferedError("no option")
    count = bench.sized(400, 80)  # some replacements, at any scale

    def seconds(options: dict[str, Any]) -> float:
        pool = bench.peer.make(bench.workers, **options)
        try:
            warm(pool, bench.workers)
            start = clock()
            for future in [pool.submit(tasks.sleep, 0.01) for _ in range(count)]:
                future.result()
            return clock() - start
        finally:
            pool.shutdown()

    return {"ratio": seconds({"max_tasks_per_child": 25}) / seconds({})}


# ---------------------------------------------------------------- what grows


def _pending(count: int) -> Callable[[Bench], Figures]:
    def run(bench: Bench) -> Figures:
        if count > bench.scale.pending:
            raise NotOfferedError("-")
        pool = bench.pool
        with tempfile.NamedTemporaryFile(prefix="benchmarks-") as gate:
            blocked = [pool.submit(tasks.wait_until_gone, gate.name) for _ in range(bench.workers)]
            time.sleep(0.05)
            memory = _resident()
            start = clock()
            futures = [pool.submit(tasks.nothing) for _ in range(count)]
            submitted = clock() - start
            time.sleep(0.1)  # what else the pool does with them
            memory = _resident() - memory
            os.rename(gate.name, gate.name + "~")
            start = clock()
            for future in blocked + futures:
                future.result()
            completed = clock() - start
            os.rename(gate.name + "~", gate.name)
        found = {"submit": submitted / count, "complete": completed / count}
        if count >= 10_000:  # else it drowns in what the allocator had in reserve
            found["bytes"] = memory / count
        return found

    return run


def _resident() -> int:
    import psutil

    size: int = psutil.Process().memory_info().rss
    return size


def _many_workers(workers: int) -> Callable[[Bench], Figures]:
    def run(bench: Bench) -> Figures:
        if workers > bench.scale.workers:
            raise NotOfferedError("-")
        pool = bench.peer.make(workers)
        try:
            start = clock()
            warm(pool, workers, 60)
            started = clock() - start
            count = min(bench.scale.submits, 5000)
            start = clock()
            for future in [pool.submit(tasks.nothing) for _ in range(count)]:
                future.result()
            return {"task": (clock() - start) / count, "start": started / workers}
        finally:
            pool.shutdown()

    return run


def _simulated(workers: int) -> Callable[[Bench], Figures]:
    def run(bench: Bench) -> Figures:
        if workers > bench.scale.fakes:
            raise NotOfferedError("-")
        raise_descriptor_limit(workers * 4 + 500)
        return fakes.dispatch(workers, bench.sized(20_000, 200))

    return run


def raise_descriptor_limit(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


PENDING = (10, 100, 1000, 10_000, 100_000, 1_000_000)
MANY = (1, 2, 4, 8, 16, 32, 64)
SIMULATED = (2, 8, 64, 200, 1000)

WORKLOADS = [
    Workload(
        "program",
        "Start",
        (
            Figure("import", "import", "ms"),
            Figure("constructor", "constructor", "ms"),
            Figure("first", "to first result", "ms"),
            Figure("shutdown", "shutdown", "ms"),
            Figure("whole", "a program of one task", "ms"),
        ),
        _program,
        own_pool=True,
        cell=60,
    ),
    Workload(
        "memory",
        "Start",
        (
            Figure("rss", "RSS of a worker", "MiB"),
            Figure("pss", "its share of it", "MiB"),
        ),
        _memory,
        own_pool=True,
        cell=30,
    ),
    Workload(
        "all-at-work",
        "Start",
        (Figure("seconds", "to all at work", "ms"),),
        _all_at_work,
        own_pool=True,
        cell=30,
    ),
    Workload(
        "recovery",
        "Loss and renewal",
        (Figure("seconds", "killed to next result", "ms"),),
        _recovery,
        own_pool=True,
        cell=5,
    ),
    Workload(
        "recycling",
        "Loss and renewal",
        (Figure("ratio", "25 tasks a worker, time to none", "x"),),
        _recycling,
        own_pool=True,
        cell=5,
    ),
]
WORKLOADS += [
    Workload(
        f"pending-{count}",
        f"{count:,} pending tasks",
        (
            Figure("submit", "submit, each", "µs"),
            Figure("complete", "complete, each", "µs"),
            Figure("bytes", "memory, each", "B"),
        ),
        _pending(count),
        TWO,
        slow=count > 1000,
        rounds=1 if count > 100_000 else 99,
        cell=180 if count > 100_000 else 0,
    )
    for count in PENDING
]
WORKLOADS += [
    Workload(
        f"workers-{workers}",
        f"{workers} workers",
        (Figure("task", "a no-op", "µs"), Figure("start", "start of a worker", "ms")),
        _many_workers(workers),
        TWO,
        own_pool=True,
        rounds=1,
        cell=60,
    )
    for workers in MANY
]
WORKLOADS += [
    Workload(
        f"simulated-{workers}",
        f"{workers} simulated workers",
        (
            Figure("rate", "jobs", "/s"),
            Figure("cpu", "master's processor time, a job", "µs"),
            Figure("registration", "registration, a worker", "ms"),
        ),
        _simulated(workers),
        (OURS,),
        own_pool=True,
        cell=60,
    )
    for workers in SIMULATED
]
