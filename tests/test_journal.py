"""What a worker writes down must be readable after its death, in order, once."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import stat
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zmqexecutor.wire.journal import (
    CAPACITY,
    LARGEST_MARKER,
    LEAST_CAPACITY,
    PART,
    JournalReader,
    JournalWriter,
)

from .conftest import _descriptors

OVERHEAD = 12
"""Bytes that an entry takes beside its result."""
LARGEST_ENTRY = CAPACITY // PART
LARGEST_RESULT = LARGEST_ENTRY - OVERHEAD


class Pair:
    """Both sides of one journal."""

    def __init__(self, directory: Path) -> None:
        self.writer = JournalWriter(str(directory))
        self.reader = JournalReader(self.writer.path)

    def patch(self, position: int, data: bytes) -> None:
        """Change the file behind the writer's back."""
        with open(self.writer.path, "r+b") as file:
            file.seek(position)
            file.write(data)

    def pretend_end(self, position: int) -> None:
        """The new end is seen before the bytes, as on some processors."""
        self.patch(16, position.to_bytes(8, "little"))

    def close(self) -> None:
        self.reader.close()
        self.writer.close()
        self.writer.unlink()


def read(reader: JournalReader) -> list[bytes]:
    """Results that have no buffers."""
    results = []
    for result, buffers in reader.read():
        assert not buffers
        results.append(result)
    return results


def append(writer: JournalWriter, result: bytes, buffers: list[bytes]) -> bool:
    return writer.append(result, [memoryview(buffer) for buffer in buffers])


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


def test_a_new_journal_has_no_results_and_runs_nothing(pair: Pair) -> None:
    assert read(pair.reader) == []
    assert pair.reader.running == 0
    assert pair.reader.position == pair.writer.position == 0


def test_results_are_read_once_and_in_order(pair: Pair) -> None:
    assert all(pair.writer.append(result) for result in (b"one", b"", b"three"))
    assert read(pair.reader) == [b"one", b"", b"three"]
    assert pair.reader.position == pair.writer.position
    assert read(pair.reader) == []
    assert pair.writer.append(b"four")
    assert read(pair.reader) == [b"four"]


def test_a_reader_that_comes_late_reads_all(tmp_path: Path) -> None:
    writer = JournalWriter(str(tmp_path))
    assert writer.append(b"early")
    reader = JournalReader(writer.path)
    assert read(reader) == [b"early"]
    reader.close()
    writer.close()


def test_results_known_from_messages_are_skipped(pair: Pair) -> None:
    pair.writer.append(b"came in a message")
    pair.reader.position = pair.writer.position
    pair.writer.append(b"did not come")
    assert read(pair.reader) == [b"did not come"]


@pytest.mark.parametrize("seq", [1, 255, 256, 2**32, 2**64 - 1])
def test_the_running_number_is_seen_at_once(pair: Pair, seq: int) -> None:
    pair.writer.start(seq, 0.0)
    assert pair.reader.running == seq


def test_the_start_of_the_running_job_is_known(pair: Pair) -> None:
    pair.writer.start(7, 1234.5)
    assert pair.reader.started == 1234.5


def test_nothing_starts_after_a_condemned_job(pair: Pair) -> None:
    assert pair.writer.start(1, 0.0)
    pair.reader.condemn(1)
    assert not pair.writer.start(2, 0.0)
    pair.reader.condemn(0)
    assert pair.writer.start(2, 0.0)


STARTS = """
import sys
from zmqexecutor.wire.journal import JournalWriter
writer = JournalWriter(sys.argv[1])
print(writer.path, flush=True)
sys.stdin.readline()
for _ in range(300_000):
    writer.start(0x0101010101010101, 1.0)
    writer.start(0x1010101010101010, 2.0)
"""


def test_a_number_is_seen_as_it_was_or_as_it_is(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdin
        reader = JournalReader(process.stdout.readline().strip())
        process.stdin.write("\n")
        process.stdin.flush()
        seen: set[float] = set()
        while process.poll() is None:
            for _ in range(1000):
                seen |= {reader.running, reader.started}
        assert process.returncode == 0
        reader.close()
    assert seen <= {0, 0x0101010101010101, 0x1010101010101010, 1.0, 2.0}
    assert len(seen) > 3


def test_what_was_recalled_starts_only_if_the_master_leaves_it(pair: Pair) -> None:
    last = 2**40
    assert pair.writer.start(last - 3, 0.0)
    pair.reader.recall(last)
    assert pair.writer.recalled == last
    assert not pair.writer.start(last - 2, 0.0)
    assert pair.writer.may_start(last - 2) is None  # not decided yet
    pair.reader.settle(last - 2)
    starts = [pair.writer.may_start(last + n) for n in (-2, -1, 0, 1)]
    assert starts == [True, False, False, True]
    assert pair.writer.start(last + 1, 0.0)


def test_a_decision_counts_for_the_recall_that_it_belongs_to(pair: Pair) -> None:
    for last in range(10, 200_010, 10):  # more often than is counted
        pair.reader.recall(last)
        assert pair.writer.may_start(last) is None
        pair.reader.settle(last - 1)
        assert pair.writer.may_start(last) is False
        assert pair.writer.may_start(last - 1) is True


def test_a_job_that_the_master_leaves_waits_while_another_is_condemned(pair: Pair) -> None:
    pair.reader.recall(5)
    pair.reader.settle(3)
    pair.reader.condemn(2)
    assert pair.writer.may_start(3) is None
    pair.reader.condemn(0)
    assert pair.writer.may_start(3) is True


# ---------------------------------------------------------------------- the ring


def test_entries_that_wrap_around_the_end_are_read_whole(pair: Pair) -> None:
    size = 1009  # prime, so that the end falls into every part of an entry
    for number in range(4 * CAPACITY // size):
        result = number.to_bytes(4, "little") * (size // 4)
        assert pair.writer.append(result)
        assert read(pair.reader) == [result]
        pair.writer.confirm(pair.reader.position)
    assert pair.writer.position > 3 * CAPACITY


@pytest.mark.parametrize(
    ("mebibytes", "capacity"),
    [(8, LEAST_CAPACITY), (64, 128 * 1024), (300, 512 * 1024), (512, CAPACITY), (9000, CAPACITY)],
)
def test_a_journal_is_a_small_part_of_its_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mebibytes: int, capacity: int
) -> None:
    real = os.statvfs(tmp_path)
    fields = list(real[:10])
    fields[1:3] = 4096, mebibytes * 256  # the unit, and how many of them there are
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    pair = Pair(tmp_path)
    try:
        assert os.stat(pair.writer.path).st_size == 64 + capacity
        assert not pair.writer.append(b"x" * (capacity // PART - OVERHEAD + 1))
        for number in range(3 * PART):  # three times around
            result = bytes([number]) * (capacity // PART - OVERHEAD)
            assert pair.writer.append(result)
            assert read(pair.reader) == [result]
            pair.writer.confirm(pair.reader.position)
        pair.writer.append(b"x" * 1000)
        appended = 1
        while pair.writer.append(b"x" * 1000):
            appended += 1
        assert appended == (capacity - LARGEST_MARKER) // (1000 + OVERHEAD)
        assert len(read(pair.reader)) == appended
    finally:
        pair.close()


@pytest.mark.parametrize("before_the_end", range(1, OVERHEAD + 2))
def test_the_end_of_the_ring_may_cut_an_entry_anywhere(pair: Pair, before_the_end: int) -> None:
    left = CAPACITY - before_the_end
    while left:
        size = min(left, LARGEST_ENTRY)
        if 0 < left - size < OVERHEAD:
            size -= OVERHEAD  # leave room for a last entry
        assert pair.writer.append(b"x" * (size - OVERHEAD))
        left -= size
        read(pair.reader)
        pair.writer.confirm(pair.reader.position)
    assert pair.writer.position == CAPACITY - before_the_end
    assert pair.writer.append(b"cut in two")
    assert read(pair.reader) == [b"cut in two"]


def test_a_full_journal_has_room_for_a_marker(pair: Pair) -> None:
    while pair.writer.append(b""):
        pass
    before = len(read(pair.reader))
    marker = b"m" * (LARGEST_MARKER - OVERHEAD)
    pair.writer.mark(marker)
    assert before > 1
    assert read(pair.reader) == [marker]
    with pytest.raises(ValueError, match="not confirmed"):
        pair.writer.mark(marker)
    pair.writer.confirm(pair.reader.position)
    pair.writer.mark(marker)
    assert read(pair.reader) == [marker]


def test_what_was_not_taken_is_read_again(pair: Pair) -> None:
    for result in (b"one", b"two", b"three"):
        pair.writer.append(result)
    reading = pair.reader.read()
    assert [next(reading), next(reading)] == [(b"one", ()), (b"two", ())]
    assert read(pair.reader) == [b"two", b"three"]


def test_a_full_journal_refuses_until_results_are_confirmed(pair: Pair) -> None:
    appended = 0
    while pair.writer.append(b"x" * 1000):
        appended += 1
    assert appended == (CAPACITY - LARGEST_MARKER) // (1000 + OVERHEAD)
    position = pair.writer.position
    assert len(read(pair.reader)) == appended, "what is there stays whole"
    assert not pair.writer.append(b"x" * 1000), "read is not confirmed"
    assert pair.writer.position == position
    pair.writer.confirm(pair.reader.position)
    assert pair.writer.append(b"x" * 1000)


def test_a_confirmation_frees_just_what_it_confirms(pair: Pair) -> None:
    pair.writer.append(b"a" * (LARGEST_RESULT))
    first = pair.writer.position
    while pair.writer.append(b"b" * 1000):
        pass
    pair.writer.confirm(first)
    assert pair.writer.append(b"c" * LARGEST_RESULT)
    assert not pair.writer.append(b"c" * LARGEST_RESULT)


def test_old_and_impossible_confirmations_do_no_harm(pair: Pair) -> None:
    while pair.writer.append(b"x" * 1000):
        pass
    pair.writer.confirm(10**18)  # more than was ever written counts as all of it
    appended = 0
    while pair.writer.append(b"y" * 1000):
        appended += 1
    assert appended == (CAPACITY - LARGEST_MARKER) // (1000 + OVERHEAD)
    pair.writer.confirm(0)
    pair.writer.confirm(-5)
    assert not pair.writer.append(b"z" * 1000)


def test_the_largest_entry_fits_and_a_larger_one_does_not(pair: Pair) -> None:
    assert not pair.writer.append(b"x" * (LARGEST_RESULT + 1))
    assert pair.writer.position == 0
    assert pair.writer.append(b"x" * LARGEST_RESULT)
    assert read(pair.reader) == [b"x" * LARGEST_RESULT]


# ---------------------------------------------------------------------- buffers


@pytest.fixture(params=["ordered", "unordered"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One that shows writes in their order, or another."""
    monkeypatch.setattr("zmqexecutor.wire.journal._ORDERED", request.param == "ordered")
    return str(request.param)


@pytest.mark.usefixtures("processor")
def test_buffers_come_with_their_result(pair: Pair) -> None:
    assert pair.writer.append(b"none")
    assert append(pair.writer, b"three", [b"a" * 70_000, b"", b"bc"])
    assert append(pair.writer, b"", [b"\0" * 8])
    assert list(pair.reader.read()) == [
        (b"none", ()),
        (b"three", [b"a" * 70_000, b"", b"bc"]),
        (b"", [bytes(8)]),
    ]
    assert pair.reader.position == pair.writer.position


def test_buffers_can_be_written_to(pair: Pair) -> None:
    append(pair.writer, b"small", [b"abc"])
    append(pair.writer, b"large", [b"abc" * 30_000])
    for _, (buffer,) in pair.reader.read():
        memoryview(buffer)[0] = 1  # an array is made of it as it is


@pytest.mark.usefixtures("processor")
def test_buffers_may_go_around_the_end_of_the_ring(pair: Pair) -> None:
    buffers = [bytes([number]) * size for number, size in enumerate((40_009, 1, 60_013))]
    while pair.writer.position < 3 * CAPACITY:
        assert append(pair.writer, b"result", buffers)
        assert list(pair.reader.read()) == [(b"result", buffers)]
        pair.writer.confirm(pair.reader.position)


def test_buffers_count_as_a_part_of_their_entry(pair: Pair) -> None:
    room = LARGEST_RESULT - 2 * 4 - len(b"result")
    assert not append(pair.writer, b"result", [b"x" * (room - 10), b"y" * 11])
    assert pair.writer.position == 0
    assert append(pair.writer, b"result", [b"x" * (room - 10), b"y" * 10])
    assert pair.writer.position == LARGEST_ENTRY
    assert append(pair.writer, b"result", [b"x" * room])
    assert append(pair.writer, b"result", [b"x" * room])
    assert not append(pair.writer, b"result", [b"x" * room]), "one of 128 bytes must still fit"


def test_buffers_of_any_size_and_number_are_refused_in_peace(pair: Pair) -> None:
    assert not append(pair.writer, b"", [bytes(1 << 32)])  # never touched
    assert not append(pair.writer, b"", [b""] * (LARGEST_ENTRY // 4))
    assert append(pair.writer, b"", [b""] * 1000)
    assert list(pair.reader.read()) == [(b"", [b""] * 1000)]


def test_what_was_read_stays_when_the_ring_is_used_again(pair: Pair) -> None:
    append(pair.writer, b"first", [b"1" * 200_000])
    ((_, (buffer,)),) = pair.reader.read()
    pair.writer.confirm(pair.reader.position)
    while pair.writer.position < 2 * CAPACITY:
        append(pair.writer, b"later", [b"2" * 200_000])
        list(pair.reader.read())
        pair.writer.confirm(pair.reader.position)
    assert buffer == b"1" * 200_000


def test_a_damaged_buffer_is_found_where_it_may_come_late(pair: Pair, processor: str) -> None:
    append(pair.writer, b"result", [b"x" * 1000])
    pair.patch(64 + pair.writer.position - 1, b"y")
    assert len(list(pair.reader.read())) == (processor == "ordered")


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("offset", [0, 4, 8, 12, 16])
def test_impossible_sizes_are_not_read(pair: Pair, offset: int) -> None:
    append(pair.writer, b"result", [b"x" * 1000, b"y" * 1000])
    pair.patch(64 + offset, b"\xff\xff\xff\xff")
    assert list(pair.reader.read()) == []
    assert pair.reader.position == 0


def test_the_reader_may_be_closed_in_the_middle(pair: Pair) -> None:
    append(pair.writer, b"one", [b"x" * 100_000])
    append(pair.writer, b"two", [b"x" * 100_000])
    reading = pair.reader.read()
    assert next(reading) == (b"one", [b"x" * 100_000])
    pair.reader.close()
    del reading
    pair.reader = JournalReader(pair.writer.path)


# --------------------------------------------------------------- torn and foreign


def test_an_entry_whose_bytes_are_damaged_is_not_read(pair: Pair) -> None:
    pair.writer.append(b"good")
    damaged_at = pair.writer.position
    pair.writer.append(b"damaged")
    pair.patch(64 + damaged_at + OVERHEAD, b"D")
    assert read(pair.reader) == [b"good"]
    assert pair.reader.position == damaged_at
    pair.patch(64 + damaged_at + OVERHEAD, b"d")
    assert read(pair.reader) == [b"damaged"], "it is read once its bytes are there"


def test_an_entry_with_an_impossible_length_is_not_read(pair: Pair) -> None:
    pair.writer.append(b"x")
    pair.patch(64, b"\xff\xff\xff\xff")
    assert read(pair.reader) == []
    assert pair.reader.position == 0


def test_an_entry_of_which_no_byte_is_there_yet_is_not_read(pair: Pair) -> None:
    # All zero is what a fresh file holds; it must not pass for an empty result.
    pair.pretend_end(OVERHEAD + 10)
    assert read(pair.reader) == []
    assert pair.reader.position == 0


def test_an_entry_of_an_earlier_round_is_not_read_again(pair: Pair) -> None:
    for _ in range(4):  # exactly once around
        assert pair.writer.append(b"o" * LARGEST_RESULT)
        read(pair.reader)
        pair.writer.confirm(pair.reader.position)
    pair.pretend_end(CAPACITY + LARGEST_ENTRY)
    assert read(pair.reader) == []
    assert pair.reader.position == CAPACITY


def test_the_reader_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        JournalReader(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"zmqexjn2",
        bytes(64 + CAPACITY),
        b"zmqexjn0" + bytes(56 + CAPACITY),
        b"zmqexjn3" + bytes(56 + LEAST_CAPACITY - 1),
        b"zmqexjn3" + bytes(56 + CAPACITY + 1),
    ],
    ids=["empty", "short", "zeros", "version", "too small", "too large"],
)
def test_the_reader_refuses_what_is_not_a_journal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a journal"):
        JournalReader(str(path))


def test_the_reader_follows_no_link(pair: Pair, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(pair.writer.path)
    with pytest.raises(OSError, match=r"link") as caught:
        JournalReader(str(link))
    assert caught.value.errno == errno.ELOOP


def test_the_reader_refuses_a_file_of_another_user(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(PermissionError, match="not a file of this user"):
        JournalReader(pair.writer.path)


def test_the_reader_refuses_a_directory(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        JournalReader(str(tmp_path))


def test_the_reader_refuses_a_pipe_without_waiting_for_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def waited(*_: object) -> None:
        raise AssertionError("it waits, and with it the master")

    previous = signal.signal(signal.SIGALRM, waited)
    others = signal.setitimer(signal.ITIMER_REAL, 0.5)  # pytest-timeout's
    try:
        with pytest.raises(PermissionError, match="not a file of this user"):
            JournalReader(str(path))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, *others)


# ------------------------------------------------------------------ files, death


def test_only_the_user_can_open_the_file(pair: Pair) -> None:
    assert stat.S_IMODE(os.stat(pair.writer.path).st_mode) == 0o600


def test_results_stay_readable_after_the_name_is_removed(pair: Pair) -> None:
    pair.writer.unlink()
    pair.writer.unlink()  # once more does no harm
    assert not os.path.exists(pair.writer.path)
    pair.writer.append(b"still here")
    assert read(pair.reader) == [b"still here"]


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "function"), [(os, "posix_fallocate"), (mmap, "mmap")], ids=["disk", "memory"]
)
def test_without_room_there_is_an_error_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, function: str
) -> None:
    monkeypatch.setattr(module, function, no_room)
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    with pytest.raises(OSError, match="No space left"):
        JournalWriter(str(tmp_path))
    assert os.listdir(tmp_path) == []
    if before:
        assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="nothing tells of descriptors")
def test_each_side_holds_a_descriptor_only_before_python_3_13(tmp_path: Path) -> None:
    def held() -> int:
        return sum(link.startswith(str(tmp_path)) for link in _descriptors().values())

    pair = Pair(tmp_path)
    pair.writer.append(b"result")
    assert held() == (0 if sys.version_info >= (3, 13) else 2)
    assert read(pair.reader) == [b"result"]
    pair.close()
    assert held() == 0


def test_the_room_is_reserved_before_it_is_written(pair: Pair) -> None:
    status = os.stat(pair.writer.path)
    assert status.st_size == 64 + CAPACITY
    assert status.st_blocks * 512 >= CAPACITY, "a full disk would be a SIGBUS later"


def test_without_posix_fallocate_the_file_is_made_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    pair = Pair(tmp_path)
    pair.writer.append(b"result")
    assert read(pair.reader) == [b"result"]
    pair.close()


def test_a_killed_writers_results_and_running_number_are_read(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from zmqexecutor.wire.journal import JournalWriter
writer = JournalWriter(sys.argv[1])
for seq in range(1, 4):
    writer.start(seq, 0.0)
    writer.append(b"result %d" % seq)
writer.start(4, 0.0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert ended.returncode == -signal.SIGKILL
    (name,) = os.listdir(tmp_path)
    reader = JournalReader(str(tmp_path / name))
    assert read(reader) == [b"result 1", b"result 2", b"result 3"]
    assert reader.running == 4
    reader.close()


# --------------------------------------------------------------- any interleaving

results = st.one_of(
    st.binary(max_size=20),
    st.integers(0, 2000).map(lambda size: b"m" * size),
    st.integers(LARGEST_RESULT - 2, LARGEST_RESULT + 2).map(lambda size: b"L" * size),
)
buffers: st.SearchStrategy[list[bytes]] = st.one_of(
    st.just([]),
    st.lists(st.integers(0, 60_000).map(lambda size: b"B" * size), max_size=3),
)
steps = st.lists(
    st.one_of(
        st.tuples(results, buffers),
        st.sampled_from(["read", "message", "confirm"]),
    ),
    max_size=60,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_no_interleaving_loses_or_repeats_a_result(
    tmp_path: Path, steps: list[tuple[bytes, list[bytes]] | str]
) -> None:
    """Results reach the master from the journal or by message, and confirmations lag."""
    with ExitStack() as stack:
        pair = Pair(tmp_path)
        stack.callback(pair.close)
        unread: deque[tuple[bytes, Sequence[bytes]]] = deque()
        confirmed = 0
        for step in steps:
            if isinstance(step, tuple):
                used = pair.writer.position - confirmed
                size = OVERHEAD + len(step[0]) + sum(4 + len(buffer) for buffer in step[1])
                fits = size <= LARGEST_ENTRY and used + size <= CAPACITY - LARGEST_MARKER
                assert append(pair.writer, *step) == fits
                if fits:
                    unread.append((step[0], step[1] or ()))
            elif step == "read":
                assert list(pair.reader.read()) == list(unread)
                unread.clear()
            elif step == "message":
                pair.reader.position = pair.writer.position
                unread.clear()
            else:
                confirmed = pair.reader.position
                pair.writer.confirm(confirmed)
        assert list(pair.reader.read()) == list(unread)


def test_the_ring_is_a_whole_number_of_largest_entries() -> None:
    # Several tests above rely on it.
    assert CAPACITY % LARGEST_ENTRY == 0
