"""`ZmqExecutor`: a drop-in replacement for `ProcessPoolExecutor`."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import msgspec

from . import interpreter
from .buffers import Segments
from .calls import Initializer, Setup, boot_code
from .errors import BrokenPoolError, ForkedExecutorError, SerializationError
from .inheritance import inheritable
from .interpreter import python_command, start_path
from .limits import check_rlimits
from .machine import usable_cpus
from .master import Master, MasterOptions
from .protocol import Frame, Result
from .security import PrivateDirectory
from .serialization import CallPickler
from .tasks import Shared, Task
from .workers import Workers

__all__ = ["ZmqExecutor"]

P = ParamSpec("P")
T = TypeVar("T")


class ZmqExecutor(Executor):
    """Runs calls in worker processes that Circus supervises and ZeroMQ reaches.

    It is used like `concurrent.futures.ProcessPoolExecutor`, and differs where that
    one disappoints: lambdas, closures and functions of a script or notebook can be
    submitted, no `__main__` guard is needed, and a worker that dies costs the task
    that it ran and nothing else.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: object = None,  # noqa: ARG002  (part of the signature to be replaced)
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        worker_rlimits: Mapping[str, int] | None = None,
    ) -> None:
        """Start the pool in the background, and return at once.

        Args:
            max_workers: the most worker processes there may be; by default as many
                as this process may use processors. They start as work demands it.
            mp_context: accepted for compatibility; it has no effect, since workers
                are fresh interpreters under any start method.
            initializer: called in each worker before its first task. If it raises,
                the pool is broken.
            initargs: the initializer's arguments.
            max_tasks_per_child: how many tasks a worker does before it is replaced,
                or None for no limit.
            worker_rlimits: resource limits of each worker process, by their names
                in lower case without `RLIMIT_`: "as", "data", "stack", "core" and
                "fsize" in bytes, "cpu" in seconds of processor time, "nofile" and
                "nproc" in numbers, and so on (see the module `resource`).
                `{"data": 2 * 2**30}` makes what needs more than 2 GiB raise
                MemoryError in its task. Each is both the soft and the hard limit;
                one that the system refuses breaks the pool.

        Raises:
            ValueError: a number is not positive, or there is no such resource limit.
            TypeError: an argument has the wrong type.
            SerializationError: the initializer or its arguments cannot be pickled.
            OSError: there is no place for the pool's private directory.
            RuntimeError: executors are nested too deep.
        """
        if interpreter.depth >= interpreter.DEEPEST:
            raise RuntimeError(
                f"executors are nested more than {interpreter.DEEPEST} deep. Most likely a module "
                "makes one when it is imported, and its functions are the tasks: each worker "
                "then imports the module too. Make the executor in a function, or below "
                "`if __name__ == '__main__':`"
            )
        self._max_workers = _check_max_workers(max_workers)
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            if max_tasks_per_child <= 0:
                raise ValueError("max_tasks_per_child must be >= 1")
        rlimits = check_rlimits(worker_rlimits)
        self._pickler = CallPickler()
        self._lock = threading.Lock()
        self._closed = False
        self._pid = os.getpid()
        # Workers that start later look in this process for what these are made of.
        self._initargs = initargs
        self._initializer = _pack_initializer(self._pickler, initializer, initargs)
        self._equipped = False
        directory = PrivateDirectory()
        segments = self._pickler.segments = Segments.create(directory.path)
        self._decode = partial(_decode, CallPickler(segments))
        self._master = _start_master(
            directory, segments, self._max_workers, max_tasks_per_child, rlimits or {}
        )
        # A forgotten executor's workers finish what is pending, and go away.
        weakref.finalize(self, self._master.close).atexit = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Schedule `fn(*args, **kwargs)` in a worker, and return its future.

        What cannot be pickled fails the future, with SerializationError.

        Raises:
            RuntimeError: the executor was shut down, or the interpreter is exiting.
            BrokenPoolError: the pool cannot run tasks any more.
            ForkedExecutorError: the executor was made before this process was forked.
        """
        self._check_open()
        future: Future[T] = Future()
        try:
            call = self._pickler.dump_call(fn, args, kwargs)
        except SerializationError as error:
            future.set_exception(error)
            return future
        task = Task(
            future,
            call.data,
            self._decode,
            name=getattr(fn, "__qualname__", None) or type(fn).__name__,
            shared=Shared(call.function_id, call.function),
            buffers=call.buffers,
            lease=call.lease,
        )
        with self._lock:
            self._check_open()
            if not self._equipped:
                # Not before: as with the standard library, what the program changes
                # up to its first task (sys.path, directory, environment) is seen there.
                shared = self._pickler.segments is not None
                setup = Setup.of_this_process(self._initializer, shared)
                self._master.equip(msgspec.msgpack.encode(setup))
                self._equipped = True
            self._master.submit(task)
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        unordered: bool = False,
    ) -> Iterator[T]:
        """Return an iterator over `map(fn, *iterables)`, computed in the workers.

        Args:
            fn: called with as many arguments as there are iterables.
            iterables: where the arguments come from; the shortest one ends it.
            timeout: seconds from this call after which waiting for a result raises.
            chunksize: how many calls travel and run together as one task.
            buffersize: how many tasks may be submitted ahead of the result that is
                being waited for; the iterables are then consumed as results are.
                None consumes them at once.
            unordered: yield results as they come, not in the order of the arguments.

        Raises:
            ValueError: `chunksize` or `buffersize` is less than 1.
            TypeError: `buffersize` is not an integer.
            TimeoutError: raised by the iterator when the timeout is over.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None:
            if not isinstance(buffersize, int):
                raise TypeError("buffersize must be an integer or None")
            if buffersize < 1:
                raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else time.monotonic() + timeout
        arguments = zip(*iterables)  # noqa: B905  (the shortest one ends it)
        results = _results_as_they_come if unordered else _results
        if chunksize == 1:
            submits = (partial(self.submit, fn, *args) for args in arguments)
            return results(submits, deadline, buffersize)
        run = partial(_run_chunk, fn)
        chunks = iter(lambda: tuple(itertools.islice(arguments, chunksize)), ())
        chunked = (partial(self.submit, run, chunk) for chunk in chunks)
        lists: Iterator[list[T]] = results(chunked, deadline, buffersize)
        return _flattened(lists)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks, and end the workers when the pending ones are done.

        Args:
            wait: return when all is done and the workers have ended; otherwise at
                once, and they end in the background.
            cancel_futures: cancel the tasks that have not been sent to a worker.
        """
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
            self._master.close(cancel=cancel_futures)
        if wait:
            self._master.join()

    def terminate_workers(self) -> None:
        """Shut down now: cancel what is queued, and end the workers by SIGTERM.

        Returns at once. Tasks that were running fail with BrokenPoolError. Workers
        that do not heed SIGTERM within seconds are killed.
        """
        self._abort(BrokenPoolError("terminate_workers() ended the worker of this task"))

    def kill_workers(self) -> None:
        """Shut down now: cancel what is queued, and end the workers by SIGKILL.

        Returns at once. Tasks that were running fail with BrokenPoolError.
        """
        self._abort(BrokenPoolError("kill_workers() ended the worker of this task"), kill=True)

    def _abort(self, reason: BaseException, *, kill: bool = False) -> None:
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
            self._master.abort(reason, kill=kill)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        if exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
            # Whoever pressed Ctrl-C does not want to wait for what was running.
            self._abort(exc or KeyboardInterrupt())
            self._master.join()
        else:
            self.shutdown(wait=True)
        return None

    def _check_open(self) -> None:
        if self._pid != os.getpid():
            raise ForkedExecutorError(
                "this executor belongs to the process that made it, not to its forked child; "
                "make a new one in the child"
            )
        if self._master.broken:
            raise self._master.broken
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self._master.exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")


def _decode(pickler: CallPickler, result: Result, buffers: Sequence[Frame]) -> Any:
    return pickler.load_outcome(result.ok, result.data, buffers, result.segment)


def _run_chunk(fn: Callable[..., T], chunk: Sequence[tuple[Any, ...]]) -> list[T]:
    return [fn(*args) for args in chunk]


def _flattened(lists: Iterator[list[T]]) -> Iterator[T]:
    for part in lists:
        part.reverse()
        while part:
            yield part.pop()  # and keep nothing of it


def _results(
    submits: Iterator[Callable[[], Future[T]]], deadline: float | None, buffersize: int | None
) -> Iterator[T]:
    """Submit now, as far as the buffer allows; yield results in order, later."""
    futures = deque(submit() for submit in itertools.islice(submits, buffersize))

    def generate() -> Iterator[T]:
        try:
            while futures:
                if buffersize is not None and (submit := next(submits, None)) is not None:
                    futures.append(submit())
                yield _result_or_cancel(futures.popleft(), deadline)
        finally:
            for future in futures:
                future.cancel()

    return generate()


def _results_as_they_come(
    submits: Iterator[Callable[[], Future[T]]], deadline: float | None, buffersize: int | None
) -> Iterator[T]:
    """The same, but yield each result when it is there."""
    done: SimpleQueue[Future[T]] = SimpleQueue()
    pending: set[Future[T]] = set()

    def submit_some(number: int | None) -> None:
        for submit in itertools.islice(submits, number):
            future = submit()
            pending.add(future)
            future.add_done_callback(done.put)

    submit_some(buffersize)

    def next_done() -> Future[T]:
        try:
            future = done.get(
                timeout=None if deadline is None else max(0.0, deadline - time.monotonic())
            )
        except Empty:
            raise concurrent.futures.TimeoutError from None
        pending.discard(future)
        return future

    def generate() -> Iterator[T]:
        try:
            while pending:
                future = [next_done()]  # a list, to be emptied before the yield
                if buffersize is not None:
                    submit_some(1)
                yield _result_or_cancel(future.pop(), deadline)
        finally:
            for unwanted in pending:
                unwanted.cancel()

    return generate()


def _result_or_cancel(future: Future[T], deadline: float | None) -> T:
    # In a function of its own, so that the iterator keeps nothing of what it yields.
    try:
        return future.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
    finally:
        future.cancel()
        del future


def _check_max_workers(max_workers: int | None) -> int:
    if max_workers is None:
        return usable_cpus()
    if not isinstance(max_workers, int):
        raise TypeError(f"max_workers must be an integer, not {type(max_workers).__name__}")
    if max_workers <= 0:
        raise ValueError("max_workers must be greater than 0")
    return max_workers


def _pack_initializer(
    pickler: CallPickler, initializer: Callable[..., object] | None, initargs: tuple[Any, ...]
) -> Initializer | None:
    if initializer is None:
        return None
    with inheritable():
        call = pickler.dump_call(initializer, tuple(initargs), {})
    buffers = [bytes(buffer) for buffer in call.buffers]
    return Initializer(call.function_id, call.function, call.data, buffers)


def _start_master(
    directory: PrivateDirectory,
    segments: Segments | None,
    max_workers: int,
    allowance: int | None,
    rlimits: dict[str, int],
) -> Master:
    endpoint = f"ipc://{directory.path}/control"
    command = python_command(boot_code(start_path(), endpoint, directory.path, rlimits))
    options = MasterOptions(
        endpoint=endpoint,
        work=f"ipc://{directory.path}/work",
        setup=None,
        max_workers=max_workers,
        allowance=allowance,
        finish_at_exit=True,
        segments=segments,
    )
    group = Workers(command, 1, directory=directory.path, remove_directory=True, rlimits=rlimits)
    master = Master(options, group, cleanup=directory.close)
    master.start()
    return master
