"""Compare ZmqExecutor with other pools, side by side in one run.

    python -m benchmarks.compare [--quick] [--json FILE] [--workers N] [--pools NAME,...]

Every round makes each pool in turn, takes every figure once, and shuts the pool
down; the order of the pools changes from round to round, so that a busy moment of
the machine hits no pool in particular. The table shows the median over the
rounds and, in brackets, the smallest and the largest value. What is read from
it is the ratio of figures taken in the same run; the figures themselves belong to
the machine.

To add a pool, add an entry to POOLS; to add a figure, add one to FIGURES.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from benchmarks import tasks

MIB = 1024 * 1024
clock = time.perf_counter


# ---------------------------------------------------------------- the pools


def make_ours(workers: int) -> Executor:
    from zmqexecutor import ZmqExecutor

    executor: Executor = ZmqExecutor(workers)
    return executor


def make_standard(method: str) -> Callable[[int], Executor]:
    return lambda workers: ProcessPoolExecutor(workers, multiprocessing.get_context(method))


def make_loky(workers: int) -> Executor:
    from loky import ProcessPoolExecutor as Loky

    executor: Executor = Loky(workers)
    return executor


@dataclass(frozen=True)
class Pool:
    """A pool to compare, and the module it comes from ("" for the standard library)."""

    make: Callable[[int], Executor]
    module: str = ""
    survives_a_crash: bool = False
    start_method: str = ""  # of multiprocessing, where it matters


OURS, BASE = "zmqexecutor", "fork"
POOLS = {
    OURS: Pool(make_ours, "zmqexecutor.executor", survives_a_crash=True),
    BASE: Pool(make_standard("fork"), start_method="fork"),
    "spawn": Pool(make_standard("spawn"), start_method="spawn"),
    "loky": Pool(make_loky, "loky"),
}
DEFAULT_POOLS = "zmqexecutor,fork,spawn"


def usable(name: str) -> bool:
    """Whether this pool can run here; says so if not."""
    pool = POOLS[name]
    if pool.start_method and pool.start_method not in multiprocessing.get_all_start_methods():
        print(f"{name}: left out, this system has no such start method", file=sys.stderr)
        return False
    try:
        if pool.module:
            import_module(pool.module)  # now, so that no figure contains it
    except ModuleNotFoundError as error:
        print(f"{name}: left out ({error})", file=sys.stderr)
        return False
    return True


# ---------------------------------------------------------------- the figures


@dataclass(frozen=True)
class Size:
    """How much work the figures are taken from."""

    rounds: int
    submits: int
    maps: int
    maps_chunked: int
    round_trips: int
    small_arrays: int
    large_arrays: int
    crashes: int


FULL = Size(
    rounds=7,
    submits=10_000,
    maps=10_000,
    maps_chunked=200_000,
    round_trips=2_000,
    small_arrays=100,
    large_arrays=5,
    crashes=5,
)
QUICK = Size(
    rounds=2,
    submits=10_000,
    maps=5_000,
    maps_chunked=100_000,
    round_trips=500,
    small_arrays=20,
    large_arrays=2,
    crashes=2,
)


def submit_rate(executor: Executor, size: Size) -> float:
    start = clock()
    futures = [executor.submit(tasks.nothing) for _ in range(size.submits)]
    for future in futures:
        future.result()
    return size.submits / (clock() - start)


def map_rate(executor: Executor, count: int, chunksize: int) -> float:
    start = clock()
    for _ in executor.map(tasks.nothing, range(count), chunksize=chunksize):
        pass
    return count / (clock() - start)


def round_trips(executor: Executor, size: Size) -> list[float]:
    times = []
    for _ in range(size.round_trips):
        start = clock()
        executor.submit(tasks.nothing).result()
        times.append(clock() - start)
    return sorted(times)


def array_time(
    executor: Executor, task: Callable[[Any], Any], mebibytes: int, repeats: int
) -> float:
    """The median time of one task with an array; it is touched, so that its pages are there."""
    array = np.ones(mebibytes * MIB, dtype=np.uint8)
    executor.submit(task, array).result()
    times = []
    for _ in range(repeats):
        start = clock()
        executor.submit(task, array).result()
        times.append(clock() - start)
    return statistics.median(times)


def replacement_time(make: Callable[[int], Executor], size: Size) -> float:
    """From the submit of a task that kills the only worker to the result of the next task."""
    times = []
    with make(1) as executor:
        executor.submit(tasks.nothing).result()
        for _ in range(size.crashes):
            start = clock()
            lost = executor.submit(tasks.die)
            executor.submit(tasks.nothing).result()
            times.append(clock() - start)
            if lost.exception() is None:
                raise RuntimeError("a task that killed its worker has a result")
    return statistics.median(times)


UNITS = {"ms": 1e3, "µs": 1e6, "k/s": 1e-3}  # from seconds, and from a rate per second


@dataclass(frozen=True)
class Figure:
    """A line of the table."""

    title: str
    unit: str
    more_is_better: bool = False


FIGURES = {
    "constructor": Figure("constructor", "ms"),
    "first_result": Figure("construction to first result", "ms"),
    "submit": Figure("submit, no-ops", "k/s", more_is_better=True),
    "map_1": Figure("map, chunksize 1", "k/s", more_is_better=True),
    "map_100": Figure("map, chunksize 100", "k/s", more_is_better=True),
    "round_trip": Figure("round trip of a no-op, median", "µs"),
    "round_trip_p99": Figure("round trip of a no-op, p99", "µs"),
    "array_1": Figure("array of 1 MiB as argument", "ms"),
    "array_100": Figure("array of 100 MiB as argument", "ms"),
    "array_100_back": Figure("array of 100 MiB there and back", "ms"),
    "shutdown": Figure("shutdown", "ms"),
    "replacement": Figure("crash to next result, 1 worker", "ms"),
}


def take_figures(pool: Pool, workers: int, size: Size) -> dict[str, float]:
    """Make the pool, take each figure once, and shut it down. Times are in seconds."""
    start = clock()
    executor = pool.make(workers)
    found = {"constructor": clock() - start}
    try:
        executor.submit(tasks.nothing).result()
        found["first_result"] = clock() - start
        # All workers are up before anything else is measured.
        for future in [executor.submit(time.sleep, 0.1) for _ in range(workers)]:
            future.result()
        submit_rate(executor, Size(**{**asdict(size), "submits": 500}))

        found["submit"] = submit_rate(executor, size)
        found["map_1"] = map_rate(executor, size.maps, 1)
        found["map_100"] = map_rate(executor, size.maps_chunked, 100)
        times = round_trips(executor, size)
        found["round_trip"] = statistics.median(times)
        found["round_trip_p99"] = times[len(times) * 99 // 100]
        found["array_1"] = array_time(executor, tasks.length, 1, size.small_arrays)
        found["array_100"] = array_time(executor, tasks.length, 100, size.large_arrays)
        found["array_100_back"] = array_time(executor, tasks.give_back, 100, size.large_arrays)
    finally:
        start = clock()
        executor.shutdown()
    found["shutdown"] = clock() - start
    if pool.survives_a_crash:
        found["replacement"] = replacement_time(pool.make, size)
    return found


# ---------------------------------------------------------------- the run

Samples = dict[str, dict[str, list[float]]]  # pool, figure, one value per round


def run(names: list[str], workers: int, size: Size) -> Samples:
    samples: Samples = {name: {} for name in names}
    for number in range(size.rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            show_progress(f"round {number + 1} of {size.rounds}: {name}")
            for figure, value in take_figures(POOLS[name], workers, size).items():
                samples[name].setdefault(figure, []).append(value)
    show_progress("")
    return samples


def show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<50}", end="" if text else "\r", file=sys.stderr, flush=True)


def show(samples: Samples) -> None:
    """Print the table: one column per pool, and the ratio of ours to the base."""
    names = list(samples)
    compared = OURS in names and BASE in names
    print(f"{'':<32}{'unit':>5}" + "".join(f"{name:>24}" for name in names), end="")
    print(f"{'ratio':>9}" if compared else "")
    for key, figure in FIGURES.items():
        cells = "".join(f"{cell(samples[name].get(key), figure):>24}" for name in names)
        print(f"{figure.title:<32}{figure.unit:>5}{cells}", end="")
        both = compared and key in samples[OURS] and key in samples[BASE]
        print(f"{better_by(samples, key, figure):>8.2f}x" if both else "")
    if compared:
        print(f"\nratio: how many times better {OURS} is than ProcessPoolExecutor with {BASE}")


def better_by(samples: Samples, key: str, figure: Figure) -> float:
    ours, base = (statistics.median(samples[name][key]) for name in (OURS, BASE))
    return ours / base if figure.more_is_better else base / ours


def cell(values: list[float] | None, figure: Figure) -> str:
    if not values:
        return "-"
    scale = UNITS[figure.unit]
    low, middle, high = (
        scale * value for value in (min(values), statistics.median(values), max(values))
    )
    digits = 2 if middle < 10 else 1 if middle < 100 else 0
    return f"{middle:,.{digits}f} [{low:,.{digits}f}-{high:,.{digits}f}]"


def describe(workers: int, size: Size) -> dict[str, Any]:
    """What the figures belong to."""
    versions = {}
    for package in ("zmqexecutor", "pyzmq", "loky", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": os.cpu_count(),
        "workers": workers,
        "versions": versions,
        "size": asdict(size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ZmqExecutor with other process pools.")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", metavar="FILE", help="also write every sample to a file")
    parser.add_argument("--workers", type=int, default=2, help="default: 2")
    parser.add_argument(
        "--pools", default=DEFAULT_POOLS, help=f"some of {','.join(POOLS)}; default: %(default)s"
    )
    options = parser.parse_args()
    names = options.pools.split(",")
    if unknown := set(names) - set(POOLS):
        parser.error(f"unknown pools {', '.join(sorted(unknown))}; there are {', '.join(POOLS)}")
    names = [name for name in names if usable(name)]
    size = QUICK if options.quick else FULL

    # numpy has threads of its own, so Python 3.12 and newer warn at every fork.
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
    about = describe(options.workers, size)
    print(
        f"Python {about['python']}, {about['system']}, {about['processors']} processors, "
        f"{options.workers} workers, {size.rounds} rounds: median [smallest-largest]\n"
    )
    samples = run(names, options.workers, size)
    show(samples)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "seconds_or_rates": samples}, file, indent=1)


if __name__ == "__main__":
    main()
