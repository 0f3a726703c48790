"""How buffers get into files that are used again, and what is held of these."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.conftest import eventually
from zmqexecutor import ZmqExecutor
from zmqexecutor.wire import buffers, filling
from zmqexecutor.wire.buffers import Segments
from zmqexecutor.wire.filling import LEAST_MAPPED, MOST_KEPT, WRITTEN_FIRST, Filler
from zmqexecutor.worker import calls

MIB = 1024 * 1024


@pytest.fixture
def files() -> Iterator[list[Any]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(tempfile.TemporaryFile(buffering=0)) for _ in range(MOST_KEPT + 3)
        ]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the mappings that are made."""
    sizes: list[int] = []

    class Counted(mmap.mmap):
        def __init__(self, file: int, size: int, **_: object) -> None:
            sizes.append(size)

    monkeypatch.setattr(mmap, "mmap", Counted)
    return sizes


def fill(filler: Filler, file: Any, size: int = MIB, times: int = 1) -> None:
    for _ in range(times):
        data = os.urandom(size)
        filler.copy(file.fileno(), memoryview(data), 0, again=True)
        file.seek(0)
        assert file.read(size) == data


def mapped(filler: Filler) -> int:
    return sum(kept.mapping is not None for kept in filler._kept.values())


def test_what_is_used_often_enough_is_mapped_once(files: list[Any], made: list[int]) -> None:
    filler = Filler(64 * MIB)
    data = memoryview(os.urandom(2 * MIB))
    for _ in range(5):
        filler.copy(files[0].fileno(), data, 0, again=False)
        fill(filler, files[1], LEAST_MAPPED - 1)
    assert made == []
    fill(filler, files[0], times=WRITTEN_FIRST)
    assert made == []
    fill(filler, files[0], times=5)
    fill(filler, files[0], 2 * MIB)
    assert made == [2 * MIB]  # all of the file
    fill(filler, files[0], 3 * MIB, times=WRITTEN_FIRST + 1)
    assert made == [2 * MIB, 3 * MIB]


def test_what_is_kept_is_bounded(
    files: list[Any], made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "RECENTLY", 3600.0)  # on a busy machine, too
    filler = Filler(5 * MIB)
    for file in files[:7]:
        fill(filler, file, times=WRITTEN_FIRST + 2)
    assert len(made) == mapped(filler) == 5
    fill(filler, files[8], 6 * MIB, times=WRITTEN_FIRST + 2)
    assert mapped(filler) == 5  # there was no room
    for kept in filler._kept.values():
        kept.used -= filling.RECENTLY
    fill(filler, files[9], times=WRITTEN_FIRST)
    assert mapped(filler) == 5
    fill(filler, files[9])
    assert mapped(filler) == 1  # the others had not been used for a while
    filler = Filler(1 << 40)
    for file in files:
        fill(filler, file, times=WRITTEN_FIRST + 1)
    assert mapped(filler) == MOST_KEPT


def test_what_is_not_used_is_forgotten(files: list[Any], made: list[int]) -> None:
    filler = Filler(64 * MIB)
    fill(filler, files[0], times=WRITTEN_FIRST + 1)
    between = time.monotonic()
    assert eventually(lambda: time.monotonic() > between + 0.01)
    fill(filler, files[1], times=WRITTEN_FIRST + 1)
    due = filler.forget(time.monotonic() - between)
    assert due is not None
    assert mapped(filler) == 1
    assert filler.forget(0.0) is None
    assert mapped(filler) == 0


def test_who_keeps_nothing_takes_the_way_that_was_faster(
    files: list[Any], made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    costs = {"map": 2.0, "write": 1.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    write = filling._write

    def slow_write(*args: Any) -> None:
        clock[0] += costs["write"]
        write(*args)

    copy = filling._Mapping.copy

    def slow_copy(*args: Any) -> bool:
        clock[0] += costs["map"]
        return copy(*args)

    monkeypatch.setattr(filling, "_write", slow_write)
    monkeypatch.setattr(filling._Mapping, "copy", slow_copy)
    filler = Filler()
    fill(filler, files[0], filling.FILLED_BY_TWO, times=40)
    assert 2 <= len(made) <= 4  # once at first, and now and then to see
    costs["map"] = 0.1
    made.clear()
    fill(filler, files[0], filling.FILLED_BY_TWO, times=40)
    assert len(made) > 15
    fill(filler, files[0], filling.FILLED_BY_TWO - 1, times=3)
    assert mapped(filler) == 0


def held() -> int:
    """KiB of shared memory that this process has mapped."""
    with open("/proc/self/status") as status:
        return sum(int(line.split()[1]) for line in status if line.startswith("RssShmem:"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="of Linux")
def test_workers_let_go_of_what_they_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def give(number: int) -> Any:
        return np.full(8 * MIB, number, dtype=np.uint8)

    def hasten() -> None:
        monkeypatch.setattr(buffers, "IDLE_SECONDS", 1.0)

    def block(path: str) -> None:
        while not os.path.exists(path):
            time.sleep(0.01)

    with ZmqExecutor(1, initializer=hasten) as executor:
        if executor._engine._pickler.packer.segments is None:
            pytest.skip("the private directory is not in /dev/shm")
        for number in range(WRITTEN_FIRST + 4):
            result = executor.submit(give, number).result(60)
            assert result[0] == result[-1] == number
            del result
        assert executor.submit(held).result(60) >= 8 * 1024
        assert eventually(lambda: executor.submit(held).result(60) < 8 * 1024)


@pytest.mark.parametrize(
    "limit", [{"max_worker_memory": 1 << 40}, {"worker_rlimits": {"nofile": 500}}]
)
def test_workers_whose_memory_is_limited_keep_nothing(limit: dict[str, Any]) -> None:
    with ZmqExecutor(1, **limit) as executor:
        for number in range(WRITTEN_FIRST + 4):
            result = executor.submit(np.full, 8 * MIB, number, np.uint8).result(60)
            assert result[-1] == number
            del result
        assert executor.submit(held).result(60) < 8 * 1024


@pytest.fixture
def segments() -> Iterator[Segments]:
    with tempfile.TemporaryDirectory() as directory:
        for folder in ("segments", "free"):
            os.mkdir(os.path.join(directory, folder))
        made = Segments(directory)
        made.keep_mappings(64 * MIB)
        yield made
        made.close()


def test_a_fork_inherits_no_mapping(segments: Segments) -> None:
    for _ in range(WRITTEN_FIRST + 2):
        segment = segments.store([memoryview(bytes(2 * MIB))])
        assert segment is not None
        segments.give_back(segment.name)
    assert mapped(segments._filler) == 1
    child = os.fork()
    if not child:
        os._exit(mapped(segments._filler))
    assert os.waitpid(child, 0)[1] == 0


def test_a_busy_worker_has_one_thread_for_it(
    segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "IDLE_SECONDS", 0.001)
    segments.on_idle = calls.Trimmer(segments).wake
    names = set()
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        segment = segments.store([memoryview(bytes(2 * MIB))])
        assert segment is not None
        segments.give_back(segment.name)
        found = [t.name for t in threading.enumerate() if t.name == "zmqexecutor memory"]
        assert len(found) <= 1
        names.update(found)
    assert names == {"zmqexecutor memory"}
    assert eventually(lambda: os.listdir(segments._free) == [])
    assert eventually(lambda: "zmqexecutor memory" not in {t.name for t in threading.enumerate()})
    assert segments.trim_at is None


def test_a_thread_that_cannot_be_started_is_not_needed(
    segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    segments.on_idle = calls.Trimmer(segments).wake
    for _ in range(2):
        segment = segments.store([memoryview(bytes(2 * MIB))])
        assert segment is not None
        segments.give_back(segment.name)
        assert os.listdir(segments._free) == []


def test_what_is_freed_while_the_rest_is_trimmed_is_trimmed_later(
    segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = segments.store([memoryview(bytes(2 * MIB))])
    assert segment is not None
    scan = os.scandir

    def slow_scan(path: str) -> Any:
        entries = list(scan(path))
        thread = threading.Thread(target=segments.give_back, args=(segment.name,))
        thread.start()
        thread.join()
        return iter(entries)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", slow_scan)
        segments.trim()
    assert len(os.listdir(segments._free)) == 1
    assert segments.trim_at is not None


def test_who_is_closed_keeps_nothing(files: list[Any]) -> None:
    filler = Filler(64 * MIB)
    fill(filler, files[0], times=WRITTEN_FIRST + 1)
    assert mapped(filler) == 1
    filler.close()
    assert mapped(filler) == 0
    fill(filler, files[0], times=WRITTEN_FIRST + 1)
    assert mapped(filler) == 0


def test_workers_share_what_may_be_kept(segments: Segments) -> None:
    segments._idle_bytes, segments._spared = buffers.IDLE_BYTES, 1024 * MIB
    assert segments.share_of_mappings(2) == buffers.MAPPED_BY_OTHERS
    assert segments.share_of_mappings(64) == 16 * MIB
    segments._idle_bytes = buffers.IDLE_BYTES - 1
    assert segments.share_of_mappings(2) == 0
