"""Workloads of tasks that do nothing, and of tasks that only sleep."""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import __main__
from benchmarks import tasks
from benchmarks.base import Bench, Figure, Figures, Workload, clock, try_once
from benchmarks.peers import PEERS

EIGHT = 8


def _submit_rate(bench: Bench, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Figures:
    submit = bench.pool.submit
    try_once(bench.pool, fn, *args, **kwargs)

    def rate(count: int) -> float:
        start = clock()
        futures = [submit(fn, *args, **kwargs) for _ in range(count)]
        for future in futures:
            future.result()
        return count / (clock() - start)

    trial = rate(min(100, bench.scale.submits))
    return {"rate": rate(bench.fit(bench.scale.submits, trial))}


def _from_threads(bench: Bench) -> Figures:
    submit = bench.pool.submit
    try_once(bench.pool, tasks.nothing)

    def submit_some(count: int) -> None:
        for future in [submit(tasks.nothing) for _ in range(count)]:
            future.result()

    def rate(count: int) -> float:
        threads = [threading.Thread(target=submit_some, args=(count,)) for _ in range(EIGHT)]
        start = clock()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return count * EIGHT / (clock() - start)

    trial = rate(20)
    return {"rate": rate(bench.fit(bench.scale.submits, trial) // EIGHT + 1)}


def _from_asyncio(bench: Bench) -> Figures:
    try_once(bench.pool, tasks.nothing)

    async def rate(count: int) -> float:
        loop = asyncio.get_running_loop()
        start = clock()
        await asyncio.gather(
            *(loop.run_in_executor(bench.pool, tasks.nothing) for _ in range(count))
        )
        return count / (clock() - start)

    trial = asyncio.run(rate(min(100, bench.scale.submits)))
    return {"rate": asyncio.run(rate(bench.fit(bench.scale.submits, trial)))}


def _map_rate(bench: Bench, chunksize: int) -> Figures:
    def rate(count: int) -> float:
        start = clock()
        deque(bench.pool.map(tasks.nothing, range(count), chunksize), maxlen=0)
        return count / (clock() - start)

    trial = rate(min(100 * chunksize, bench.scale.submits))
    return {"rate": rate(bench.fit(bench.scale.submits * min(chunksize, 20), trial))}


def _rate(name: str, title: str, run: Callable[[Bench], Figures]) -> Workload:
    return Workload(name, "Small tasks", (Figure("rate", title, "/s"),), run)


# ---------------------------------------------------------------- latency


def _one_by_one(bench: Bench) -> Figures:
    submit = bench.pool.submit
    times: list[float] = []
    try_once(bench.pool, tasks.nothing)
    end = clock() + bench.scale.seconds * 2
    while len(times) < 20 or (clock() < end and len(times) < 5000):
        start = clock()
        submit(tasks.nothing).result()
        times.append(clock() - start)
    return _quantiles(times)


def _hundred_under_way(bench: Bench) -> Figures:
    submit = bench.pool.submit
    try_once(bench.pool, tasks.nothing)
    under_way: deque[tuple[float, Any]] = deque()
    times: list[float] = []
    end = clock() + bench.scale.seconds * 2
    while len(times) < 20 or (clock() < end and len(times) < 20_000):
        while len(under_way) < 100:
            under_way.append((clock(), submit(tasks.nothing)))
        start, future = under_way.popleft()
        future.result()
        times.append(clock() - start)
    for _, future in under_way:
        future.result()
    return _quantiles(times)


def _quantiles(times: list[float]) -> Figures:
    hundredths = statistics.quantiles(times, n=100, method="inclusive")
    return {"median": hundredths[49], "p99": hundredths[98], "quantiles": hundredths}


def _latency(
    name: str, title: str, run: Callable[[Bench], Figures], limits: tuple[str, ...] = ()
) -> Workload:
    peers = (*(peer for peer in PEERS if not PEERS[peer].limit), *limits)
    figures = (
        Figure("median", f"{title}, median", "µs"),
        Figure("p99", f"{title}, p99", "µs"),
        Figure("quantiles", "", ""),
    )
    return Workload(name, "Latency", figures, run, peers)


# ---------------------------------------------------------------- fairness


def _bimodal(bench: Bench) -> Figures:
    many, few = bench.sized(400, 20), bench.sized(20, 2)
    durations = [0.001] * many + [0.5 * min(1.0, bench.scale.part * 2)] * few
    random.Random(7).shuffle(durations)
    start = clock()
    for future in [bench.pool.submit(tasks.sleep, seconds) for seconds in durations]:
        future.result()
    return {"ratio": (clock() - start) / (sum(durations) / bench.workers)}


def _behind_a_long_one(bench: Bench) -> Figures:
    count = bench.sized(1000, 10)
    long = bench.pool.submit(tasks.sleep, 2 * bench.scale.part)
    start = clock()
    for future in [bench.pool.submit(tasks.nothing) for _ in range(count)]:
        future.result()
    found = clock() - start
    long.result()
    return {"seconds": found}


def _one_of_them_long(bench: Bench) -> Figures:
    """No other thread of the worker can run meanwhile, to give back what was sent to it."""
    count = bench.sized(400, 40)
    for future in [bench.pool.submit(tasks.keep_interpreter, 0) for _ in range(count)]:
        future.result()  # they are known to be tiny
    start = clock()
    futures = [
        bench.pool.submit(tasks.keep_interpreter, bench.scale.part if number == 30 else 0)
        for number in range(count)
    ]
    long = futures.pop(30)
    for future in futures:
        future.result()
    found = clock() - start
    long.result()
    return {"seconds": found}


WORKLOADS = [
    _rate("submit", "submit", lambda bench: _submit_rate(bench, tasks.nothing)),
    # The program that runs the peer has this function in its __main__ module.
    _rate("submit-main", "of __main__", lambda bench: _submit_rate(bench, __main__.nothing)),
    _rate("submit-lambda", "a lambda", lambda bench: _submit_rate(bench, lambda: None)),
    _rate("submit-closure", "a closure", lambda bench: _submit_rate(bench, tasks.closure(1))),
    _rate("submit-kwargs", "kwargs", lambda bench: _submit_rate(bench, tasks.nothing, 1, key="x")),
    _rate("submit-threads", "8 threads", _from_threads),
    _rate("submit-asyncio", "asyncio", _from_asyncio),
    _rate("map-1", "map, chunks of 1", lambda bench: _map_rate(bench, 1)),
    _rate("map-100", "map, of 100", lambda bench: _map_rate(bench, 100)),
    _latency("latency-1", "alone", _one_by_one, ("zmq futures",)),
    _latency("latency-100", "100 under way", _hundred_under_way),
    Workload(
        "bimodal",
        "Fairness",
        (Figure("ratio", "bimodal, time to ideal", "x"),),
        _bimodal,
    ),
    Workload(
        "behind-long",
        "Fairness",
        (Figure("seconds", "tiny tasks behind a long one", "ms"),),
        _behind_a_long_one,
    ),
    Workload(
        "one-long",
        "Fairness",
        (Figure("seconds", "tiny tasks around a long one in C", "ms"),),
        _one_of_them_long,
    ),
]
