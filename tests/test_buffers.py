"""Segments: who may use one, when it is free, and what happens when memory is short."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zmqexecutor.wire import buffers, filling, mappings
from zmqexecutor.wire.buffers import Segments
from zmqexecutor.wire.leases import Lease
from zmqexecutor.wire.protocol import Segment

BIG = 300_000


@pytest.fixture
def segments() -> Iterator[Segments]:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("there is no /dev/shm")
    directory = tempfile.mkdtemp(dir="/dev/shm")
    made = Segments.create(directory)
    assert made is not None
    yield made
    made.close()
    shutil.rmtree(directory)


def stored(segments: Segments, byte: int = 1, size: int = BIG) -> Segment:
    segment = segments.store([memoryview(bytes([byte]) * size)])
    assert segment is not None
    return segment


def test_buffers_arrive_aligned_writable_and_isolated(segments: Segments) -> None:
    segment = segments.store([memoryview(b"abc"), memoryview(b""), memoryview(b"x" * BIG)])
    assert segment is not None
    first, second = segments.open(segment), segments.open(segment)
    assert [bytes(view) for view in first] == [b"abc", b"", b"x" * BIG]
    first[0][:] = b"xyz"
    assert bytes(second[0]) == b"abc"


def test_a_segment_is_used_again_when_the_last_view_has_died(segments: Segments) -> None:
    views = segments.open(stored(segments), owned=True)
    part = views[0][5:9]
    del views
    assert os.listdir(segments._free) == []
    del part
    assert len(os.listdir(segments._free)) == 1
    stored(segments, 2)
    assert os.listdir(segments._free) == []
    assert len(os.listdir(segments._used)) == 1


def test_two_processes_have_each_its_own_segment_again(segments: Segments) -> None:
    """One has arguments and the other results of the same size, and both keep mappings."""
    directory = os.path.dirname(segments._used)
    one, other = Segments(directory), Segments(directory)
    one._token, other._token = "ffffffff", "00000000"

    def inode(segment: Segment) -> int:
        return os.stat(os.path.join(segments._used, segment.name)).st_ino

    pairs = []
    for _ in range(4):
        argument, result = stored(one), stored(other)
        pairs.append((inode(argument), inode(result)))
        for segment in (argument, result):
            segments.give_back(segment.name)
    assert pairs == [pairs[0]] * 4


@pytest.mark.parametrize(
    ("kept", "free"), [([], 1), ([False], 1), ([True], 0), ([True, False], 0), ([None], 0)]
)
def test_a_lease_frees_only_what_nobody_has(
    segments: Segments, kept: list[bool | None], free: int
) -> None:
    lease = Lease(segments, stored(segments))
    for one in kept:
        lease.lend()
        if one is not None:  # else that process never answered
            lease.returned(one)
    del lease
    assert len(os.listdir(segments._free)) == free
    assert os.listdir(segments._used) == []


def test_what_was_mapped_during_a_fork_is_not_used_again(segments: Segments) -> None:
    views = segments.open(stored(segments), owned=True)
    script = "import os; os._exit(0)"
    subprocess.run([sys.executable, "-c", script], check=True, preexec_fn=os.getpid)
    del views
    assert os.listdir(segments._free) == []


def test_what_is_mapped_just_before_a_fork_is_not_used_again(segments: Segments) -> None:
    """By a thread, or by what others have registered, when our own preparations are done."""
    mapped: list[list[memoryview]] = []
    buffers._before_fork()
    mapped.append(segments.open(stored(segments), owned=True))
    buffers._after_fork_in_parent()
    mapped.clear()
    assert os.listdir(segments._free) == []
    mapped.append(segments.open(stored(segments), owned=True))
    buffers._before_fork()
    mapped.clear()
    buffers._after_fork_in_parent()
    assert os.listdir(segments._free) == []
    number = buffers.forks()
    mapped.append(segments.open(stored(segments), owned=True))
    mapped.clear()
    assert len(os.listdir(segments._free)) == 1
    assert not buffers.forked_since(number)


def test_a_fork_just_after_the_mapping_was_made_has_it(
    segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    map_ = mappings.map_file

    def slow_map(*args: Any, **options: Any) -> Any:
        made = map_(*args, **options)
        buffers._before_fork()  # of another thread
        buffers._after_fork_in_parent()
        return made

    monkeypatch.setattr(buffers, "map_file", slow_map)
    views = segments.open(stored(segments), owned=True)
    del views
    assert os.listdir(segments._free) == []


def test_a_segment_that_could_not_be_filled_holds_no_memory(
    segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = [memoryview(bytes(2 << 20)) for _ in range(5)]
    segment = segments.store(views)
    assert segment is not None
    segments.give_back(segment.name)
    copied: list[int] = []
    copy = segments._filler.copy

    def fail(file: int, view: memoryview, offset: int, *, again: bool) -> None:
        if len(copied) == 4:
            raise OSError("no space left on device")
        copied.append(offset)
        copy(file, view, offset, again=again)

    monkeypatch.setattr(segments._filler, "copy", fail)
    assert segments.store(views) is None
    assert not segments._filler._kept
    assert os.listdir(segments._used) == os.listdir(segments._free) == []


def test_who_was_not_woken_to_trim_is_woken_again(
    segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(buffers, "IDLE_SECONDS", 0.0)
    first, second = stored(segments, 1), stored(segments, 2)
    segments.on_idle = interrupted
    with pytest.raises(KeyboardInterrupt):
        segments.give_back(first.name)
    woken: list[int] = []
    segments.on_idle = lambda: woken.append(1)
    segments.give_back(second.name)
    assert woken == [1]


def test_free_segments_are_bounded_and_trimmed(segments: Segments) -> None:
    woken: list[int] = []
    segments.on_idle = lambda: woken.append(1)
    segments._idle_bytes = 2 * BIG + 100_000
    leases = [Lease(segments, stored(segments)) for _ in range(4)]
    leases.clear()
    assert len(os.listdir(segments._free)) == 2
    assert segments.trim_at is not None
    assert woken == [1]
    segments.trim(60.0)
    assert len(os.listdir(segments._free)) == 2
    segments.trim(0.0)
    assert os.listdir(segments._free) == []
    assert segments.trim_at is None


def test_free_segments_are_few_enough_to_be_looked_through(segments: Segments) -> None:
    leases = [Lease(segments, stored(segments, size=10)) for _ in range(buffers.IDLE_SEGMENTS + 5)]
    leases.clear()
    assert len(os.listdir(segments._free)) == buffers.IDLE_SEGMENTS
    assert os.listdir(segments._used) == []


def test_beyond_the_limit_of_mappings_it_is_copied(segments: Segments) -> None:
    segments._most_mapped = 0
    segment = segments.store([memoryview(b"abc"), memoryview(b"x" * BIG)])
    assert segment is not None
    views = segments.open(segment, owned=True)
    assert [bytes(view) for view in views] == [b"abc", b"x" * BIG]
    assert len(os.listdir(segments._free)) == 1


def test_what_a_dead_process_left_is_removed(segments: Segments) -> None:
    segment = stored(segments)
    segments.sweep(os.getpid() + 1)
    assert os.listdir(segments._used) == [segment.name]
    segments.sweep(os.getpid())
    assert os.listdir(segments._used) == []


@pytest.mark.parametrize("name", ["../lock", "/etc/passwd", "missing"])
def test_only_segments_can_be_opened(segments: Segments, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        segments.open(Segment(name, [1]))


def test_a_segment_that_is_too_short_is_an_error(segments: Segments) -> None:
    with pytest.raises(ValueError, match="length"):
        segments.open(Segment(stored(segments).name, [10 * BIG]))


def test_without_room_there_is_no_segment(segments: Segments) -> None:
    segments._spared = 1 << 60
    assert segments.store([memoryview(b"x")]) is None
    assert os.listdir(segments._used) == []


def test_on_a_disk_there_are_none(tmp_path: Path) -> None:
    assert Segments.create(str(tmp_path)) is None


IN_A_TINY_FILE_SYSTEM = """
import numpy as np
from zmqexecutor import ZmqExecutor

if __name__ == "__main__":
    with ZmqExecutor(2) as executor:
        assert executor._engine._pickler.packer.segments is not None
        for mebibytes in (1, 4, 12, 30, 100, 2):
            array = np.full(mebibytes << 20, 3, dtype=np.uint8)
            futures = [executor.submit(np.add, array, 1) for _ in range(4)]
            for future in futures:
                result = future.result()
                assert result.size == array.size and result.min() == result.max() == 4
    print("done")
"""


def run_in_a_tiny_dev_shm(script: Path, mebibytes: int) -> tuple[str, str]:
    """Run a script where /dev/shm has so much memory; what it wrote to its two streams."""
    mount = f"mount -t tmpfs -o size={mebibytes}m tmpfs /dev/shm"
    if not shutil.which("unshare") or subprocess.call(
        ["unshare", "-m", "sh", "-c", mount], stderr=subprocess.DEVNULL
    ):
        pytest.skip("mount namespaces are not permitted here")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" "$1"', sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize("mebibytes", [1, 8, 64])
def test_a_tiny_dev_shm_is_no_problem(tmp_path: Path, mebibytes: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(IN_A_TINY_FILE_SYSTEM)
    assert run_in_a_tiny_dev_shm(script, mebibytes) == ("done\n", "")


@pytest.mark.parametrize(("first", "second"), [(32, 32), (29, 30), (16, 40)])
def test_large_buffers_into_a_segment_that_is_used_again(
    segments: Segments, first: int, second: int
) -> None:
    segments.give_back(stored(segments, size=first << 20).name)
    contents = [os.urandom(100), os.urandom((second << 20) - 4321), os.urandom(99)]
    for _ in range(filling.WRITTEN_FIRST + 3):
        segment = segments.store([memoryview(part) for part in contents[1:]], first=contents[:1])
        assert segment is not None
        assert [bytes(view) for view in segments.open(segment)] == contents
        segments.give_back(segment.name)
        contents = [part[::-1] for part in contents]
    assert len(os.listdir(segments._free)) == (1 if second <= first + 1 else 2)
    assert [kept.mapping is not None for kept in segments._filler._kept.values()] == [True]


@pytest.mark.parametrize("numpy", ["there", "missing", "broken"])
@pytest.mark.parametrize("offset", [0, 64, 4096, 5_000_000])
@pytest.mark.parametrize("before", ["there", "shorter", "empty"])
def test_a_mapping_copies_every_byte_to_its_place(
    monkeypatch: pytest.MonkeyPatch, offset: int, before: str, numpy: str
) -> None:
    if numpy == "missing":
        monkeypatch.delitem(sys.modules, "numpy", raising=False)
    elif numpy == "broken":
        monkeypatch.setitem(sys.modules, "numpy", None)
    data = os.urandom(filling.FILLED_BY_TWO + 12345)
    end = offset + len(data)
    size = {"there": end + 10, "shorter": offset + 100, "empty": 0}[before]
    with tempfile.TemporaryFile(dir="/dev/shm", buffering=0) as file:
        file.write(b"#" * size)
        mapping = filling._mapped(file.fileno(), max(size, end))
        assert mapping is not None
        for part in (data, data[::-1], data[:5_000_000], data[:10]):  # with its pages, and less
            assert mapping.copy(memoryview(part), offset)
            file.seek(0)
            whole = file.read()
            assert whole[offset : offset + len(part)] == part
            assert whole[:offset] == (b"#" * size)[:offset].ljust(offset, b"\0")
            assert whole[end:] == b"#" * (size - end)


def test_a_mapping_needs_no_second_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    data = os.urandom(20_000_000)
    with tempfile.TemporaryFile(dir="/dev/shm", buffering=0) as file:
        mapping = filling._mapped(file.fileno(), len(data))
        assert mapping is not None
        assert mapping.copy(memoryview(data), 0)
        file.seek(0)
        assert file.read() == data


def test_an_interrupt_leaves_no_segment(
    segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    segments.give_back(stored(segments, size=32 << 20).name)
    monkeypatch.setattr(segments._filler, "copy", copy)
    with pytest.raises(KeyboardInterrupt):
        stored(segments, size=32 << 20)
    assert os.listdir(segments._used) == []


MAPPING_WHERE_MEMORY_IS_SHORT = """
import os, tempfile
from zmqexecutor.wire import filling

for size, room in ((30 << 20, False), (6 << 20, True)):
    with tempfile.TemporaryFile(dir="/dev/shm", buffering=0) as file:
        data = os.urandom(size)
        print(filling._mapped(file.fileno(), size).copy(memoryview(data), 0) is room)
        filler = filling.Filler(64 << 20)
        try:
            for _ in range(filling.WRITTEN_FIRST + 1):
                filler.copy(file.fileno(), memoryview(data), 0, again=True)
        except OSError:
            print(not room)
        else:
            print(room)
"""


def test_a_mapping_where_memory_is_short_is_no_signal(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(MAPPING_WHERE_MEMORY_IS_SHORT)
    assert run_in_a_tiny_dev_shm(script, 8) == ("True\n" * 4, "")
