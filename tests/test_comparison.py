"""Buffers are compared to the last byte, in whatever way."""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
import types

import numpy as np
import pytest

from zmqexecutor.wire import comparison
from zmqexecutor.wire.comparison import same, same_objects

WAYS = ["numpy", "no numpy", "half of numpy", "no ctypes"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_memcmp", None)
    if request.param == "no numpy":
        monkeypatch.delitem(sys.modules, "numpy", raising=False)
    elif request.param == "half of numpy":
        monkeypatch.setitem(sys.modules, "numpy", types.ModuleType("numpy"))
    elif request.param == "no ctypes":
        monkeypatch.setitem(sys.modules, "ctypes", None)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_same(size: int) -> None:
    data = os.urandom(size)
    assert same(memoryview(data), memoryview(bytearray(data)))
    assert same(memoryview(data), memoryview(data))
    assert not same(memoryview(data), memoryview(data + b"x"))
    for position in {0, size // 2, size - 1} if size else ():
        other = bytearray(data)
        other[position] ^= 1
        assert not same(memoryview(data), memoryview(other))
        assert not same(memoryview(other), memoryview(data))


@pytest.mark.usefixtures("way")
def test_parts_of_mappings_and_of_arrays() -> None:
    array = np.arange(100_000, dtype=np.uint8)
    array.flags.writeable = False
    with mmap.mmap(-1, 200_000) as mapping:
        mapping[777 : 777 + array.nbytes] = array.tobytes()
        with memoryview(mapping) as whole:
            with whole[777 : 777 + array.nbytes] as part:
                assert same(memoryview(array), part)
            with whole[778 : 778 + array.nbytes] as part:
                assert not same(memoryview(array), part)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 20_000])
def test_same_objects(size: int) -> None:
    one = tuple(str(number) for number in range(size))
    assert same_objects(one, one[:1] + one[1:])
    assert not same_objects(one, (*one, "more"))
    for position in {0, size // 2, size - 1} if size else ():
        other = (*one[:position], "".join([*one[position]]), *one[position + 1 :])
        assert same_objects(one, other) == (one[position] is other[position])
        assert not same_objects(one, (*one[:position], None, *one[position + 1 :]))
    assert not same_objects((1,) * (size + 1), (*(1,) * size, True))


def test_other_threads_run_meanwhile() -> None:
    """A thread that compares does not keep the interpreter's lock."""
    data = memoryview(bytes(100 * 1024 * 1024))
    deadline, turns = time.monotonic() + 30, 0

    def compare() -> None:
        while turns < 5 and time.monotonic() < deadline:
            assert same(data, data[:])

    thread = threading.Thread(target=compare)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # so that it gives the lock away, or nobody gets it
    try:
        thread.start()
        while thread.is_alive():
            turns += 1
            thread.join(0.001)
    finally:
        sys.setswitchinterval(interval)
    assert time.monotonic() < deadline
    assert turns >= 5
