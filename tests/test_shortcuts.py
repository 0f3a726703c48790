"""The short cuts between a master and its own workers, and what takes the other way."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import select
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from zmqexecutor import ZmqExecutor
from zmqexecutor.wire.protocol import Frame
from zmqexecutor.wire.shortcuts import LARGEST_LETTER, MOST_BUFFERS, Bell, BellRope, Mailbox, Post

from .conftest import eventually, start_without_template


@pytest.fixture
def bell(tmp_path: Path) -> Iterator[Bell]:
    bell = Bell(str(tmp_path / "bell"))
    yield bell
    bell.close()


@pytest.fixture
def mailbox(tmp_path: Path) -> Iterator[Mailbox]:
    mailbox = Mailbox(str(tmp_path / "in"))
    yield mailbox
    mailbox.close()


def readable(file: Bell | Mailbox) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(0))


# ---------------------------------------------------------------------- the bell


def test_the_bell_names_the_processes_that_have_rung(bell: Bell, tmp_path: Path) -> None:
    assert not readable(bell)
    assert bell.rung_by() == set()
    rope = BellRope(str(tmp_path / "bell"))
    assert rope.ring()
    assert rope.ring()

    def ring() -> None:
        BellRope(str(tmp_path / "bell")).ring()

    other = multiprocessing.get_context("fork").Process(target=ring)
    other.start()
    other.join()
    assert readable(bell)
    assert bell.rung_by() == {os.getpid(), other.pid}
    assert not readable(bell)
    rope.close()
    assert not readable(bell), "the last one that let go is no news"


def test_a_full_bell_says_so_and_hears_again(bell: Bell, tmp_path: Path) -> None:
    rope = BellRope(str(tmp_path / "bell"))
    while rope.ring():
        pass
    poll = select.poll()
    poll.register(rope, select.POLLOUT)
    assert poll.poll(0) == []
    while readable(bell):
        assert bell.rung_by() == {os.getpid()}
    assert poll.poll(0) == [(rope.fileno(), select.POLLOUT)]
    assert rope.ring()
    rope.close()


def test_nobody_hears(tmp_path: Path) -> None:
    path = str(tmp_path / "bell")
    with pytest.raises(FileNotFoundError):
        BellRope(path)
    bell = Bell(path)
    rope = BellRope(path)
    bell.close()
    assert rope.ring(), "that nobody is there is noticed elsewhere"
    rope.close()
    with pytest.raises(OSError, match="No such device"):
        BellRope(path)


def test_only_the_user_may_ring(bell: Bell, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "bell").stat().st_mode) == 0o600


# ---------------------------------------------------------------------- the mailbox


def read(mailbox: Mailbox) -> list[bytes] | None:
    """The next message and its buffers."""
    if (letter := mailbox.read()) is None:
        return None
    return [bytes(part) for part in (letter[0], *letter[1])]


def test_letters_come_whole_and_in_order(mailbox: Mailbox) -> None:
    post = Post(mailbox.path)
    assert mailbox.read() is None
    assert post.send(b"one")
    largest = b"x" * (LARGEST_LETTER - 1)
    assert post.send(largest)
    assert read(mailbox) == [b"one"]
    assert read(mailbox) == [largest]
    assert mailbox.read() is None


@pytest.mark.parametrize(
    "buffers",
    [
        [b"a"],
        [b"", b"abc", b""],
        [bytearray(b"x" * 70_000), memoryview(b"y" * 300_000), b"z"],
        [bytes([number]) for number in range(MOST_BUFFERS)],
    ],
    ids=["one", "empty", "large", "many"],
)
def test_buffers_come_with_their_letter(mailbox: Mailbox, buffers: list[Frame]) -> None:
    post = Post(mailbox.path)
    assert post.send(b"the message", buffers)
    assert post.send(b"the next")
    assert read(mailbox) == [b"the message", *map(bytes, buffers)]
    assert read(mailbox) == [b"the next"]


def test_buffers_are_the_readers_own(mailbox: Mailbox) -> None:
    post = Post(mailbox.path)
    assert post.send(b"one", [b"111"])
    assert post.send(b"two", [b"222"])
    (_, first), (_, second) = mailbox.read() or (b"", []), mailbox.read() or (b"", [])
    assert (first, second) == ([bytearray(b"111")], [bytearray(b"222")])


@pytest.mark.parametrize(
    "buffers",
    [[b"x"] * (MOST_BUFFERS + 1), [b"x" * LARGEST_LETTER], [bytes(1 << 32)]],  # never touched
    ids=["many", "large", "4 GiB"],
)
def test_too_many_or_too_large_buffers_take_another_way(
    mailbox: Mailbox, buffers: list[bytes]
) -> None:
    assert not Post(mailbox.path).send(b"", buffers)
    assert not readable(mailbox)


def test_what_is_too_large_takes_another_way(mailbox: Mailbox) -> None:
    post = Post(mailbox.path)
    assert not post.send(b"x" * LARGEST_LETTER)
    assert not readable(mailbox)


def test_a_full_mailbox_takes_no_more_until_it_is_read(mailbox: Mailbox) -> None:
    post = Post(mailbox.path)
    sent = 0
    while post.send(b"x"):
        sent += 1
    assert sent > 1
    assert [read(mailbox) for _ in range(sent)] == [[b"x"]] * sent
    assert mailbox.read() is None
    assert post.send(b"y")


def test_a_mailbox_that_was_closed(mailbox: Mailbox) -> None:
    post = Post(mailbox.path)
    mailbox.unlink()
    mailbox.unlink()
    assert post.send(b"it needs no name")
    mailbox.close()
    assert not post.send(b"x")


@pytest.mark.parametrize("kind", ["file", "directory", "link", "pipe", "nothing"])
def test_what_is_no_mailbox_is_refused(tmp_path: Path, mailbox: Mailbox, kind: str) -> None:
    path = tmp_path / "other"
    if kind == "file":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(mailbox.path)
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(OSError, match=r"not a socket of this user|No such file"):
        Post(str(path))


# ---------------------------------------------------------------------- the pool


def number(_: bytes, value: int) -> int:
    return value


@pytest.mark.parametrize("sizes", [(10,), (LARGEST_LETTER,), (10, LARGEST_LETTER, 10, 300_000)])
def test_small_and_large_calls_of_one_batch_all_run(sizes: tuple[int, ...]) -> None:
    with ZmqExecutor(1) as executor:
        calls = [bytes(size) for _ in range(300) for size in sizes]
        futures = [executor.submit(number, data, i) for i, data in enumerate(calls)]
        assert [future.result(60) for future in futures] == list(range(len(calls)))


def make(size: int) -> bytes:
    return bytes(size)


def test_small_and_large_results_of_one_batch_all_come() -> None:
    sizes = [10, LARGEST_LETTER, 10, 300_000, 70_000, 0] * 100
    with ZmqExecutor(2) as executor:
        futures = [executor.submit(make, size) for size in sizes]
        assert [len(future.result(60)) for future in futures] == sizes


@pytest.mark.parametrize("missing", ["bell", "mailbox", "both"])
def test_a_pool_without_short_cuts_does_the_same(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    code = {
        "bell": "zmqexecutor.worker.registration.BellRope = fail",
        "mailbox": "zmqexecutor.worker.registration.Mailbox = fail",
    }
    lines = [line for name, line in code.items() if missing in (name, "both")]
    start_without_template(monkeypatch)
    monkeypatch.setattr(
        "zmqexecutor.pool.boot_code",
        lambda path, main: "\n".join(
            [
                f"import sys; sys.path[:] = {list(path)!r}",
                "import zmqexecutor.worker.registration",
                "def fail(path): raise OSError('none here')",
                *lines,
                "from zmqexecutor.worker.calls import main",
                f"main(*{main.arguments!r})",
            ]
        ),
    )
    with ZmqExecutor(2) as executor:
        assert list(executor.map(make, [5, 100_000, 0] * 50, timeout=60))[:2] == [
            bytes(5),
            bytes(100_000),
        ]
        pid = executor.submit(os.getpid).result(60)
        error = executor.submit(os.kill, pid, 9) if missing == "both" else None
        assert executor.submit(pow, 2, 3).result(60) == 8
        if error is not None:
            error.exception(60)


def test_results_come_as_messages_when_the_master_cannot_map_the_journal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(path: str) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    monkeypatch.setattr("zmqexecutor.master.roster.JournalReader", fail)
    with ZmqExecutor(1) as executor:
        assert list(executor.map(make, [5, 100_000, 0], timeout=60)) == [
            bytes(5),
            bytes(100_000),
            b"",
        ]


def keep_the_interpreter(seconds: int) -> int:
    """The worker's control thread cannot answer a recall meanwhile."""
    return ctypes.PyDLL(None).sleep(seconds) if seconds else 0


@pytest.mark.parametrize("attempt", range(4))
def test_no_result_waits_for_a_long_job_behind_it(attempt: int) -> None:
    with ZmqExecutor(1) as executor:
        list(executor.map(keep_the_interpreter, [0] * 200, timeout=60))
        (peer,) = executor._engine.master._coordinator.attendance._ready.values()
        state = peer.state
        assert state is not None
        os.kill(peer.hello.pid, signal.SIGSTOP)
        short = [executor.submit(keep_the_interpreter, 0) for _ in range(5)]
        long = executor.submit(keep_the_interpreter, 2)
        assert eventually(lambda: state.stalled)
        os.kill(peer.hello.pid, signal.SIGCONT)
        assert [future.result(60) for future in short] == [0] * 5
        assert not long.done()
        assert long.result(60) == 0
