"""Big arrays through the executor: what arrives, who owns it, and what is left."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import eventually
from zmqexecutor import SerializationError, WorkerLostError, ZmqExecutor
from zmqexecutor.wire.buffers import Segments
from zmqexecutor.wire.journal import _END

BIG = 1024 * 1024


def identity(value: Any) -> Any:
    return value


def files(executor: ZmqExecutor, folder: str = "segments") -> list[str]:
    segments = executor._engine._pickler.packer.segments
    if segments is None:
        pytest.skip("the private directory is not in /dev/shm")
    return os.listdir(Path(segments._used).parent / folder)


def arrays() -> list[Any]:
    numbers = np.arange(BIG, dtype=np.int32)
    structured = np.zeros(BIG // 8, dtype=[("a", "i4"), ("b", "f8")])
    structured["a"] = 7
    return [
        numbers,
        np.asfortranarray(numbers.reshape(1024, -1)),
        numbers[::3],
        structured,
        np.array([{"a": 1}, None, "x"], dtype=object),
        np.array(3.5),
        np.empty((0, 5)),
        np.zeros(BIG, dtype="U2"),
    ]


@pytest.mark.parametrize("number", range(len(arrays())))
def test_an_array_goes_there_and_back(executor: ZmqExecutor, number: int) -> None:
    array = arrays()[number]
    back = executor.submit(identity, array).result()
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.flags.f_contiguous == array.flags.f_contiguous or not array.flags.contiguous
    assert np.array_equal(back, array)
    assert back.flags.writeable
    if back.size and back.dtype != object:
        back.fill(back.flat[0])


@pytest.mark.parametrize(
    "value", [os.urandom(BIG), bytearray(os.urandom(BIG)), "é" * BIG, [os.urandom(BIG)] * 2]
)
def test_plain_data_goes_there_and_back(executor: ZmqExecutor, value: Any) -> None:
    back = executor.submit(identity, value).result()
    assert type(back) is type(value)
    assert back == value


def test_the_same_bytes_twice_and_among_keywords(executor: ZmqExecutor) -> None:
    def compare(a: bytes, b: bytes, *, c: bytes) -> tuple[bool, bool]:
        return a is b, a == c

    data = os.urandom(BIG)
    assert executor.submit(compare, data, data, c=data).result() == (True, True)


def test_an_argument_is_writable_in_the_task_and_stays_as_it_is_at_home(
    executor: ZmqExecutor,
) -> None:
    def fill(array: Any) -> int:
        array.fill(9)
        return int(array.sum())

    array = np.ones(BIG, dtype=np.uint8)
    assert executor.submit(fill, array).result() == 9 * BIG
    assert array.sum() == BIG


@pytest.mark.parametrize("journal", [True, False])
def test_the_pools_own_workers_map_an_argument(
    monkeypatch: pytest.MonkeyPatch, journal: bool
) -> None:
    def fail(path: str) -> None:
        raise OSError("too many open files")

    def owner(memory: Any) -> object:
        while isinstance(memory, (np.ndarray, memoryview)):
            memory = memory.base if isinstance(memory, np.ndarray) else memory.obj
        return type(memory)

    if not journal:
        monkeypatch.setattr("zmqexecutor.master.roster.JournalReader", fail)
    with ZmqExecutor(1) as executor:
        files(executor)
        handle: Any = executor.share(np.ones(BIG))
        for argument in (np.ones(BIG), handle):
            assert executor.submit(owner, argument).result(60) is mmap.mmap


@pytest.mark.parametrize("size", [3, BIG])
def test_a_read_only_argument_may_be_written_to_in_the_task(
    executor: ZmqExecutor, size: int
) -> None:
    array: Any = np.ones(size)
    array.flags.writeable = False

    def double(*arrays: Any) -> Any:
        for each in arrays:
            each *= 2
        return sum(each.sum() for each in arrays)

    assert executor.submit(double, array).result() == 2 * size
    assert executor.submit(double, array, array).result() == 8 * size  # it is one array
    assert array.sum() == size


def test_the_array_may_be_changed_once_submit_has_returned(executor: ZmqExecutor) -> None:
    array: Any = np.zeros(BIG, dtype=np.uint8)
    futures = []
    for number in range(50):
        array.fill(number)
        futures.append(executor.submit(lambda a: (int(a.min()), int(a.max())), array))
    assert [f.result() for f in futures] == [(n, n) for n in range(50)]


def test_segments_are_used_again_and_go_back_to_the_system(
    executor: ZmqExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zmqexecutor.wire.buffers.IDLE_SECONDS", 0.2)
    monkeypatch.setattr(Segments.trim, "__defaults__", (0.2,))
    array = np.ones(BIG)
    files(executor)
    for _ in range(100):
        executor.submit(identity, array).result()
        assert len(files(executor)) + len(files(executor, "free")) <= 8
    assert eventually(lambda: not files(executor) and not files(executor, "free"))


def some_of(array: Any, size: int) -> Any:
    return array[:size]


@pytest.mark.parametrize("size", [10, 6000, 20_000])
def test_a_part_of_an_argument_as_result_does_not_hold_it(executor: ZmqExecutor, size: int) -> None:
    """The segment is free when the task has ended, and is what the next one goes into."""
    files(executor)
    for number in range(5):
        back = executor.submit(some_of, np.full(BIG, float(number)), size).result()
        assert back.tolist() == [number] * size
        assert back.flags.writeable
        assert eventually(lambda: len(files(executor, "free")) == 1)
        assert not files(executor)


def test_an_argument_kept_in_a_global_stays_intact(executor: ZmqExecutor) -> None:
    def keep(array: Any) -> int:
        import builtins

        builtins.kept_here = array  # type: ignore[attr-defined]
        return os.getpid()

    def look() -> Any:
        import builtins

        array = getattr(builtins, "kept_here", None)
        return None if array is None else (int(array.min()), int(array.max()))

    executor.submit(keep, np.full(BIG, 77, dtype=np.uint8)).result()
    for number in range(300):
        executor.submit(len, np.full(BIG, number % 50, dtype=np.uint8)).result()
    looks = {f.result() for f in [executor.submit(look) for _ in range(20)]}
    assert looks <= {None, (77, 77)}
    assert (77, 77) in looks


def test_results_that_are_kept_stay_intact(executor: ZmqExecutor) -> None:
    results: list[Any] = list(executor.map(lambda n: np.full(BIG, n, dtype=np.uint8), range(60)))
    assert [(r.min(), r.max()) for r in results] == [(n, n) for n in range(60)]
    for number, result in enumerate(results):
        result += 1
        assert result[0] == number + 1


def test_a_worker_killed_with_a_big_result_costs_only_its_task(executor: ZmqExecutor) -> None:
    def die(seconds: float) -> Any:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        made = np.ones(20 * BIG)
        while True:
            made = made.copy()

    lost = executor.submit(die, 0.05)
    fine = [executor.submit(np.ones, BIG) for _ in range(10)]
    with pytest.raises(WorkerLostError):
        lost.result()
    assert all(future.result().sum() == BIG for future in fine)
    del fine
    gc.collect()
    assert eventually(lambda: not files(executor))


def test_a_task_that_is_lost_or_fails_leaves_no_segment(executor: ZmqExecutor) -> None:
    array = np.ones(BIG)
    with pytest.raises(WorkerLostError):
        executor.submit(lambda _: os._exit(3), array).result()
    with pytest.raises(ZeroDivisionError):
        executor.submit(lambda _: 1 / 0, array).result()
    with pytest.raises(Exception, match="cannot be pickled"):
        executor.submit(identity, (array, threading.Lock())).result()
    assert eventually(lambda: not files(executor))


def test_a_task_that_forks_and_comes_back_leaves_no_segment_of_the_child(
    executor: ZmqExecutor,
) -> None:
    def fork_and_return() -> Any:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        return np.ones(BIG)

    files(executor)
    assert executor.submit(fork_and_return).result(60).sum() == BIG
    assert eventually(lambda: not files(executor))


def test_cancelled_tasks_leave_no_segment(executor: ZmqExecutor) -> None:
    blockers = [executor.submit(_wait_for, 0.5) for _ in range(2)]
    waiting = [executor.submit(len, np.ones(BIG)) for _ in range(10)]
    for future in waiting:
        future.cancel()
    for blocker in blockers:
        blocker.result()
    executor.submit(len, "x").result()
    del waiting
    assert eventually(lambda: not files(executor))


def test_cancelled_tasks_hold_nothing_while_all_workers_are_busy(
    executor: ZmqExecutor, tmp_path: Path
) -> None:
    blockers = [executor.submit(_wait_for_file, tmp_path / "go") for _ in range(2)]
    assert eventually(lambda: all(future.running() for future in blockers))
    waiting = [executor.submit(len, np.ones(BIG) * number) for number in range(4)]
    killed = executor.submit(len, np.ones(BIG))
    assert len(files(executor)) == 5
    assert all(future.cancel() for future in waiting)
    assert killed.kill()
    assert eventually(lambda: not files(executor))
    assert not any(future.done() for future in blockers)
    (tmp_path / "go").touch()
    for blocker in blockers:
        blocker.result(60)
    assert all(future.cancelled() for future in [*waiting, killed])


def _wait_for_file(path: Path) -> None:
    assert eventually(path.exists, 60)


def _wait_for(seconds: float) -> None:
    threading.Event().wait(seconds)


def test_many_threads_submit_big_arrays(executor: ZmqExecutor) -> None:
    wrong: list[Any] = []

    def work(first: int) -> None:
        for number in range(first, first + 15):
            back = executor.submit(identity, np.full(BIG // 2, number, dtype=np.uint8)).result()
            if (back.min(), back.max()) != (number, number):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n * 15,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_descriptor_or_mapping_leaks(executor: ZmqExecutor) -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count(
            "/segments/"
        )

    array = np.ones(BIG // 4)
    for _ in range(20):
        executor.submit(identity, array).result()
    before = count()
    for _ in range(1000):
        executor.submit(identity, array).result()
    after = count()
    assert after[0] <= before[0] + 2
    assert after[1] <= 1
    assert executor.submit(count).result()[1] <= 1


def test_a_result_for_which_no_descriptor_is_left(executor: ZmqExecutor, tmp_path: Path) -> None:
    """The error says so, and the memory is given back; also that of a result before it."""

    def work(gate: Path) -> Any:
        return np.ones(BIG) if eventually(gate.exists) else None

    gate = tmp_path / "gate"
    before = executor.submit(np.ones, 2 * BIG).result(60)
    future = executor.submit(work, gate)
    taken: list[int] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        gate.mkdir()  # which takes no descriptor
        error = future.exception(60)
        del before
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert isinstance(error, SerializationError)
    assert "Too many open files: no descriptor is left" in str(error)
    assert "ulimit -n" in str(error)
    assert not files(executor)


def test_a_result_outlives_the_executor() -> None:
    with ZmqExecutor(1) as executor:
        array = executor.submit(np.ones, BIG).result()
    assert array.sum() == BIG


def test_a_forked_child_keeps_what_it_had(executor: ZmqExecutor) -> None:
    array: Any = executor.submit(np.full, BIG, 5, np.uint8).result()
    go, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(go[0], 1)
        os.write(done[1], b"y" if array.min() == array.max() == 5 else b"n")
        os._exit(0)
    del array
    for number in range(20):
        executor.submit(np.full, BIG, number, np.uint8).result()
    os.write(go[1], b"x")
    assert os.read(done[0], 1) == b"y"
    os.waitpid(pid, 0)
    for descriptor in (*go, *done):
        os.close(descriptor)


def test_a_result_whose_worker_dies_before_it_is_read() -> None:
    """It is in the journal, and its array in a segment, which is removed only after that."""
    with ZmqExecutor(1) as executor:
        pid = executor.submit(os.getpid).result(60)
        master = executor._engine.master
        bell = master._loop._bell
        assert bell is not None
        [peer] = master._coordinator.roster
        assert peer.journal is not None
        before = peer.journal.position
        master._loop._handlers[bell.fileno()] = lambda: list(bell.rung_by())  # unheard
        future = executor.submit(np.ones, 1_000_000)
        words = peer.journal._words
        assert eventually(lambda: words[_END] > before)
        os.kill(pid, signal.SIGKILL)
        assert future.result(60).sum() == 1_000_000
