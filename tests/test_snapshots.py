"""One array for many tasks: one copy of it, as long as it is the same."""

from __future__ import annotations

import gc
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.conftest import eventually
from tests.test_big_data import files
from tests.test_buffers import segments
from tests.test_share import either
from zmqexecutor import ZmqExecutor
from zmqexecutor.payload import snapshots as module
from zmqexecutor.payload.serialization import CallPickler, CallRunner
from zmqexecutor.payload.snapshots import Snapshots
from zmqexecutor.wire.buffers import MOST_COMPARED, Segments
from zmqexecutor.wire.leases import Lease

__all__ = ["either", "segments"]

BIG = 1024 * 1024
SMALL = 100_000
"""Bytes that travel beside a pickle, and not in a segment."""


def add(array: Any, number: int) -> int:
    array += number
    return int(array[-1])


@pytest.mark.parametrize("size", [SMALL, BIG])
def test_each_task_has_an_array_of_its_own_as_it_was(either: ZmqExecutor, size: int) -> None:
    array = np.zeros(size, dtype=np.uint8)
    futures = []
    for number in range(40):
        if number % 10 == 0:
            array[-1] = number
        futures.append(either.submit(add, array, number % 7))
    assert [future.result(60) for future in futures] == [
        number - number % 10 + number % 7 for number in range(40)
    ]
    assert array[-1] == 30


def test_what_waits_shares_one_copy_that_goes_with_the_last(tmp_path: Any) -> None:
    go = tmp_path / "go"

    def wait() -> None:
        while not go.exists():
            threading.Event().wait(0.01)

    with ZmqExecutor(2) as executor:
        blocked = [executor.submit(wait) for _ in range(2)]
        array = np.zeros(BIG, dtype=np.uint8)
        pair: Any = {"a": array, "b": np.ones(BIG // 8)}
        futures = [executor.submit(add, array, number) for number in range(50)]
        assert len(files(executor)) == 1
        futures += [executor.submit(lambda two: int(two["b"][0]), pair) for _ in range(50)]
        assert len(files(executor)) == 2
        array[5] = 1
        futures += [executor.submit(add, array, number) for number in range(50)]
        assert len(files(executor)) == 3
        for future in futures[:120]:
            assert future.cancel()
        go.touch()
        assert [future.result(60) for future in futures[120:]] == list(range(20, 50))
        del futures, blocked
        assert eventually(lambda: files(executor) == [])
        assert files(executor, "free") != []


_kept: list[Any] = []


def keep(one: Any, number: int) -> int:
    if number == 0:
        _kept.append(one)
    one += number + 1
    return int(one[-1])


def test_a_worker_that_keeps_one_argument_of_two_that_are_the_same(segments: Segments) -> None:
    pickler, runner = CallPickler(segments), CallRunner(segments)
    array = np.zeros(BIG, dtype=np.uint8)
    held = []
    for number in range(3):
        call = pickler.dump_call(keep, (array, number), {})
        assert call.lease is not None
        if number == 0:
            runner.load_function(call.shared.key, call.shared.data)
        outcome = runner.run(call.shared.key, call.data, (), call.lease.lend())
        assert outcome.ok
        held.append(runner.holds())
        call.lease.returned(held[-1])
        if number == 0:
            first = call.lease
        assert call.lease is first
    assert held == [True, False, False]
    _kept.clear()
    del call, first
    gc.collect()
    assert os.listdir(segments._used) == []
    assert os.listdir(segments._free) == []  # it is mapped, so nobody may write to it


def test_what_cannot_be_mapped_for_the_comparison_is_copied(
    segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.zeros(BIG, dtype=np.uint8)
    views = [memoryview(array)]
    snapshots = Snapshots()
    first = snapshots.in_segment(segments, views, ())
    with monkeypatch.context() as patch:
        patch.setattr(segments, "_most_mapped", 0)
        second = snapshots.in_segment(segments, views, ())

    def fail(*_: object, **__: object) -> None:
        raise OSError("too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(segments, "open", fail)
        third = snapshots.in_segment(segments, views, ())
    assert first is not second
    assert second is not third
    assert snapshots.in_segment(segments, views, ()) is third


def test_mappings_for_comparisons_are_few_and_not_inherited(segments: Segments) -> None:
    snapshots = Snapshots()
    arrays = [np.full(BIG // 2, number, dtype=np.uint8) for number in range(MOST_COMPARED + 5)]
    leases = [snapshots.in_segment(segments, [memoryview(array)], ()) for array in arrays]
    for _ in range(2):
        for array, lease in zip(arrays, leases, strict=True):
            assert snapshots.in_segment(segments, [memoryview(array)], ()) is lease
    assert len(segments._mapped) == MOST_COMPARED
    child = os.fork()
    if not child:
        os._exit(len(segments._mapped))
    assert os.waitpid(child, 0)[1] == 0
    assert not segments._mapped
    assert snapshots.in_segment(segments, [memoryview(arrays[0])], ()) is leases[0]
    assert len(segments._mapped) == 1
    del lease
    leases.clear()
    assert not segments._mapped


def test_a_lease_that_ends_cannot_be_had_any_more(
    segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the last task with an array ends in one thread, another one submits it."""
    array, other = bytearray(b"a" * BIG), bytearray(b"b" * BIG)
    snapshots = Snapshots()
    views = [memoryview(array)]
    lease = snapshots.in_segment(segments, views, ())
    assert lease is not None
    name = lease.segment.name
    found: list[Any] = []
    listdir = os.listdir

    def slow_listdir(path: str) -> list[str]:
        monkeypatch.setattr(os, "listdir", listdir)
        thread = threading.Thread(
            target=lambda: found.append(snapshots.in_segment(segments, views, ()))
        )
        thread.start()
        thread.join()
        found.append(segments.open(found[0].segment))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", slow_listdir)
    del lease
    assert found[0].segment.name != name
    assert snapshots.in_segment(segments, [memoryview(other)], ()) is not None
    assert bytes(found[1][0]) == array


def test_an_array_that_is_submitted_when_the_last_task_with_it_ends() -> None:
    def first(array: Any, number: int) -> int:
        return int(array[0])

    def submit(executor: ZmqExecutor, number: int) -> None:
        random = Random(number)
        array = np.full(BIG, number, dtype=np.uint8)
        futures = []
        for count in range(400):
            futures.append(executor.submit(first, array, count))
            threading.Event().wait(random.random() * 0.003)
        assert {future.result(60) for future in futures} == {number}

    with ZmqExecutor(2) as executor, ThreadPoolExecutor(2) as threads:
        list(threads.map(submit, [executor] * 2, range(1, 3)))


class Addressed(bytearray):
    address: ClassVar[Any] = ["not", "a", "number"]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return bytes, (pickle.PickleBuffer(self),)


class Broken(Addressed):
    @property
    def address(self) -> Any:
        raise RuntimeError("no address")


@pytest.mark.parametrize("kind", [Addressed, Broken])
@pytest.mark.parametrize("size", [SMALL, BIG])
def test_what_has_an_address_of_another_kind(either: ZmqExecutor, kind: Any, size: int) -> None:
    assert either.submit(len, kind(size)).result(60) == size


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_KNOWN", 10)
    snapshots = Snapshots()
    arrays = [bytearray(SMALL) for _ in range(11)]
    kept = [snapshots.copies([memoryview(array)]) for array in arrays]
    assert len(snapshots._copies) == 1
    assert snapshots.copies([memoryview(arrays[-1])])[0] is kept[-1][0]
    assert snapshots.copies([memoryview(arrays[0])])[0] is not kept[0][0]


def test_one_copy_in_messages() -> None:
    snapshots = Snapshots()
    array, other = bytearray(SMALL), bytearray(SMALL)
    one = snapshots.copies([memoryview(array), memoryview(other)])
    two = snapshots.copies([memoryview(array), memoryview(other)])
    assert one[0] is two[0]
    assert one[1] is two[1]
    assert one[0] is not one[1]
    array[-1] = 1
    three = snapshots.copies([memoryview(array)])
    assert one[0][-1] == 0
    assert three[0][-1] == 1
    assert snapshots.copies([memoryview(array)])[0] is three[0]
    data = bytes(SMALL)
    assert snapshots.copies([memoryview(data)])[0].obj is data
    del one, two, three
    assert [known() for known in snapshots._copies.values()] == [None, None]


def test_nothing_is_kept_for_later(segments: Segments) -> None:
    snapshots = Snapshots()
    array = np.zeros(BIG, dtype=np.uint8)
    lease: Lease | None = snapshots.in_segment(segments, [memoryview(array)], ())
    assert lease is not None
    assert lease.says([memoryview(array)])
    lease = None
    assert [known() for known in snapshots._leases.values()] == [None]
    assert not segments._mapped
    assert os.listdir(segments._used) == []
    assert len(os.listdir(segments._free)) == 1


@pytest.mark.parametrize("kind", ["frame", "table"])
def test_tables_share_a_copy_too(segments: Segments, kind: str) -> None:
    table: Any
    if kind == "frame":
        pandas = pytest.importorskip("pandas")
        table = pandas.DataFrame({"a": np.arange(BIG), "b": np.ones(BIG)})
    else:
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.table({"a": np.arange(BIG), "b": np.ones(BIG)})
    pickler = CallPickler(segments)
    calls = [pickler.dump_call(len, (table,), {}) for _ in range(5)]
    assert len({id(call.lease) for call in calls}) == 1


def test_threads_that_submit_while_an_array_changes(either: ZmqExecutor) -> None:
    def total(array: Any) -> int:
        return int(array.sum())

    with ThreadPoolExecutor(4) as threads:
        for number in range(20):
            array = np.full(BIG // 4, number, dtype=np.uint8)
            futures = list(threads.map(lambda _, a=array: either.submit(total, a), range(8)))
            assert {future.result(60) for future in futures} == {number * BIG // 4}
