"""A wake-up wakes, does not block, and leaves nothing unseen."""

from __future__ import annotations

import errno
import gc
import os
import select
import sys
import threading

import pytest

from zmqexecutor.wire.wakeup import Wakeup


@pytest.fixture(params=["eventfd", "pipe"], autouse=True)
def each_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with both ways to make a wake-up."""
    if request.param == "pipe":
        monkeypatch.delattr(os, "eventfd", raising=False)
    elif not hasattr(os, "eventfd"):
        pytest.skip("this system has no eventfd")


def is_set(wakeup: Wakeup, timeout: float = 0.0) -> bool:
    return bool(select.select([wakeup], [], [], timeout)[0])


def test_a_new_wakeup_is_not_set() -> None:
    wakeup = Wakeup()
    assert not is_set(wakeup)


def test_set_makes_it_readable_until_it_is_cleared() -> None:
    wakeup = Wakeup()
    wakeup.set()
    assert is_set(wakeup)
    assert is_set(wakeup), "looking does not clear it"
    wakeup.clear()
    assert not is_set(wakeup)


def test_setting_it_many_times_is_like_once() -> None:
    wakeup = Wakeup()
    for _ in range(3000):
        wakeup.set()
    wakeup.clear()
    assert not is_set(wakeup)
    wakeup.set()
    assert is_set(wakeup)


def test_clearing_one_that_is_not_set_does_not_block() -> None:
    wakeup = Wakeup()
    wakeup.clear()
    wakeup.clear()
    assert not is_set(wakeup)


def test_setting_a_full_one_does_not_block() -> None:
    wakeup = Wakeup()
    # The largest value that an eventfd takes; a pipe takes many of any value.
    try:
        while os.write(wakeup._write, b"\xfe" + b"\xff" * 7):
            pass
    except BlockingIOError:
        pass
    wakeup.set()
    assert is_set(wakeup)
    wakeup.clear()
    assert not is_set(wakeup)


def test_another_thread_is_woken_from_its_sleep() -> None:
    wakeup = Wakeup()
    woken = []
    thread = threading.Thread(target=lambda: woken.append(is_set(wakeup, 60.0)))
    thread.start()
    wakeup.set()
    thread.join(60)
    assert woken == [True]


def test_nothing_left_for_the_waiting_thread_stays_unseen() -> None:
    wakeup = Wakeup()
    inbox: list[int] = []
    seen: list[int] = []
    count = 20_000

    def receive() -> None:
        while len(seen) < count:
            assert is_set(wakeup, 60.0), "it sleeps although something waits"
            wakeup.clear()
            while inbox:
                seen.append(inbox.pop(0))

    thread = threading.Thread(target=receive)
    thread.start()
    for number in range(count):
        inbox.append(number)
        wakeup.set()
    thread.join(60)
    assert seen == list(range(count))


def test_programs_that_are_started_do_not_inherit_it() -> None:
    wakeup = Wakeup()
    assert not os.get_inheritable(wakeup._read)
    assert not os.get_inheritable(wakeup._write)


def test_the_last_reference_takes_the_descriptors_with_it() -> None:
    wakeup = Wakeup()
    descriptors = {wakeup._read, wakeup._write}
    del wakeup
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_without_a_descriptor_there_is_an_error_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "eventfd", none_left, raising=False)
    monkeypatch.setattr(os, "EFD_CLOEXEC", 0, raising=False)
    monkeypatch.setattr(os, "EFD_NONBLOCK", 0, raising=False)
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with pytest.raises(OSError, match="Too many open files"):
        Wakeup()
    gc.collect()
    assert unraisable == []
