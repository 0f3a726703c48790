"""Shared objects through the executor: what arrives, how often, and what is left."""

from __future__ import annotations

import functools
import gc
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.conftest import eventually
from zmqexecutor import SerializationError, SharedObject, WorkerLostError, ZmqExecutor
from zmqexecutor.wire.buffers import Segments

MB = 1024 * 1024


class Counted:
    """Notes in a file each time that it is unpickled."""

    def __init__(self, file: Path, array: Any) -> None:
        self.file = file
        self.array = array

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        with self.file.open("a") as file:
            file.write(f"{os.getpid()}\n")


class Unloadable:
    """Fails to be unpickled, the first time in a process."""

    failed = False

    def __setstate__(self, _: object) -> None:
        if not Unloadable.failed:
            Unloadable.failed = True
            raise ValueError("not today")

    def __getstate__(self) -> object:
        return 1


@pytest.fixture
def single() -> Iterator[ZmqExecutor]:
    """An executor of one worker."""
    with ZmqExecutor(1) as made:
        yield made


@pytest.fixture(params=["segments", "messages"])
def either(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ZmqExecutor]:
    """An executor of one worker, with and without shared memory."""
    if request.param == "messages":
        monkeypatch.setattr(Segments, "create", classmethod(lambda _cls, _path: None))
    with ZmqExecutor(1) as made:
        if request.param == "segments":
            files(made)
        yield made


def files(executor: ZmqExecutor) -> list[str]:
    segments = executor._engine._pickler.packer.segments
    if segments is None:
        pytest.skip("the private directory is not in /dev/shm")
    return os.listdir(segments._used)


def address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def look(shared: Any) -> tuple[int, int, int, bool]:
    return os.getpid(), id(shared), address(shared["a"]), bool(shared["a"].flags.writeable)


def first(shared: Any) -> int:
    return int(shared["a"][0])


def length(shared: Any) -> int:
    return len(shared)


def total(numbers: Any) -> int:
    return sum(numbers)


def held(_: object = None) -> int:
    from zmqexecutor.payload import shares

    return len(shares._held)


def mapped(pid: int, name: str) -> bool:
    return name in Path(f"/proc/{pid}/maps").read_text()


def knows_nothing(executor: ZmqExecutor) -> bool:
    """Asked outright, since a question through `submit` would itself carry the news."""
    peers = list(executor._engine.master._coordinator.roster)
    return all(not peer._shares and not peer._forgotten for peer in peers)


# ------------------------------------------------------------------- what arrives


def test_the_object_arrives_in_the_place_of_its_handle(either: ZmqExecutor) -> None:
    table = {"a": np.arange(MB), "b": [1, "two"], "c": b"x" * MB}
    handle = either.share(table)
    assert isinstance(handle, SharedObject)
    assert handle.value is table

    def check(one: Any, nested: Any, *, key: Any) -> bool:
        return (
            one is nested["deep"][0]
            and one is key
            and np.array_equal(one["a"], np.arange(MB))
            and one["b"] == [1, "two"]
            and one["c"] == b"x" * MB
        )

    assert either.submit(check, handle, {"deep": [handle]}, key=handle).result()


def test_tasks_of_a_worker_get_the_same_read_only_object(either: ZmqExecutor) -> None:
    handle = either.share({"a": np.zeros(MB)})
    looks = {either.submit(look, handle).result() for _ in range(5)}
    assert len(looks) == 1
    assert not looks.pop()[3]


def test_small_arrays_are_read_only_too(either: ZmqExecutor) -> None:
    handle = either.share({"a": np.arange(1, 5), "empty": np.empty((0, 3))})
    assert either.submit(first, handle).result() == 1
    assert not either.submit(look, handle).result()[3]


@pytest.mark.parametrize("value", [None, 7, "text", b"b" * MB, "t" * MB, (), list(range(10**5))])
def test_plain_values_are_shared(either: ZmqExecutor, value: Any) -> None:
    assert either.submit(lambda got: got, either.share(value)).result() == value


def test_a_share_is_a_snapshot(either: ZmqExecutor) -> None:
    array = np.ones(MB)
    handle = either.share({"a": array})
    array[:] = 2
    assert either.submit(first, handle).result() == 1
    assert handle.value["a"][0] == 2


def test_it_is_unpickled_once_in_each_worker(executor: ZmqExecutor, tmp_path: Path) -> None:
    notes = tmp_path / "unpicklings"
    handle = executor.share(Counted(notes, np.ones(MB)))

    def weigh(shared: Any) -> tuple[int, float]:
        return os.getpid(), float(shared.array.sum())

    done = [future.result() for future in [executor.submit(weigh, handle) for _ in range(60)]]
    assert {value for _, value in done} == {MB}
    assert sorted(notes.read_text().split()) == sorted({str(pid) for pid, _ in done})


def test_through_map_chunks_views_and_methods(executor: ZmqExecutor) -> None:
    handle = executor.share({"a": np.full(MB, 5)})
    assert list(executor.map(first, [handle] * 6)) == [5] * 6
    assert list(executor.map(first, [handle] * 6, chunksize=4)) == [5] * 6
    view = executor.options(priority=1)
    assert view.submit(first, handle).result() == 5
    assert list(view.map(first, [view.share({"a": [6]}), handle])) == [6, 5]


def test_classes_of_the_script_in_a_share(run_script: Any) -> None:
    done = run_script(
        """
        from zmqexecutor import ZmqExecutor

        class Point:
            def __init__(self, x):
                self.x = x

        def double(point):
            return point.x * 2, type(point) is Point

        with ZmqExecutor(1) as executor:
            handle = executor.share([Point(4)])
            print(executor.submit(lambda points: double(points[0]), handle).result())
            print(executor.submit(len, handle).result())
        """
    )
    assert done.stdout.split("\n")[:2] == ["(8, True)", "1"], done.stderr


def test_a_share_may_refer_to_a_share(single: ZmqExecutor) -> None:
    inner = single.share({"a": np.full(MB, 3)})
    outer = single.share({"inner": inner})

    def inner_first(shared: Any) -> int:
        return first(shared["inner"])

    del inner
    assert single.submit(inner_first, outer).result() == 3
    del outer
    assert eventually(lambda: not files(single))
    assert eventually(lambda: knows_nothing(single))


def test_more_shares_in_one_call_than_functions_are_kept(single: ZmqExecutor) -> None:
    handles = [single.share(number) for number in range(600)]
    assert single.submit(total, handles).result() == sum(range(600))


# ------------------------------------------------------------------ how it is freed


def test_without_handle_and_tasks_it_is_gone_from_an_idle_worker(single: ZmqExecutor) -> None:
    handle = single.share({"a": np.zeros(MB)})
    (name,) = files(single)
    pid = single.submit(look, handle).result()[0]
    assert mapped(pid, name)
    assert files(single) == [name]
    del handle
    assert eventually(lambda: not files(single))
    assert eventually(lambda: not mapped(pid, name))
    assert single.submit(held).result() == 0


def test_pending_tasks_keep_it(single: ZmqExecutor, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def wait(gate: Path) -> None:
        assert eventually(gate.exists)

    blocker = single.submit(wait, gate)
    handle = single.share({"a": np.full(MB, 9)})
    share = weakref.ref(handle._share)
    futures = [single.submit(first, handle) for _ in range(5)]
    cancelled = single.submit(first, handle)
    assert cancelled.cancel()
    del handle
    assert share() is not None
    assert len(files(single)) == 1
    gate.touch()
    blocker.result()
    assert [future.result() for future in futures] == [9] * 5
    assert eventually(lambda: share() is None), "no cycle, no future keeps it"
    assert eventually(lambda: not files(single))
    assert eventually(lambda: knows_nothing(single))


def test_the_handle_is_in_no_cycle(single: ZmqExecutor) -> None:
    gc.collect()
    gc.disable()
    try:
        handle = single.share(np.zeros(MB))
        single.submit(length, handle).result()
        share = weakref.ref(handle._share)
        del handle
        assert eventually(lambda: share() is None)
    finally:
        gc.enable()


def test_an_array_that_a_task_kept_stays_intact(single: ZmqExecutor) -> None:
    def keep(shared: Any) -> None:
        import builtins

        builtins.kept = shared["a"]  # type: ignore[attr-defined]

    def kept() -> bool:
        import builtins

        return bool((builtins.kept == 4).all())  # type: ignore[attr-defined]

    handle = single.share({"a": np.full(MB, 4)})
    single.submit(keep, handle).result()
    del handle
    assert eventually(lambda: not files(single))
    for number in range(5):
        single.submit(len, np.full(MB, number)).result()
    assert single.submit(kept).result()


def test_a_hundred_tasks_with_a_table_use_one_segment(executor: ZmqExecutor) -> None:
    table = np.ones(8 * MB)
    handle = executor.share(table)
    pid = os.getpid()
    before = psutil.Process(pid).memory_info().rss

    def weigh(shared: Any) -> tuple[float, int]:
        status = Path("/proc/self/status").read_text()
        own = int(status.partition("RssAnon:")[2].split()[0]) * 1024
        return float(shared.sum()), own

    futures = [executor.submit(weigh, handle) for _ in range(100)]
    assert len(files(executor)) == 1
    done = [future.result() for future in futures]
    assert {value for value, _ in done} == {8 * MB}
    assert len(files(executor)) == 1
    assert psutil.Process(pid).memory_info().rss - before < 32 * MB
    assert max(own for _, own in done) < table.nbytes, "a worker has a copy"


def test_a_thousand_shares_leave_nothing(executor: ZmqExecutor) -> None:
    for number in range(1000):
        array = np.full(MB // 16, number)  # 512 KiB
        handle = executor.share({"a": array})
        if number % 5 == 0:
            assert executor.submit(first, handle).result() == number
    del handle
    assert eventually(lambda: not files(executor))
    assert eventually(lambda: knows_nothing(executor))
    assert set(executor.map(held, range(20))) == {0}


def test_a_busy_worker_is_told_later(single: ZmqExecutor, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    handles = [single.share(number) for number in range(3000)]
    assert single.submit(total, handles).result() == sum(range(3000))
    blocker = single.submit(lambda: eventually(gate.exists))
    assert eventually(blocker.running)
    (worker,) = single._engine.master.workers
    (peer,) = single._engine.master._coordinator.roster
    while handles:
        handles.pop()
    assert eventually(lambda: not peer._shares)
    assert len(peer._forgotten) == 3000, "it is told when it can heed it"
    gate.touch()
    assert blocker.result()
    assert single.submit(held).result() == 0
    assert single._engine.master.workers[0].id == worker.id


# --------------------------------------------------------------- what goes wrong


def test_a_task_that_is_tried_again_gets_it_in_another_worker(
    either: ZmqExecutor, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"

    def die_once(shared: Any) -> int:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return first(shared)

    view = either.options(retries=2, retry_on=WorkerLostError, retry_delay=0.01)
    assert view.submit(die_once, either.share({"a": np.full(MB, 8)})).result() == 8


def test_a_new_worker_is_told(single: ZmqExecutor) -> None:
    handle = single.share({"a": np.full(MB, 8)})
    pid = single.submit(look, handle).result()[0]
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: pid not in {worker.pid for worker in single._engine.master.workers})
    other = single.submit(look, handle).result()[0]
    assert other != pid
    assert single.submit(first, handle).result() == 8


def test_a_foreign_handle_is_refused(executor: ZmqExecutor) -> None:
    with ZmqExecutor(1) as other:
        handle = other.share([1, 2])
        future = executor.submit(length, handle)
        with pytest.raises(SerializationError, match="belongs to the executor that made it"):
            future.result()
        with pytest.raises(SerializationError, match="belongs to the executor that made it"):
            executor.share([handle])
    with pytest.raises(SerializationError, match="belongs to the executor that made it"):
        executor.submit(length, handle).result()  # whose executor has been shut down
    assert executor.submit(length, executor.share(handle.value)).result() == 2
    with pytest.raises(RuntimeError, match="after shutdown"):
        other.submit(length, handle)
    with pytest.raises(RuntimeError, match="after shutdown"):
        other.share(1)
    with pytest.raises(SerializationError, match="belongs to the executor that made it"):
        ZmqExecutor(1, initializer=print, initargs=(handle,))


def test_a_handle_elsewhere_is_refused(single: ZmqExecutor) -> None:
    handle = single.share(1)
    with pytest.raises(TypeError, match="among the arguments of a task"):
        pickle.dumps(handle)
    with pytest.raises(SerializationError, match="among the arguments of a task"):
        single.submit(lambda: handle).result()
    with pytest.raises(SerializationError, match="among the arguments of a task"):
        single.submit(functools.partial(print, handle)).result()

    def nested() -> object:
        with ZmqExecutor(1) as inner:
            return inner.share(2)

    with pytest.raises(SerializationError, match="among the arguments of a task"):
        single.submit(nested).result()


def test_what_cannot_be_pickled_cannot_be_shared(single: ZmqExecutor) -> None:
    with pytest.raises(SerializationError, match="type lock cannot be shared"):
        single.share(threading.Lock())
    with pytest.raises(SerializationError, match="argument 2"):
        single.submit(print, single.share(1), threading.Lock()).result()


def test_a_share_that_cannot_be_unpickled_fails_its_task_only(single: ZmqExecutor) -> None:
    handle = single.share(Unloadable())
    with pytest.raises(SerializationError, match="not today"):
        single.submit(id, handle).result()
    assert single.submit(type, handle).result() is Unloadable  # it is tried anew


def test_without_room_it_travels_in_messages(
    single: ZmqExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Segments, "_has_room", lambda *_: False)
    handle = single.share({"a": np.full(MB, 2)})
    assert not files(single)
    assert single.submit(first, handle).result() == 2


def test_too_large_for_a_message(single: ZmqExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segments, "_has_room", lambda *_: False)
    monkeypatch.setattr("zmqexecutor.payload.packing.LARGEST_DATA", MB)
    with pytest.raises(SerializationError, match="no room in shared memory"):
        single.share(np.zeros(MB))


def test_a_handle_outlives_its_executor() -> None:
    with ZmqExecutor(1) as executor:
        handle = executor.share({"a": np.full(MB, 2)})
        assert executor.submit(first, handle).result() == 2
    assert handle.value["a"][0] == 2
    del executor
    del handle
