"""numpy's arrays and scalars, pickled in a way of our own, are what numpy makes of them."""

from __future__ import annotations

import copyreg
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from zmqexecutor.payload import arrays
from zmqexecutor.payload.arrays import reduce_array
from zmqexecutor.payload.serialization import CallPickler, CallRunner

ARRAYS: dict[str, Callable[[], Any]] = {
    **{f"of {code}": lambda code=code: np.ones(3, dtype=code) for code in "?bBhHiIlLqQefdgFDG"},  # type: ignore[misc]
    "rows": lambda: np.arange(6.0).reshape(2, 3),
    "columns": lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "a column": lambda: np.asfortranarray(np.arange(3.0).reshape(3, 1)),
    "transposed": lambda: np.arange(24).reshape(2, 3, 4).T,
    "axes in another order": lambda: np.arange(24).reshape(2, 3, 4).swapaxes(0, 1),
    "every other": lambda: np.arange(6)[::2],
    "backwards": lambda: np.arange(6)[::-1],
    "spread": lambda: np.broadcast_to(np.arange(3), (2, 3)),
    "a number": lambda: np.array(1.5),
    "nothing": lambda: np.empty(0),
    "no row": lambda: np.empty((0, 3), dtype="i2"),
    "no column": lambda: np.empty((3, 0), order="F"),
    "the other byte order": lambda: np.arange(3, dtype="i4").astype(
        ">i4" if sys.byteorder == "little" else "<i4"
    ),
    "texts": lambda: np.array(["a", "bc"]),
    "bytes": lambda: np.array([b"a", b"bc"]),
    "objects": lambda: np.array([None, 1, "x"], dtype=object),
    "records": lambda: np.zeros(2, dtype=[("a", "i4"), ("b", "f8", 2)]),
    "times": lambda: np.array(["2026-11-29"], dtype="M8[D]"),
    "spans": lambda: np.array([3], dtype="m8[ns]"),
    "void": lambda: np.zeros(2, dtype="V5"),
    "masked": lambda: np.ma.masked_array([1, 2], mask=[True, False]),
    "matrix": lambda: np.array([[1, 2]]).view(np.recarray),
    "unaligned": lambda: np.frombuffer(b"x" * 17, dtype="u1")[1:].view("f8"),
}

SCALARS: dict[str, Any] = {
    **{f"of {code}": np.dtype(code).type(1) for code in "?bBhHiIlLqQefdgFDG"},
    "minus zero": np.float64(-0.0),
    "nan": np.float32(np.nan),
    "infinity": np.float16(-np.inf),
    "a third": np.float32(1) / np.float32(3),
    "the smallest": np.float64(5e-324),
    "the largest": np.uint64(2**64 - 1),
    "complex": np.complex64(1 / 3 - 1j / 7),
    "text": np.str_("aé"),
    "bytes": np.bytes_(b"a\0b"),
    "time": np.datetime64("2026-11-29T20:15"),
    "span": np.timedelta64(3, "h"),
    "record": np.zeros(1, dtype=[("a", "i4")])[0],
}


def identity(value: Any) -> Any:
    return value


def there_and_back(value: Any) -> Any:
    """Through both picklers."""
    pickler, runner = CallPickler(), CallRunner()
    call = pickler.dump_call(identity, (value,), {})
    runner.load_function(call.shared.key, call.shared.data)
    return pickler.load_outcome(runner.run(call.shared.key, call.data, call.buffers))


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_are_what_numpy_makes_of_them(kind: str) -> None:
    value = ARRAYS[kind]()
    back, like = there_and_back(value), pickle.loads(pickle.dumps(value, 5))
    assert type(back) is type(like)
    assert (back.dtype, back.shape, back.strides) == (like.dtype, like.shape, like.strides)
    assert (back.flags.writeable, back.flags.aligned) == (like.flags.writeable, True)
    if back.dtype.hasobject:
        assert back.tolist() == like.tolist()
    else:
        assert back.tobytes() == like.tobytes()


@pytest.mark.parametrize("kind", SCALARS)
def test_scalars_are_what_they_were(kind: str) -> None:
    value = SCALARS[kind]
    back = there_and_back(value)
    assert type(back) is type(value) or kind == "of q" or kind == "of Q"  # numpy makes l of q
    assert back.dtype == value.dtype
    assert back.tobytes() == value.tobytes()


def test_what_is_read_only_stays_so() -> None:
    for size in (3, 30_000):
        value = np.arange(size)
        value.flags.writeable = False
        assert not there_and_back(value).flags.writeable


def test_the_same_array_twice_is_one() -> None:
    value = np.arange(3)
    one, other = there_and_back([value, value])
    assert one is other


def test_metadata_stay_as_numpy_has_them() -> None:
    value = np.zeros(3, dtype=np.dtype("f8", metadata={"unit": "m"}))
    assert reduce_array(value) is NotImplemented


def test_a_subclass_is_left_alone() -> None:
    class Mine(np.ndarray):
        pass

    class Number(np.float64):
        pass

    assert reduce_array(np.zeros(3).view(Mine)) is NotImplemented
    assert reduce_array(Number(1)) is NotImplemented
    assert type(there_and_back(np.zeros(3).view(Mine))).__name__ == "Mine"


def test_what_the_user_has_registered_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def reduce(array: Any) -> Any:
        return np.full, (array.shape, 7)

    monkeypatch.setitem(copyreg.dispatch_table, np.ndarray, reduce)
    assert there_and_back(np.zeros(2)).tolist() == [7, 7]


def test_a_numpy_that_is_only_half_there_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_kinds", {})
    half = types.ModuleType("numpy")
    half.float64 = np.float64  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numpy", half)
        assert reduce_array(np.float64(1)) is NotImplemented
    assert reduce_array(np.float64(1)) == (np.float64, (1.0,))
