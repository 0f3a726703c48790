"""numpy's arrays and scalars, pickled in a way of our own, are what numpy makes of them."""

from __future__ import annotations

import copyreg
import operator
import pickle
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from zmqexecutor import SerializationError
from zmqexecutor.payload import arrays
from zmqexecutor.payload.arrays import known_kinds, reduce_array
from zmqexecutor.payload.namespaces import importable
from zmqexecutor.payload.serialization import CallPickler, CallRunner


def no_times(size: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # since numpy 2.5
        return np.full(size, np.datetime64("NaT"))


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
    "times of no unit": lambda: no_times(3),
    "many times of no unit": lambda: no_times(10_000),
    "many columns": lambda: np.asfortranarray(np.arange(10_000.0).reshape(100, 100)),
    "void": lambda: np.zeros(2, dtype="V5"),
    "masked": lambda: np.ma.masked_array([1, 2], mask=[True, False]),
    "matrix": lambda: np.array([[1, 2]]).view(np.recarray),
    "unaligned": lambda: np.frombuffer(b"x" * 17, dtype="u1")[1:].view("f8"),
}

SCALARS: dict[str, Any] = {
    **{f"of {code}": np.dtype(code).type(1) for code in "?bBhHiIlLqQefdgFDG"},
    "minus zero": np.float64(-0.0),
    "nan": np.float32(np.nan),
    "another nan": np.frombuffer(b"\1\0\x80\x7f", dtype="f4")[0],
    "a complex nan": np.complex64(complex(np.nan, 1)),
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
    assert (back.flags.writeable, back.flags.aligned) == (True, True)
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


READ_ONLY: dict[str, Any] = {
    "small": np.arange(3),
    "large": np.arange(30_000),
    "by columns": np.asfortranarray(np.arange(30_000.0).reshape(100, 300)),
    "times": np.arange(30_000).astype("M8[s]"),
    "records": np.zeros(20_000, [("a", "i4"), ("b", "f8")]),
    "strided": np.arange(60_000)[::2],
    "objects": np.array([{}, None], object),
    "empty": np.zeros((0, 3)),
    "one number": np.array(2.5),
    "of bytes": np.frombuffer(b"abcd" * 20_000, np.uint16),
}


@pytest.mark.parametrize("among", ["alone", "in a list"])
@pytest.mark.parametrize("kind", READ_ONLY)
def test_who_gets_a_read_only_array_may_write_to_it(kind: str, among: str) -> None:
    """As with the standard library."""
    value = READ_ONLY[kind].view()
    value.flags.writeable = False
    before = value.tolist()
    if among == "alone":
        back = there_and_back(value)
    else:
        [back, again] = there_and_back([value, value])
        assert back is again
    assert back.flags.writeable
    assert (back.dtype, back.shape, back.tolist()) == (value.dtype, value.shape, before)
    assert back.flags.f_contiguous == value.flags.f_contiguous or not value.flags.forc
    back[...] = back.ravel()[0] if back.size else 0
    assert value.tolist() == before
    assert not value.flags.writeable


@pytest.mark.parametrize("value", [np.arange(3), np.arange(30_000), np.float64(2.5)])
def test_the_same_array_twice_is_one(value: Any) -> None:
    one, other = there_and_back([value, value])
    assert one is other
    pickler, runner = CallPickler(), CallRunner()
    call = pickler.dump_call(operator.is_, (value, value), {})
    runner.load_function(call.shared.key, call.shared.data)
    buffers = [bytearray(buffer) for buffer in call.buffers]
    assert pickler.load_outcome(runner.run(call.shared.key, call.data, buffers)) is True


def columns() -> Any:
    return np.asfortranarray(np.arange(10_000.0).reshape(100, 100))  # 80 KB


class BrokenError(Exception):
    """With an array."""


def raise_with_columns() -> None:
    raise BrokenError(columns())


def test_columns_where_buffers_stay_in_the_pickle() -> None:
    pickler, runner = CallPickler(), CallRunner()
    call = pickler.dump_call(raise_with_columns, (), {})
    runner.load_function(call.shared.key, call.shared.data)
    with pytest.raises(BrokenError) as caught:
        pickler.load_outcome(runner.run(call.shared.key, call.data))
    np.testing.assert_array_equal(caught.value.args[0], columns())

    class Model:
        weights = columns()

    def weights() -> Any:
        return Model.weights

    call = pickler.dump_call(weights, (), {})
    runner.load_function(call.shared.key, call.shared.data)
    back = pickler.load_outcome(runner.run(call.shared.key, call.data))
    np.testing.assert_array_equal(back, columns())
    with pytest.raises(SerializationError, match=r"argument 2 \(of type lock"):
        pickler.dump_call(identity, (columns(), threading.Lock()), {})


def test_metadata_stay_as_numpy_has_them() -> None:
    value = np.zeros(3, dtype=np.dtype("f8", metadata={"unit": "m"}))
    assert reduce_array(value) is NotImplemented


def test_a_subclass_is_left_alone() -> None:
    class Mine(np.ndarray):
        pass

    class Number(np.float64):
        pass

    assert not {Mine, Number} & set(known_kinds())
    assert type(there_and_back(np.zeros(3).view(Mine))).__name__ == "Mine"


def test_what_the_user_has_registered_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def reduce(array: Any) -> Any:
        return np.full, (array.shape, 7)

    monkeypatch.setitem(copyreg.dispatch_table, np.ndarray, reduce)
    assert there_and_back(np.zeros(2)).tolist() == [7, 7]


def test_an_object_whose_class_is_of_no_module() -> None:
    code = "make('Odd', (), {'__reduce__': lambda self: (int, (5,))})"
    odd = eval(code, {"make": type, "int": int, "__builtins__": {}})
    assert not hasattr(odd, "__module__")
    assert there_and_back([odd()]) == [5]


def test_a_name_with_a_dot_is_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("odd_module")
    monkeypatch.setitem(sys.modules, "odd_module", module)

    def function() -> int:
        return 2

    function.__module__, function.__qualname__ = "odd_module", "some.name"
    setattr(module, "some.name", function)
    assert not importable(function)
    function.__qualname__ = function.__name__ = "name"
    module.name = function  # type: ignore[attr-defined]
    assert importable(function)


def test_nobody_looks_for_numpy_where_it_is_not() -> None:
    code = (
        "import sys; from zmqexecutor.payload.arrays import known_kinds; "
        "assert known_kinds() == {} and 'numpy' not in sys.modules; "
        "import numpy; assert known_kinds()[numpy.ndarray] == ''"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_numpy_that_is_only_half_there_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_kinds", {})
    half = types.ModuleType("numpy")
    half.float64 = np.float64  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numpy", half)
        assert known_kinds() == {}
        assert there_and_back([1]) == [1]
    assert known_kinds()[np.float64] == "float64"
