"""Large globals of the script, and large things that functions close over."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle
import numpy as np
import pytest

from tests.conftest import eventually
from tests.test_share import either, files
from zmqexecutor import WorkerLostError, ZmqExecutor
from zmqexecutor.payload import shares
from zmqexecutor.payload.bulk import BULK, Bulk, flags
from zmqexecutor.payload.serialization import CallPickler
from zmqexecutor.payload.shares import Share
from zmqexecutor.wire.leases import Lease

__all__ = ["either"]

SCRIPT = """
import os
import numpy as np

table = np.zeros(1_000_000)
frozen = np.ones(100_000)
frozen.flags.writeable = False
columns = np.asfortranarray(np.arange(60_000.0).reshape(200, 300))
numbers = list(range(50_000))
text = "ten chars." * 100_000
small = np.arange(10)
both = {"table": table, "name": "both"}

def first():
    return float(table[0])

def count():
    table[0] += 1
    return float(table[0]), id(table)

def look():
    return (
        table.flags.writeable, frozen.flags.writeable, columns.flags.f_contiguous,
        float(columns[7, 8]), numbers[-1], len(text), both["table"] is table,
    )

def last():
    return numbers[-1], small.tolist()

def fill(value):
    table[:] = value

def grow():
    numbers.append(0)
    return len(numbers)

def grow_too():
    numbers.append(0)
    return len(numbers)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module whose code travels by value, as the script's does."""
    name = f"script_{os.getpid()}_{len(SCRIPT)}"
    (tmp_path / f"{name}.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(name)
    cloudpickle.register_pickle_by_value(module)
    yield module
    cloudpickle.unregister_pickle_by_value(module)
    del sys.modules[name]


def test_what_arrives(either: ZmqExecutor, script: Any) -> None:
    found = either.submit(script.look).result(60)
    assert found == (True, False, True, 2108.0, 49_999, 1_000_000, True)


def test_a_change_is_seen_and_nothing_else_comes_again(either: ZmqExecutor, script: Any) -> None:
    """What a task writes stays in its worker until the script changes the global."""
    assert either.submit(script.first).result(60) == 0
    counts, objects = zip(*[either.submit(script.count).result(60) for _ in range(3)], strict=True)
    assert counts == (1, 2, 3)
    assert len(set(objects)) == 1
    assert script.table[0] == 0
    script.table[999_999] = 1  # somewhere
    assert either.submit(script.count).result(60)[0] == 1
    script.table = np.full(1_000_000, 5.0)
    assert either.submit(script.first).result(60) == 5
    script.table.flags.writeable = False
    error = either.submit(script.count).exception(60)
    assert "read-only" in str(error)
    script.table = np.full(10, 3.0)
    assert either.submit(script.first).result(60) == 3
    script.numbers[-1] = -1
    script.small[0] = 9
    assert either.submit(script.last).result(60) == (-1, [9, 1, 2, 3, 4, 5, 6, 7, 8, 9])


def test_pending_tasks_have_what_was_there_at_their_submit(
    either: ZmqExecutor, script: Any
) -> None:
    futures = []
    for value in range(20):
        script.table[0] = value
        futures.append(either.submit(script.first))
    assert [future.result(60) for future in futures] == list(range(20))


def test_one_copy_for_all_tasks_and_none_that_is_not_needed(script: Any) -> None:
    with ZmqExecutor(2) as executor:
        before = files(executor)
        assert set(executor.map(call, [script.first] * 50)) == {0}
        assert len(set(files(executor)) - set(before)) == 1
        for value in range(1, 6):
            script.table[0] = value
            assert executor.submit(script.first).result(60) == value
        assert eventually(lambda: len(files(executor)) == len(before) + 1)
        script.table = None
        with pytest.raises(TypeError):
            executor.submit(script.first).result(60)
        assert eventually(lambda: files(executor) == before)


def call(fn: Any) -> Any:
    return fn()


def check_closures(executor: ZmqExecutor) -> None:
    array = np.zeros(500_000)

    def get(index: int) -> float:
        return float(array[index])

    assert executor.submit(get, 3).result(60) == 0
    array[3] = 7
    assert [executor.submit(get, 3).result(60) for _ in range(3)] == [7, 7, 7]
    assert list(executor.map(lambda i: array[i] + 1, range(2, 5))) == [1, 8, 1]


def test_what_a_function_closes_over(either: ZmqExecutor) -> None:
    check_closures(either)
    gc.collect()
    if either._engine._pickler.packer.segments is not None:
        assert either.submit(abs, -1).result(60) == 1
        assert eventually(lambda: files(either) == [])


def test_other_workers_get_it_too(script: Any) -> None:
    with ZmqExecutor(1) as executor:
        script.table[0] = 4
        assert executor.submit(script.first).result(60) == 4
        error = executor.submit(os.kill, executor.submit(os.getpid).result(60), signal.SIGKILL)
        assert isinstance(error.exception(60), WorkerLostError)
        assert executor.submit(script.first).result(60) == 4


def test_an_initializer_may_fill_it(script: Any) -> None:
    with ZmqExecutor(1, initializer=script.fill, initargs=(6,)) as executor:
        assert [executor.submit(script.first).result(60) for _ in range(2)] == [6, 6]
        assert script.table[0] == 0


def test_it_is_compared_and_packed_only_when_it_differs(script: Any) -> None:
    made: list[Share] = []
    pickler = CallPickler()
    pickler.packer.on_share = made.append
    calls = [pickler.dump_call(script.first, (), {}) for _ in range(3)]
    assert [len(call.shares) for call in calls] == [1, 1, 1]
    assert len({call.shared.key for call in calls}) == 1
    assert len(calls[0].shared.data) < BULK
    assert len(made) == 1
    script.table[-1] = 1
    assert pickler.dump_call(script.first, (), {}).shared.key != calls[0].shared.key
    assert len(made) == 2


def test_the_comparison() -> None:
    kept = [b"pickle", b"\0" * 100_000, b""]
    share = Share(b"", None, None, frozenset(), ())
    views = [memoryview(bytearray(part)) for part in kept[1:]]
    bulk = Bulk(share, [memoryview(part) for part in kept], flags(views))
    assert bulk.says(b"pickle", views)
    assert not bulk.says(b"pickl_", views)
    assert not bulk.says(b"pickle!", views)
    assert not bulk.says(b"pickle", views[:1])
    assert not bulk.says(b"pickle", [views[0][1:], views[1]])
    assert not bulk.says(b"pickle", [view.toreadonly() for view in views])
    views[0][99_999] = 1
    assert not bulk.says(b"pickle", views)


def test_equal_contents_are_no_change(script: Any) -> None:
    """Whatever is packed for them: what tasks write stays."""
    with ZmqExecutor(1) as executor:
        one, other = [str(i) * 20 for i in range(1500)], [str(i) * 21 for i in range(1500)]
        script.numbers = one
        assert executor.submit(script.grow).result(60) == 1501
        script.numbers = other
        assert executor.submit(script.grow_too).result(60) == 1501
        script.numbers = one
        found = [executor.submit(f).result(60) for f in (script.grow, script.grow_too) * 3]
        assert found == list(range(1501, 1507))


def test_threads_that_submit_at_once(script: Any) -> None:
    with ZmqExecutor(1) as executor, ThreadPoolExecutor(4) as threads:
        for start in range(0, 500, 100):
            script.table = np.full(1_000_000, float(start))
            futures = list(threads.map(executor.submit, [script.count] * 8))
            counts = sorted(future.result(60)[0] - start for future in futures)
            assert counts == list(range(1, 9))


def test_functions_that_are_made_anew() -> None:
    pickler = CallPickler()
    numbers = tuple(range(20_000))
    calls = [pickler.dump_call(functools.partial(call, numbers), (), {}) for _ in range(5)]
    assert len({call.shared.key for call in calls}) == 1


def test_what_initializers_use_reaches_shared_memory(script: Any) -> None:
    with ZmqExecutor(1, initializer=script.fill, initargs=(6,)) as executor:
        assert executor.submit(script.first).result(60) == 6
        assert files(executor) != []
        held = executor.submit(lambda: len(shares._held)).result(60)
        assert held == 1  # that of the task


def test_no_room_for_a_mapping(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Lease) -> NoReturn:
        raise OSError("too many open files")

    monkeypatch.setattr(Lease, "views", fail)
    with ZmqExecutor(1) as executor:
        assert executor.submit(script.first).result(60) == 0
        assert eventually(lambda: files(executor) == [])
