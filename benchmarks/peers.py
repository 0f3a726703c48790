"""The pools that are compared, each behind the same four methods.

To add one, write a function that makes a `Pool` of so many workers, and an entry in
PEERS. An adapter adds as little as it can: where a pool has the interface of
`concurrent.futures.Executor`, its own `submit` is called directly.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks import limits, tasks


class NotOfferedError(Exception):
    """The pool has no such thing; the message is what the table says, in a few words."""


class Pool:
    """What workloads see of a pool. This one adapts an Executor."""

    def __init__(self, executor: Any, close: Callable[[], object] | None = None) -> None:
        self.executor = executor
        self.submit: Callable[..., Any] = executor.submit
        self._close = close

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int) -> Iterable[Any]:
        results: Iterable[Any] = self.executor.map(fn, items, chunksize=chunksize)
        return results

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        """One call, to its result."""
        return self.submit(fn, *args).result()

    def shutdown(self) -> None:
        self.executor.shutdown()
        if self._close:
            self._close()


class _Adapted(Pool):
    """A pool without the Executor's interface."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor


class _MultiprocessingPool(_Adapted):
    """`multiprocessing.Pool`, and mpire's pool, whose interface is modelled on it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.executor.apply_async(
            fn, args, kwargs, callback=future.set_result, error_callback=future.set_exception
        )
        return future

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int) -> Iterable[Any]:
        results: Iterable[Any] = self.executor.map(fn, items, chunksize)
        return results

    def shutdown(self) -> None:
        self.executor.close()
        self.executor.join()


class _MpirePool(_MultiprocessingPool):
    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int) -> Iterable[Any]:
        results: Iterable[Any] = self.executor.map(
            fn,
            [(item,) for item in items],  # it would unpack those that are tuples
            chunk_size=chunksize,
            concatenate_numpy_output=False,
        )
        return results

    def shutdown(self) -> None:
        self.executor.stop_and_join()


class _PebblePool(_Adapted):
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return self.executor.schedule(fn, args, kwargs)

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int) -> Iterable[Any]:
        results: Iterable[Any] = self.executor.map(fn, items, chunksize=chunksize).result()
        return results

    def shutdown(self) -> None:
        self.executor.close()
        self.executor.join()


class _JoblibPool(_Adapted):
    """joblib's `Parallel`, which runs many calls at once and has no `submit`."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        raise NotOfferedError("no submit")

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int) -> Iterable[Any]:
        from joblib import delayed

        self.executor.batch_size = chunksize
        results: Iterable[Any] = self.executor(delayed(fn)(item) for item in items)
        return results

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        from joblib import delayed

        return self.executor([delayed(fn)(*args)])[0]

    def shutdown(self) -> None:
        self.executor.__exit__(None, None, None)


class _RayPool(_Adapted):
    def __init__(self, ray: Any) -> None:
        self.executor = ray
        self._remote: dict[Any, Any] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        remote = self._remote.get(fn)
        if remote is None:
            remote = self._remote[fn] = self.executor.remote(fn)
        return remote.remote(*args, **kwargs).future()

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int) -> Iterable[Any]:
        if chunksize > 1:
            raise NotOfferedError("no chunks")
        remote = self.executor.remote(fn)
        results: Iterable[Any] = self.executor.get([remote.remote(item) for item in items])
        return results

    def shutdown(self) -> None:
        self.executor.shutdown()


class _Unchunked(Pool):
    """An Executor whose `map` ignores `chunksize`."""

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int) -> Iterable[Any]:
        if chunksize > 1:
            raise NotOfferedError("no chunks")
        results: Iterable[Any] = self.executor.map(fn, items)
        return results


# ---------------------------------------------------------------- how each is made


def _make_ours(workers: int, **options: Any) -> Pool:
    from zmqexecutor import ZmqExecutor

    return Pool(ZmqExecutor(workers, **options))


def _make_standard(method: str) -> Callable[..., Pool]:
    def make(workers: int, **options: Any) -> Pool:
        context = multiprocessing.get_context(method)
        return Pool(ProcessPoolExecutor(workers, context, **options))

    return make


def _make_multiprocessing(workers: int, max_tasks_per_child: int | None = None) -> Pool:
    return _MultiprocessingPool(multiprocessing.Pool(workers, maxtasksperchild=max_tasks_per_child))


def _make_loky(workers: int) -> Pool:
    from loky import ProcessPoolExecutor as Loky

    return Pool(Loky(workers))


def _make_joblib(workers: int) -> Pool:
    from joblib import Parallel

    return _JoblibPool(Parallel(n_jobs=workers).__enter__())


def _make_pebble(workers: int, max_tasks_per_child: int = 0) -> Pool:
    from pebble import ProcessPool

    return _PebblePool(ProcessPool(workers, max_tasks_per_child))


def _make_mpire(workers: int) -> Pool:
    from mpire import WorkerPool

    return _MpirePool(WorkerPool(workers, keep_alive=True))


def _make_executorlib(workers: int) -> Pool:
    from executorlib import SingleNodeExecutor

    return _Unchunked(SingleNodeExecutor(max_workers=workers, block_allocation=True))


def _make_dask(workers: int) -> Pool:
    from distributed import Client, LocalCluster

    cluster = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
    client = Client(cluster)

    def close() -> None:
        client.close()
        cluster.close()

    return _Unchunked(client.get_executor(pure=False), close)


def _make_ipyparallel(workers: int) -> Pool:
    import ipyparallel

    cluster = ipyparallel.Cluster(n=workers, log_level=40)
    client = cluster.start_and_connect_sync()

    def close() -> None:
        client.close()
        cluster.stop_cluster_sync()

    return _Unchunked(client.load_balanced_view().executor, close)


def _make_parsl(workers: int) -> Pool:
    from parsl.concurrent import ParslPoolExecutor
    from parsl.config import Config
    from parsl.executors import HighThroughputExecutor
    from parsl.providers import LocalProvider

    directory = tempfile.TemporaryDirectory(prefix="benchmarks-parsl-")
    pilot = HighThroughputExecutor(
        address="127.0.0.1",
        max_workers_per_node=workers,
        cores_per_worker=0.001,
        provider=LocalProvider(init_blocks=1, max_blocks=1),
    )
    config = Config(executors=[pilot], run_dir=directory.name, usage_tracking=0)
    return _Unchunked(ParslPoolExecutor(config), directory.cleanup)


def _make_ray(workers: int) -> Pool:
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=40)
    return _RayPool(ray)


# ---------------------------------------------------------------- the list


@dataclass(frozen=True)
class Peer:
    """A pool that may be compared.

    Attributes:
        make: makes it with so many workers.
        distribution: what to install for it; empty for the standard library.
        statement: what a program imports to use it.
        making: how it makes a pool: an expression, with `{workers}` for their number.
        calling: how it has that `pool` do a task.
        closing: how it closes the pool.
        start_method: of multiprocessing, if it needs a certain one.
        heavy: whether it starts servers, which takes seconds; `--quick` leaves it out.
        recycles: whether `make` takes `max_tasks_per_child`.
        limit: whether it is no pool but a limit of what pools could reach.
    """

    make: Callable[..., Pool]
    distribution: str = ""
    statement: str = ""
    making: str = ""
    calling: str = "pool.submit(abs, -1).result()"
    closing: str = "pool.shutdown()"
    start_method: str = ""
    heavy: bool = False
    recycles: bool = False
    limit: bool = False

    def load(self) -> None:
        """Import it."""
        if self.statement:
            importlib.import_module(self.statement.split()[1])

    def missing(self) -> str | None:
        """Why it cannot run here, if it cannot."""
        if self.start_method and self.start_method not in multiprocessing.get_all_start_methods():
            return "this system has no such start method"
        module = self.statement.split()[1].partition(".")[0] if self.statement else ""
        if module and importlib.util.find_spec(module) is None:
            return f"not installed: pip install {self.distribution!r}"
        return None


_STANDARD = "import concurrent.futures.process"


def _standard(method: str, **others: Any) -> Peer:
    return Peer(
        _make_standard(method),
        statement=_STANDARD,
        making="concurrent.futures.ProcessPoolExecutor("
        f"{{workers}}, concurrent.futures.process.mp.get_context({method!r}))",
        start_method=method,
        **others,
    )


def _heavy(make: Callable[..., Pool], distribution: str, module: str) -> Peer:
    """One that starts servers, and takes some lines to make."""
    return Peer(
        make,
        distribution,
        f"import {module}",
        making=f"__import__('benchmarks.peers').peers.{make.__name__}({{workers}})",
        calling="pool.call(__import__('benchmarks.tasks').tasks.nothing)",
        heavy=True,
    )


OURS, BASE = "zmqexecutor", "fork"
PEERS = {
    OURS: Peer(
        _make_ours,
        "zmqexecutor",
        "from zmqexecutor import ZmqExecutor",
        "ZmqExecutor({workers})",
        recycles=True,
    ),
    BASE: _standard("fork"),
    "spawn": _standard("spawn", recycles=True),
    "forkserver": _standard("forkserver", recycles=True),
    "mp.Pool": Peer(
        _make_multiprocessing,
        "",
        "import multiprocessing.pool",
        "multiprocessing.pool.Pool({workers})",
        "pool.apply(abs, (-1,))",
        "pool.close(); pool.join()",
        recycles=True,
    ),
    "loky": Peer(_make_loky, "loky", "import loky", "loky.ProcessPoolExecutor({workers})"),
    "joblib": Peer(
        _make_joblib,
        "joblib",
        "import joblib",
        "joblib.Parallel({workers}).__enter__()",
        "pool([joblib.delayed(abs)(-1)])",
        "pool.__exit__(None, None, None)",
    ),
    "pebble": Peer(
        _make_pebble,
        "pebble",
        "import pebble",
        "pebble.ProcessPool({workers})",
        "pool.schedule(abs, (-1,)).result()",
        "pool.close(); pool.join()",
        recycles=True,
    ),
    "mpire": Peer(
        _make_mpire,
        "mpire",
        "import mpire",
        "mpire.WorkerPool({workers}, keep_alive=True)",
        "pool.apply(abs, (-1,))",
        "pool.stop_and_join()",
    ),
    "executorlib": _heavy(_make_executorlib, "executorlib", "executorlib"),
    "dask": _heavy(_make_dask, "distributed", "distributed"),
    "ipyparallel": _heavy(_make_ipyparallel, "ipyparallel", "ipyparallel"),
    "parsl": _heavy(_make_parsl, "parsl", "parsl"),
    "ray": _heavy(_make_ray, "ray", "ray"),
    "serial loop": Peer(lambda _: limits.Serial(), limit=True),
    "memory copy": Peer(lambda _: limits.MemoryCopy(), limit=True),
    "zmq echo": Peer(lambda _: limits.ZmqEcho(), "pyzmq", "import zmq", limit=True),
    "zmq futures": Peer(lambda _: limits.ZmqFutures(), "pyzmq", "import zmq", limit=True),
}


def warm(pool: Any, workers: int, seconds: float = 30) -> None:
    """Return when all workers have been seen at work.

    Raises:
        TimeoutError: they have not within so many seconds.
    """
    deadline = time.monotonic() + seconds
    seen: set[int] = set()
    while len(seen) < workers:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(seen)} of {workers} workers came up in {seconds:g} s")
        if isinstance(pool, _JoblibPool):
            seen.update(pool.map(tasks.pid_after, [0.05] * workers, 1))
        else:
            futures = [pool.submit(tasks.pid_after, 0.05) for _ in range(workers)]
            seen.update(future.result(seconds) for future in futures)
