"""Large globals of the script, and large things that functions close over."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import gc
import os
import signal
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from tests.conftest import eventually, sent_by_value
from tests.test_share import either, files
from zmqexecutor import WorkerLostError, ZmqExecutor
from zmqexecutor.payload import shares
from zmqexecutor.payload.bulk import BULK, Bulk, flags
from zmqexecutor.payload.picklers import DefinitionPickler
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

def describe():
    if table is None:
        return None
    flags = table.flags
    return table.shape, table.strides, str(table.dtype), flags.writeable, table.tobytes()

def get_both():
    return both

def grow():
    numbers.append(0)
    return len(numbers)

def grow_too():
    numbers.append(0)
    return len(numbers)
"""


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Any]:
    """A module whose code travels by value, as the script's does."""
    with sent_by_value(f"script_{os.getpid()}_{len(SCRIPT)}", SCRIPT, tmp_path) as module:
        yield module


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


# ----------------------------------------------------------------- proofs of arrays


class Counted:
    """How many pickles definitions are made of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pickles = 0
        dumps = DefinitionPickler.dumps

        def count(pickler: DefinitionPickler, value: Any) -> Any:
            self.pickles += 1
            return dumps(pickler, value)

        monkeypatch.setattr(DefinitionPickler, "dumps", count)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.mark.parametrize("size", [0, 3, 2000, 2047, 2048, 2049, 100_000])
def test_a_global_array_that_has_not_changed_is_not_pickled_again(
    script: Any, counted: Counted, size: int
) -> None:
    script.table = np.arange(float(size))
    pickler = CallPickler()
    calls = [pickler.dump_call(script.first, (), {}) for _ in range(2)]
    before = counted.pickles
    calls += [pickler.dump_call(script.first, (), {}) for _ in range(3)]
    assert counted.pickles == before
    assert len({call.shared.key for call in calls}) == 1
    assert {len(call.shares) for call in calls} == {int(size * 8 + 100 >= BULK)}  # with its form


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Setting these attributes is deprecated since numpy 2.5, and done."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def change_an_item(module: Any) -> None:
    module.table[-1] += 1


def change_its_shape(module: Any) -> None:
    with ignored():
        module.table.shape = (2, -1)


def change_its_type(module: Any) -> None:
    with ignored():
        module.table.dtype = "i8"


def make_it_readonly(module: Any) -> None:
    module.table.flags.writeable = False


def bind_an_equal_one(module: Any) -> None:
    module.table = module.table.copy()


def bind_one_by_columns(module: Any) -> None:
    module.table = np.asfortranarray(module.table.reshape(2, -1))


def bind_another_at_its_place(module: Any) -> None:
    size, ident = module.table.size, id(module.table)
    others: list[Any] = []
    module.table = None
    while True:
        module.table = np.full(size, 3.0)
        if id(module.table) == ident or len(others) > 100:
            return
        others.append(module.table)


def change_and_forget(module: Any) -> None:
    module.table = None
    gc.collect()


@pytest.mark.parametrize("size", [4, 100_000])
@pytest.mark.parametrize(
    "change",
    [
        change_an_item,
        change_its_shape,
        change_its_type,
        make_it_readonly,
        bind_an_equal_one,
        bind_one_by_columns,
        bind_another_at_its_place,
        change_and_forget,
    ],
)
def test_every_change_of_a_global_array_is_seen(script: Any, change: Any, size: int) -> None:
    script.table = np.arange(float(size))
    with ZmqExecutor(1) as executor:
        for _ in range(3):
            assert executor.submit(script.describe).result(60) == script.describe()
        change(script)
        for _ in range(3):
            assert executor.submit(script.describe).result(60) == script.describe()


@pytest.mark.parametrize("size", [4, 100_000])
def test_a_proof_keeps_no_array_alive(script: Any, size: int) -> None:
    script.table = np.arange(float(size))
    pickler = CallPickler()
    for _ in range(3):
        pickler.dump_call(script.first, (), {})
    array = weakref.ref(script.table)
    script.table = None
    assert array() is None


def test_arrays_in_a_container_are_compared_too(script: Any, counted: Counted) -> None:
    script.both = {"small": np.zeros(4), "number": np.float64(1)}
    pickler = CallPickler()
    keys = [pickler.dump_call(script.get_both, (), {}).shared.key for _ in range(3)]
    before = counted.pickles
    keys.append(pickler.dump_call(script.get_both, (), {}).shared.key)
    assert counted.pickles == before
    script.both["small"][0] = 1
    keys.append(pickler.dump_call(script.get_both, (), {}).shared.key)
    script.both["number"] = np.float64(2)
    keys.append(pickler.dump_call(script.get_both, (), {}).shared.key)
    assert [keys.index(key) for key in keys] == [0, 0, 0, 0, 4, 5]


@pytest.mark.parametrize("value", [np.zeros(4), np.zeros(100_000), [0.0] * 4])
def test_a_global_that_another_thread_binds_in_the_middle(
    script: Any, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    """What is pickled has been bound before, and proves nothing of what is bound now."""
    script.table = value
    dumps = DefinitionPickler.dumps

    def bind_another(pickler: DefinitionPickler, obj: Any) -> Any:
        pickled = dumps(pickler, obj)
        if obj is value:
            script.table = [1.0]
        return pickled

    monkeypatch.setattr(DefinitionPickler, "dumps", bind_another)
    with ZmqExecutor(1) as executor:
        assert [executor.submit(script.first).result(60) for _ in range(3)] == [0, 1, 1]


def test_what_no_function_would_send_any_more_is_not_kept(script: Any) -> None:
    """Each of two functions has a definition with the table; one of them is used again."""
    with ZmqExecutor(1) as executor:
        before = files(executor)
        for _ in range(3):
            assert executor.submit(script.first).result(60) == 0
            assert executor.submit(script.fill, 0).result(60) is None
        assert len(files(executor)) == len(before) + 1
        script.table[0] = 1
        assert executor.submit(script.first).result(60) == 1
        assert eventually(lambda: len(files(executor)) == len(before) + 1)
        script.table = None
        assert executor.submit(script.fill, 0).exception(60) is not None
        assert eventually(lambda: files(executor) == before)


def test_an_array_that_the_user_reduces_has_no_proof(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.table = np.zeros(4)
    numbers = iter(range(100))

    def reduce(array: Any) -> Any:
        return np.full, (array.shape, next(numbers))

    monkeypatch.setitem(copyreg.dispatch_table, np.ndarray, reduce)
    pickler = CallPickler()
    keys = {pickler.dump_call(script.first, (), {}).shared.key for _ in range(4)}
    assert len(keys) == 4
