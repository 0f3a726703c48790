"""Data of many types there and back: what arrives, who may write to it, whose it is."""

from __future__ import annotations

import array
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from zmqexecutor import ZmqExecutor

SIZES = {"small": 10, "frames": 10_000, "segment": 300_000}
"""Numbers of eight bytes: in the pickle, beside it in frames, and in a segment."""

needs_pandas = pytest.mark.skipif(
    importlib.util.find_spec("pandas") is None, reason="pandas is not installed"
)
needs_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed"
)


@pytest.fixture(scope="module")
def pool() -> Iterator[ZmqExecutor]:
    with ZmqExecutor(2) as made:
        made.submit(int).result()
        yield made


@pytest.fixture(autouse=True)
def no_leaks(pool: ZmqExecutor) -> None:
    """Not between two tests of one pool, whose second worker may come at any time."""


@dataclass
class Record:
    name: str
    values: Any
    more: dict[str, Any] = field(default_factory=dict)


def identity(value: Any) -> Any:
    return value


def fill(value: Any) -> Any:
    """Write to each byte of what a buffer gives, and tell what is there then."""
    view = memoryview(value).cast("B")
    view[:] = b"\x07" * view.nbytes
    return bytes(view[:3]), view.nbytes


Make = Callable[[int], Any]

PLAIN: dict[str, Make] = {
    "bytes": lambda n: os.urandom(n * 8),
    "bytearray": lambda n: bytearray(os.urandom(n * 8)),
    "text": lambda n: "aé€" * (n * 2),
    "list of bytes": lambda n: [os.urandom(n * 4), b"", os.urandom(n * 4)],
    "bytes in a dataclass": lambda n: Record("x", bytearray(n * 8), {"y": os.urandom(n)}),
    "array.array": lambda n: array.array("d", range(n)),
    "numbers": lambda n: list(range(n)),
    "many texts": lambda n: [str(k) for k in range(n // 4)],
}

ARRAYS: dict[str, Make] = {
    "contiguous": lambda n: np.arange(n, dtype="i8"),
    "Fortran": lambda n: np.asfortranarray(np.arange(n * 2, dtype="f8").reshape(2, n)),
    "transposed": lambda n: np.arange(n * 2).reshape(2, n).T,
    "strided": lambda n: np.arange(n * 2)[::2],
    "reversed": lambda n: np.arange(n)[::-1],
    "broadcast": lambda n: np.broadcast_to(np.arange(4.0), (n, 4)),
    "three axes": lambda n: np.arange(n * 6).reshape(3, n, 2).swapaxes(0, 1),
    "no axis": lambda n: np.array(float(n)),
    "no element": lambda n: np.empty((0, n)),
    "structured": lambda n: np.rec.fromarrays(
        [np.arange(n, dtype="i4"), np.arange(n, dtype="f8")], names="a,b"
    ),
    "objects": lambda n: np.array([{"a": n}, None, "x"] * (n // 8), dtype=object),
    "texts": lambda n: np.array(["a", "bc"] * (n // 2), dtype="U5"),
    "times": lambda n: np.arange(n).astype("M8[s]"),
    "big-endian": lambda n: np.arange(n, dtype=">i8"),
    "complex": lambda n: np.arange(n) * 1j,
    "booleans": lambda n: np.arange(n * 8) % 3 == 0,
}

sizes = pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))


@sizes
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_data(pool: ZmqExecutor, kind: str, size: int) -> None:
    value = PLAIN[kind](size)
    back = pool.submit(identity, value).result()
    assert type(back) is type(value)
    assert back == value


@sizes
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays(pool: ZmqExecutor, kind: str, size: int) -> None:
    value = ARRAYS[kind](size)
    back = pool.submit(identity, value).result()
    like = pickle.loads(pickle.dumps(value, 5))  # what any pool would give
    assert type(back) is type(value)
    assert (back.dtype, back.shape, back.strides) == (like.dtype, like.shape, like.strides)
    np.testing.assert_array_equal(back, value)
    assert back.flags.writeable
    if back.size:
        back[...] = back.flat[0]


@sizes
def test_masked_arrays(pool: ZmqExecutor, size: int) -> None:
    value = np.ma.masked_array(np.arange(size), mask=np.arange(size) % 3 == 0, fill_value=-1)
    back = pool.submit(identity, value).result()
    assert type(back) is type(value)
    assert back.fill_value == -1
    np.testing.assert_array_equal(back.mask, value.mask)
    np.testing.assert_array_equal(back.filled(), value.filled())
    back[:] = 3
    assert back.sum() == 3 * size


def test_nested_arrays_keep_what_they_share(pool: ZmqExecutor) -> None:
    def look(record: Record) -> tuple[bool, bool]:
        same = record.values[0] is record.more["same"]
        record.values[0][:] = 5
        return same, bool((record.more["view"] == 5).any())

    big = np.ones(300_000)
    record = Record("r", [big, (np.zeros(3), {"k": np.full(100_000, 2.0)})], {"same": big})
    record.more["view"] = big[10:]
    assert pool.submit(look, record).result() == (True, False)  # as pickle has it: a view is a copy
    back = pool.submit(identity, record).result()
    assert back.values[0] is back.more["same"]
    assert back.values[1][1]["k"].sum() == 200_000


@sizes
def test_buffers_of_pickle(pool: ZmqExecutor, size: int) -> None:
    data = os.urandom(size * 8)
    back = pool.submit(lambda buffer: bytes(buffer), pickle.PickleBuffer(data)).result()
    assert back == data
    returned = pool.submit(lambda n: pickle.PickleBuffer(bytearray(n * 8)), size).result()
    assert bytes(returned) == bytes(size * 8)
    fill(returned)


@sizes
def test_a_memoryview_arrives_as_bytes(pool: ZmqExecutor, size: int) -> None:
    """As cloudpickle has it."""
    data = bytearray(os.urandom(size * 8))
    future = pool.submit(identity, memoryview(data)[::2])
    expected = bytes(data[::2])
    data[:] = bytes(size * 8)
    assert future.result() == expected


# --------------------------------------------------------------- whose it is


WRITABLE: dict[str, Make] = {
    "bytearray": lambda n: bytearray(n * 8),
    "array.array": lambda n: array.array("q", bytes(n * 8)),
    "numpy": lambda n: np.zeros(n),
    "PickleBuffer": lambda n: pickle.PickleBuffer(bytearray(n * 8)),
}


@sizes
@pytest.mark.parametrize("kind", WRITABLE)
def test_arguments_are_writable_and_isolated(pool: ZmqExecutor, kind: str, size: int) -> None:
    value = WRITABLE[kind](size)
    futures = [pool.submit(fill, value) for _ in range(3)]
    assert [future.result() for future in futures] == [(b"\x07\x07\x07", size * 8)] * 3
    assert bytes(memoryview(value).cast("B")) == bytes(size * 8)


@sizes
@pytest.mark.parametrize("kind", ["bytearray", "array.array", "numpy"])
def test_results_are_the_receivers_own(pool: ZmqExecutor, kind: str, size: int) -> None:
    value = WRITABLE[kind](size)
    first, second = (pool.submit(identity, value).result() for _ in range(2))
    fill(first)
    assert bytes(memoryview(second).cast("B")) == bytes(size * 8)
    for _ in range(3):  # what was a segment's memory is not used for another task's
        pool.submit(identity, WRITABLE[kind](size)).result()
    assert memoryview(first).cast("B")[-1] == 7


@sizes
@pytest.mark.parametrize("kind", WRITABLE)
def test_what_the_caller_changes_later_does_not_count(
    pool: ZmqExecutor, kind: str, size: int
) -> None:
    def total(value: Any) -> int:
        return sum(memoryview(value).cast("B")[:1000])

    value = WRITABLE[kind](size)
    futures = []
    for _ in range(20):
        futures.append(pool.submit(total, value))
        fill(value)
        futures.append(pool.submit(total, {"nested": value}["nested"]))
        memoryview(value).cast("B")[:] = bytes(size * 8)
    seven = 7 * min(1000, size * 8)
    assert [future.result() for future in futures] == [0, seven] * 20


class Shrinks:
    """What changes a bytearray while it is pickled, after the bytearray was."""

    def __init__(self, value: bytearray) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        del self.value[10:]
        return int, ()


def test_a_bytearray_that_changes_its_size_while_it_is_pickled(pool: ZmqExecutor) -> None:
    value = bytearray(b"x" * 1_000_000)
    back, _ = pool.submit(identity, (value, Shrinks(value))).result()
    assert back == b"x" * 1_000_000
    assert len(value) == 10


# --------------------------------------------------------------- pandas, pyarrow


def frame(size: int) -> Any:
    import pandas as pd

    numbers = np.arange(size)
    return pd.DataFrame(
        {
            "integers": numbers,
            "floats": numbers / 3,
            "more": numbers * 2.5,
            "texts": [f"text {number % 7}" for number in numbers],
            "objects": [None if number % 2 else (number,) for number in numbers],
            "categories": pd.Categorical(["abc"[k % 3] for k in range(size)]),
            "times": pd.to_datetime(numbers, unit="s"),
            "with time zone": pd.to_datetime(numbers, unit="s", utc=True),
            "nullable": pd.array([None, *numbers[1:].tolist()], dtype="Int64"),
        },
        index=pd.Index(numbers[::-1], name="index"),
    )


@needs_pandas
@sizes
def test_a_data_frame(pool: ZmqExecutor, size: int) -> None:
    import pandas as pd

    value = frame(min(size, 100_000))
    back = pool.submit(identity, value).result()
    pd.testing.assert_frame_equal(back, value)
    back.loc[:, "floats"] = 1.5
    back.iloc[0, 0] = -1
    assert back["floats"].sum() == 1.5 * len(back)
    assert value["floats"].iloc[-1] == (len(value) - 1) / 3


@needs_pandas
@sizes
@pytest.mark.parametrize("column", ["integers", "texts", "objects", "categories", "nullable"])
def test_a_series(pool: ZmqExecutor, column: str, size: int) -> None:
    import pandas as pd

    value = frame(min(size, 100_000))[column]
    pd.testing.assert_series_equal(pool.submit(identity, value).result(), value)


@needs_pandas
def test_a_task_writes_to_its_own_data_frame(pool: ZmqExecutor) -> None:
    def change(data: Any) -> float:
        data["floats"] = 2.0
        data.iloc[5, 0] = 1_000_000
        return float(data["floats"].sum() + data["integers"].max())

    value = frame(100_000)
    before = value.copy(deep=True)
    assert pool.submit(change, value).result() == 200_000 + 1_000_000
    assert value.equals(before)


@needs_pandas
def test_a_data_frame_may_be_changed_after_submit(pool: ZmqExecutor) -> None:
    value = frame(100_000)[["integers", "floats"]]
    future = pool.submit(lambda data: int(data["integers"].sum()), value)
    value.loc[:, "integers"] = 0
    assert future.result() == sum(range(100_000))


@needs_pyarrow
@sizes
def test_pyarrow(pool: ZmqExecutor, size: int) -> None:
    import pyarrow as pa

    numbers = pa.array(np.arange(size))
    texts = pa.array([None if k % 5 == 0 else f"text {k}" for k in range(size)])
    table = pa.table(
        {
            "numbers": numbers,
            "texts": texts,
            "lists": pa.array([[k, k + 1] for k in range(size)]),
            "dictionary": texts.dictionary_encode(),
        }
    )
    values = {
        "array": numbers,
        "slice": texts[3:-3],
        "chunked": pa.chunked_array([numbers, numbers]),
        "table": table,
        "batch": table.to_batches()[0],
    }
    back = pool.submit(identity, Record("arrow", values)).result().values
    assert back.keys() == values.keys()
    for name, value in values.items():
        assert type(back[name]) is type(value)
        assert back[name].equals(value)
        back[name].validate(full=True)
    buffer = pool.submit(identity, pa.py_buffer(b"x" * size * 8)).result()
    assert buffer.to_pybytes() == b"x" * size * 8


# ------------------------------------------------------------- globals of a script


Script = Callable[..., subprocess.CompletedProcess[str]]


def test_a_context_variable_keeps_its_default(run_script: Script) -> None:
    done = run_script("""
        from contextvars import Context, ContextVar
        from zmqexecutor import ZmqExecutor
        NOTHING = object()
        level, empty = ContextVar("level", default=[5]), ContextVar("empty", default=None)
        unset, marked = ContextVar("unset"), ContextVar("marked", default=NOTHING)
        level.set("of the parent")
        def read():
            return level.get(), empty.get(), unset.get("unset"), marked.get() is NOTHING
        with ZmqExecutor(1) as pool:
            print(pool.submit(read).result())
            Context().run(level.get).append(6)  # the default itself
            print(pool.submit(read).result())
    """)
    assert done.stdout == "([5], None, 'unset', True)\n([5, 6], None, 'unset', True)\n", done.stderr


def test_a_generic_function_keeps_its_attributes(run_script: Script) -> None:
    done = run_script("""
        import functools
        from zmqexecutor import ZmqExecutor
        def show(value): return "object"
        show.calls = 0
        show = functools.singledispatch(show)
        show.register(int, lambda value: "int")
        show.calls, show.itself = 1, show
        class Box:
            @functools.singledispatchmethod
            def show(self, value): return "object"
            show.register(int, lambda self, value: "int")
            show.calls = 2
        def look():
            method = vars(Box)["show"]
            return show("x"), show(1), show.calls, show.itself is show, show.__wrapped__(1), (
                Box().show("x"), Box().show(1), method.calls)
        with ZmqExecutor(1) as pool:
            print(pool.submit(look).result() == look(), pool.submit(look).result())
            show.calls, vars(Box)["show"].calls = 3, 4
            print(pool.submit(look).result() == look(), show.calls)
    """)
    assert done.stdout == (
        "True ('object', 'int', 1, True, 'object', ('object', 'int', 2))\nTrue 3\n"
    ), done.stderr


@pytest.mark.skipif(sys.version_info < (3, 12), reason="has no aliases")
def test_a_type_alias_keeps_its_parameters(run_script: Script) -> None:
    done = run_script("""
        from zmqexecutor import ZmqExecutor
        exec("type Table[K] = dict[K, int]\\ntype Plain = list[int]\\ntype Args[**P, *Ts] = int")
        def look():
            (parameter,) = Table.__type_params__
            return (Table[str].__args__, parameter is Table.__value__.__args__[0],
                Plain.__type_params__, Plain.__value__, [p.__name__ for p in Args.__type_params__])
        with ZmqExecutor(1) as pool:
            print(pool.submit(look).result() == look(), look()[:3])
    """)
    assert done.stdout == "True ((<class 'str'>,), True, ())\n", done.stderr


@pytest.mark.skipif(sys.version_info < (3, 13), reason="has no defaults")
def test_type_parameters_keep_their_defaults(run_script: Script) -> None:
    done = run_script("""
        from typing import Generic, ParamSpec, TypeVar, TypeVarTuple
        from zmqexecutor import ZmqExecutor
        T, U = TypeVar("T"), TypeVar("U", bound=object, covariant=True, default=int)
        P, Ts = ParamSpec("P", default=[int]), TypeVarTuple("Ts", default=None)
        class Pair(Generic[T, U]): pass
        exec("class New[T, U = int]: pass")
        def look():
            return (Pair[str].__args__, New[str].__args__, Pair.__parameters__[1] is U,
                U.__bound__, U.__covariant__, U.__default__, P.__default__, Ts.__default__)
        with ZmqExecutor(1) as pool:
            print(pool.submit(look).result() == look(), look()[:2])
    """)
    expected = "((<class 'str'>, <class 'int'>), (<class 'str'>, <class 'int'>))"
    assert done.stdout == f"True {expected}\n", done.stderr


@pytest.mark.skipif(sys.version_info < (3, 12), reason="has no such functions")
def test_a_generic_function_keeps_its_parameters(run_script: Script) -> None:
    done = run_script("""
        from typing import get_type_hints
        from zmqexecutor import ZmqExecutor
        exec("def first[T](items: 'list[T]') -> 'T': return items[0]")
        def look():
            (parameter,) = first.__type_params__
            return get_type_hints(first)["return"] is parameter, parameter.__name__
        with ZmqExecutor(1) as pool: print(pool.submit(look).result())
    """)
    assert done.stdout == "(True, 'T')\n", done.stderr
