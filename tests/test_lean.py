"""Futures that cost less to make: whatever works with the standard library's works with them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from zmqexecutor.master import lean
from zmqexecutor.master.lean import LeanCondition, LeanFuture


def later(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def asleep(future: Future[int]) -> int:
    sleepers = future._condition.sleepers  # type: ignore[attr-defined]
    return len(sleepers or ())


def test_it_has_all_the_parts_of_this_versions_futures() -> None:
    assert lean._KNOWN
    future: LeanFuture[int] = LeanFuture()
    for name, value in vars(Future()).items():
        if name != "_condition":
            assert getattr(future, name) == value


def test_a_list_is_made_once() -> None:
    future: LeanFuture[int] = LeanFuture()
    waiters = future._waiters
    assert future._waiters is waiters
    assert future._done_callbacks is not waiters
    assert LeanFuture[int]()._waiters is not waiters


def test_all_threads_that_wait_get_the_result() -> None:
    future = LeanFuture[int]()
    got: list[int] = []
    threads = [later(lambda: got.append(future.result(20))) for _ in range(5)]
    future.set_running_or_notify_cancel()
    future.set_result(3)
    for thread in threads:
        thread.join()
    assert got == [3] * 5


def test_who_waits_for_a_while_is_told_that_it_is_over() -> None:
    future = LeanFuture[int]()
    for seconds in (0, 0.001, -1):
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(seconds)
    future.set_exception(ValueError("why"))
    with pytest.raises(ValueError, match="why"):
        future.result(0)


def test_nothing_is_left_of_those_that_have_waited_in_vain() -> None:
    future: LeanFuture[int] = LeanFuture()
    for _ in range(10):
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(0.0001)
    assert asleep(future) == 0


def test_who_waits_does_not_keep_the_lock() -> None:
    future = LeanFuture[int]()

    def wait() -> None:
        with contextlib.suppress(concurrent.futures.CancelledError):
            future.result(20)

    thread = later(wait)
    assert future.cancel()
    future.set_running_or_notify_cancel()
    thread.join()
    assert future.cancelled()


def test_a_condition_is_a_lock_that_its_owner_may_take_again() -> None:
    condition = LeanCondition()
    taken: list[bool] = []
    with condition, condition:
        assert not condition.wait(0)
        condition.notify_all()
        later(lambda: taken.append(condition.acquire(blocking=False))).join()
    assert taken == [False]


def test_who_does_not_own_it_cannot_wait() -> None:
    with pytest.raises(RuntimeError):
        LeanCondition().wait(0)


def test_they_can_be_waited_for_together() -> None:
    futures = [LeanFuture[int]() for _ in range(3)]

    def complete() -> None:
        for number, future in enumerate(futures):
            future.set_running_or_notify_cancel()
            future.set_result(number)

    thread = later(complete)
    assert sorted(f.result() for f in concurrent.futures.as_completed(futures, 20)) == [0, 1, 2]
    assert concurrent.futures.wait(futures, 20).not_done == set()
    thread.join()


def test_callbacks_are_called_once_with_the_future() -> None:
    future = LeanFuture[int]()
    called: list[Future[int]] = []
    future.add_done_callback(called.append)
    future.set_running_or_notify_cancel()
    future.set_result(1)
    future.add_done_callback(called.append)
    assert called == [future, future]
    with pytest.raises(concurrent.futures.InvalidStateError):
        future.set_result(2)
    assert "finished" in repr(future)


def test_they_take_less_memory() -> None:
    def size(make: Callable[[], object]) -> int:
        tracemalloc.start()
        kept = [make() for _ in range(1000)]
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(kept) == 1000
        return size

    assert size(LeanFuture) < size(Future) / 3


def test_who_asks_for_an_exception_leaves_no_cycle() -> None:
    class Local:
        pass

    def ask() -> tuple[weakref.ref[Any], weakref.ref[Any]]:
        future: LeanFuture[int] = LeanFuture()
        local = Local()
        future.set_running_or_notify_cancel()
        future.set_exception(ValueError("why"))
        refs = weakref.ref(future), weakref.ref(local)
        futures = [future]  # emptied at the call: this frame is in the traceback too
        del future
        with contextlib.suppress(ValueError):
            futures.pop().result()
        return refs

    gc.disable()
    try:
        assert [ref() for ref in ask()] == [None, None]
    finally:
        gc.enable()
