"""`map` over any executor's `submit`: in order or not, in chunks, with a bounded look-ahead."""

from __future__ import annotations

import concurrent.futures
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from queue import Empty, SimpleQueue
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NoReturn, TypeVar

__all__ = ["MappingExecutor"]

T = TypeVar("T")


class MappingExecutor(Executor):
    """An executor whose `map` goes through its `submit`, and has what 3.14's has."""

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

        Without a `buffersize`, all calls of a function find the globals of the script, and the
        variables that it closes over, as the first does: they are looked at once, not for each
        call. Arguments are taken as they are when their call is submitted.

        Args:
            fn: called with as many arguments as there are iterables.
            iterables: where the arguments come from; the shortest one ends it.
            timeout: seconds from this call after which waiting for a result raises.
            chunksize: how many calls travel and run together as one task. Options of
                `ZmqExecutor.options` are those of a task: a timeout counts for a whole
                chunk, and another try is one of all its calls.
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
        results = _results_as_they_come if unordered else _results
        # Submitted at once, the calls are of one and the same function, unless it has a state.
        # The object of a method is an argument.
        function = fn.__func__ if isinstance(fn, MethodType) else fn
        same = buffersize is None and isinstance(function, (FunctionType, BuiltinFunctionType))
        # Generators let go of the executor when all is submitted.
        if chunksize == 1:
            submit = self._submitter(fn, same=same)
            arguments = zip(*iterables)  # noqa: B905  (the shortest one ends it)
            return results((submit(*args) for args in arguments), deadline, buffersize)
        # Not at the top: with it come libraries that the program need not wait for so soon.
        from .payload.namespaces import name_of

        run = partial(_run_chunk, fn)
        # What errors call the task.
        vars(run)["__qualname__"] = name_of(fn)
        submit_chunk = self._submitter(run, same=same)
        submitted = (submit_chunk(*columns) for columns in _chunks(iterables, chunksize))
        return _flattened(results(submitted, deadline, buffersize))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an executor cannot be sent to a worker. An object that holds one can be sent if its "
            "__getstate__ leaves it out; a task may make an executor of its own"
        )

    def _submitter(
        self,
        fn: Callable[..., T],
        *,
        same: bool,  # noqa: ARG002  (for those that can make use of it)
    ) -> Callable[..., Future[T]]:
        """What submits the calls of `fn` for a `map`; if `same`, none sees a later state of it."""
        return partial(self.submit, fn)


def _chunks(
    iterables: Sequence[Iterable[Any]], chunksize: int
) -> Iterator[tuple[tuple[Any, ...], ...]]:
    """The arguments of so many calls, by position: a few long tuples are pickled sooner."""
    if len(iterables) == 1:
        arguments = iter(iterables[0])
        columns = iter(lambda: tuple(itertools.islice(arguments, chunksize)), ())
        return ((column,) for column in columns)
    rows = zip(*iterables)  # noqa: B905  (the shortest one ends it)
    return iter(lambda: tuple(zip(*itertools.islice(rows, chunksize))), ())  # noqa: B905


def _run_chunk(fn: Callable[..., T], *columns: Sequence[Any]) -> list[T]:
    # Not `list(map(fn, *columns))`: a StopIteration out of `fn` would end it without a word.
    if len(columns) == 1:
        return [fn(argument) for argument in columns[0]]
    return [fn(*arguments) for arguments in zip(*columns)]  # noqa: B905  (all are as long)


def _flattened(lists: Iterator[list[T]]) -> Iterator[T]:
    for part in lists:
        part.reverse()
        while part:
            yield part.pop()  # and keep nothing of it


def _results(
    submitted: Iterator[Future[T]], deadline: float | None, buffersize: int | None
) -> Iterator[T]:
    """Submit now, as far as the buffer allows; yield results in order, later.

    Each step of `submitted` submits one.
    """
    futures = deque(itertools.islice(submitted, buffersize))

    def generate() -> Iterator[T]:
        try:
            while futures:
                if buffersize is not None and (future := next(submitted, None)) is not None:
                    futures.append(future)
                    del future
                yield _result_or_cancel(futures.popleft(), deadline)
        finally:
            for future in futures:
                future.cancel()

    return generate()


def _results_as_they_come(
    submitted: Iterator[Future[T]], deadline: float | None, buffersize: int | None
) -> Iterator[T]:
    """The same, but yield each result when it is there."""
    done: SimpleQueue[Future[T]] = SimpleQueue()
    pending: set[Future[T]] = set()

    def submit_some(number: int | None) -> None:
        for future in itertools.islice(submitted, number):
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
    except BaseException:
        future.cancel()
        raise
    finally:
        del future
