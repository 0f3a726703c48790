"""What of a script's globals is not pickled again for each task, and that no change is missed."""

from __future__ import annotations

import array
import collections
import datetime
import functools
import gc
import itertools
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import pytest

from tests.conftest import sent_by_value
from tests.test_bulk import Counted
from zmqexecutor import ZmqExecutor
from zmqexecutor.payload.definitions import Definitions
from zmqexecutor.payload.namespaces import travels_by_value
from zmqexecutor.payload.picklers import DefinitionPickler
from zmqexecutor.payload.proofs import prove
from zmqexecutor.payload.serialization import CallPickler, Made

SCRIPT = """
import collections, functools, random, typing
import numpy as np

Pair = collections.namedtuple("Pair", "left right", defaults=[2])

class Named(typing.NamedTuple):
    left: int
    right: int = 2

    def both(self):
        return self.left + self.right

class WithMore(Pair):
    def __init__(self, *args):
        self.more = [1]

class Reduced:
    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return Reduced, (self.value,)

    def __eq__(self, other):
        return type(other) is Reduced and self.value == other.value

@functools.singledispatch
def describe(value):
    return "something"

@describe.register
def _(value: int):
    return "a number"

class Describer:
    @functools.singledispatchmethod
    def describe(self, value):
        return "something"

value = None
other = None

def get():
    return value

def is_other():
    return value[0] is other

def take(*args):
    return args[0]
"""


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Any]:
    """A module whose functions, classes and globals are sent by value."""
    with sent_by_value("proven_script", SCRIPT, tmp_path) as module:
        yield module


class Calls(Counted):
    """Calls of `script.get`, and how many pickles their definitions took."""

    def __init__(self, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self._script = script
        self._pickler = CallPickler()

    def key(self) -> bytes:
        shared = self._pickler.dump_call(self._script.get, (), {}).shared
        assert shared is not None
        return shared.key

    def are_pickled_anew(self) -> bool:
        before = self.pickles
        self.key()
        return self.pickles != before


@pytest.fixture
def calls(script: Any, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(script, monkeypatch)


def bind(make: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(script: Any) -> None:
        script.value = make(script)

    return change


def add_a_case(script: Any) -> None:
    script.value.register(str, lambda _: "text")


def add_a_method(script: Any) -> None:
    vars(script.Describer)["describe"].register(int, lambda _self, _: "a number")


Change = Callable[[Any], object]

PROVEN: dict[str, tuple[Callable[[Any], Any], Change]] = {
    "a named tuple's class": (
        lambda script: script.Pair,
        lambda script: setattr(script.Pair, "both", lambda pair: sum(pair)),
    ),
    "its documentation": (
        lambda script: script.Pair,
        lambda script: setattr(script.Pair.left, "__doc__", "the other one"),
    ),
    "typing.NamedTuple": (
        lambda script: script.Named,
        lambda script: setattr(script.Named, "both", lambda pair: pair.left),
    ),
    "a named tuple": (
        lambda script: script.Pair([1], 2),
        lambda script: script.value.left.append(2),
    ),
    "one with attributes": (
        lambda script: script.WithMore(1, 2),
        lambda script: script.value.more.append(2),
    ),
    "a generic function": (lambda script: script.describe, add_a_case),
    "a class with a generic method": (lambda script: script.Describer, add_a_method),
    "numpy's function": (lambda _: np.sqrt, bind(lambda _: np.cbrt)),
    "numpy's type": (lambda _: np.dtype("f8"), bind(lambda _: np.dtype("f4"))),
    "a list of dictionaries": (
        lambda _: [{"a": n, "b": [str(n)]} for n in range(100)],
        lambda script: script.value[50]["b"].append("more"),
    ),
    "an equal number of another type": (
        lambda _: {"a": [1], "b": (0, {2})},
        lambda script: script.value["a"].__setitem__(0, True),
    ),
    "a tuple that has a list in it": (
        lambda _: (1, [2, 3]),
        lambda script: script.value[1].reverse(),
    ),
    "what comes to be something else": (
        lambda _: [[1], [2]],
        lambda script: script.value.append(script.Pair(1)),
    ),
    "a large table of texts": (
        lambda _: {n: str(n) for n in range(5000)},
        lambda script: script.value.__setitem__(77, "another"),
    ),
}


@pytest.mark.parametrize(("make", "change"), PROVEN.values(), ids=PROVEN.keys())
def test_what_has_a_proof(
    script: Any, calls: Calls, make: Callable[[Any], Any], change: Change
) -> None:
    script.value = make(script)
    keys = [calls.key() for _ in range(2)]
    assert not calls.are_pickled_anew()
    change(script)
    assert calls.are_pickled_anew()
    keys.append(calls.key())
    assert keys[0] == keys[1] != keys[2]
    assert not calls.are_pickled_anew()


def shuffle(script: Any) -> None:
    script.value.seed(7)


def large_objects(script: Any) -> list[Any]:
    return [script.Reduced(str(n)) for n in range(20_000)]


class Imported:
    """Its instances reduce themselves, and others can import it."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __reduce__(self) -> Any:
        return Imported, (self.array,)


REPEATED: dict[str, tuple[Callable[[Any], Any], Change]] = {
    "a generator of numbers": (lambda _: random.Random(1), shuffle),
    "numpy's": (lambda _: np.random.default_rng(1), lambda script: script.value.random()),
    "a bytearray": (lambda _: bytearray(b"abc"), lambda script: script.value.append(1)),
    "an array": (lambda _: array.array("d", [1]), lambda script: script.value.append(1)),
    "numpy's of objects": (
        lambda _: np.array([[1], "a"], dtype=object),
        lambda script: script.value[0].append(2),
    ),
    "numpy's of records": (
        lambda _: np.zeros(3, dtype=[("a", "f8")]),
        lambda script: script.value["a"].__setitem__(1, 1),
    ),
    "one that reduces itself": (
        lambda script: script.Reduced([1]),
        lambda script: script.value.value.append(2),
    ),
    "many of these": (large_objects, lambda script: setattr(script.value[-1], "value", "another")),
    "with an array": (
        lambda _: Imported(np.zeros(4)),
        lambda script: script.value.array.__setitem__(1, 1),
    ),
    "with a large array": (
        lambda _: Imported(np.zeros(100_000)),
        lambda script: script.value.array.__setitem__(50_000, 1),
    ),
    "with a large array by columns": (
        lambda _: Imported(np.asfortranarray(np.zeros((300, 300)))),
        lambda script: script.value.array.__setitem__((7, 8), 1),
    ),
    "with one of which every other item counts": (
        lambda _: Imported(np.zeros(100_000)[::2]),
        lambda script: script.value.array.__setitem__(7, 1),
    ),
    "with a class of the script": (
        lambda script: Imported(script.Reduced),
        bind(lambda script: Imported(script.Pair)),
    ),
    "a deque that has an object in it": (
        lambda script: collections.deque([script.Reduced([1])]),
        lambda script: script.value[0].value.append(2),
    ),
    "an equal one": (
        lambda script: script.Reduced(1),
        bind(lambda script: script.Reduced(1)),  # what tasks have done to the other is no matter
    ),
}


@pytest.mark.parametrize(("make", "change"), REPEATED.values(), ids=REPEATED.keys())
def test_where_another_pickle_is_the_proof(
    script: Any, calls: Calls, make: Callable[[Any], Any], change: Change
) -> None:
    def definition() -> Any:
        return calls._pickler.dump_call(script.get, (), {}).shared

    script.value = make(script)
    first = [definition() for _ in range(4)]
    assert first[2] is first[3], "not made anew"
    assert len({shared.key for shared in first}) == 1
    change(script)
    then = [definition() for _ in range(4)]
    assert then[2] is then[3]
    assert {shared.key for shared in then} == {then[0].key} != {first[0].key}


def test_what_changes_each_time_has_none(script: Any, calls: Calls) -> None:
    """Its pickle would be made twice for each call, once in vain."""
    script.value = random.Random(1)
    for _ in range(4):
        calls.key()
    counts = []
    for _ in range(6):
        script.value.random()
        before = calls.pickles
        calls.key()
        counts.append(calls.pickles - before)
    assert set(counts[1:]) == {2}, "the function, and the global"


@pytest.mark.parametrize("size", [4, 100_000])
def test_a_pickle_keeps_nothing_alive(script: Any, calls: Calls, size: int) -> None:
    script.value = Imported(np.zeros(size))
    for _ in range(4):
        calls.key()
    held = weakref.ref(script.value), weakref.ref(script.value.array)
    script.value = None
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_another_thread_that_binds_another_object(script: Any, calls: Calls) -> None:
    """Between a proof that does not hold any more and the pickle that comes after it."""
    script.value = script.Reduced(1)
    for _ in range(4):
        calls.key()
    numbers = itertools.count()
    stop = threading.Event()

    def rebind() -> None:
        while not stop.is_set():
            script.value = script.Reduced(next(numbers) // 100)

    thread = threading.Thread(target=rebind)
    thread.start()
    try:
        for _ in range(500):
            calls.key()
    finally:
        stop.set()
        thread.join()
    script.value = script.Reduced("last")
    with ZmqExecutor(1) as executor:
        assert executor.submit(script.get).result(60) == script.value


def test_workers_have_what_is_there_now(script: Any) -> None:
    with ZmqExecutor(1) as executor:

        def got() -> Any:
            return executor.submit(script.get).result(60)

        for make, change in [*PROVEN.values(), *REPEATED.values()]:
            script.value = make(script)
            for _ in range(3):
                before = got()
            change(script)
            for _ in range(3):
                after = got()
            if type(before) in (list, dict, tuple, bytearray, array.array, np.dtype):
                assert after == script.value
                assert before != after or before == {"a": [1], "b": (0, {2})}  # 1 and True
            elif isinstance(before, random.Random):
                assert before.random() != after.random() == script.value.random()


def test_moments_of_pandas(script: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = types.ModuleType("pandas")

    class Timestamp(datetime.datetime):
        pass

    Timestamp.__module__, Timestamp.__qualname__ = "pandas", "Timestamp"
    vars(pandas)["Timestamp"] = Timestamp
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    script.value = Timestamp(2020, 1, 1)
    calls.key()
    calls.key()
    assert not calls.are_pickled_anew()


class Pair(NamedTuple):
    """A named tuple that others can import."""

    left: Any
    right: Any


def test_a_named_tuple_with_a_method_for_pickle(script: Any, calls: Calls) -> None:
    number = iter(range(100))

    class Counted(Pair):
        def __reduce__(self) -> Any:
            return functools.partial(Pair, next(number)), (1,)

    script.value = Counted(1, 2)
    assert len({calls.key() for _ in range(4)}) == 4


def test_what_is_not_proven() -> None:
    class Odd(Pair):
        def __iter__(self) -> Any:
            return iter((random.random(), 1))

    inner = np.dtype([("a", "i4")])  # whose names can be changed
    assert prove(inner) is None
    assert prove(np.dtype((inner, (2,)))) is None
    assert prove(Odd(1, 2)) is None
    assert prove(Pair(1, 2)) is not None
    assert prove([[b"12345678"] for _ in range(1000)]) is not None
    assert prove([[str(number)] for number in range(100_000)]) is None, "too large"


def test_an_equal_object_that_another_global_is_bound_to(script: Any) -> None:
    script.value = np.array([types.SimpleNamespace(x=1)], dtype=object)
    script.other = types.SimpleNamespace(x=1)
    with ZmqExecutor(1) as executor:
        for _ in range(4):
            assert executor.submit(script.is_other).result(60) is False
        script.value[0] = script.other
        for _ in range(4):
            assert executor.submit(script.is_other).result(60) is True
        script.value[0] = types.SimpleNamespace(x=1)
        for _ in range(4):
            assert executor.submit(script.is_other).result(60) is False
        script.other = script.value[0]
        assert executor.submit(script.is_other).result(60) is True


def test_what_it_refers_to_is_not_kept_alive(script: Any, calls: Calls) -> None:
    script.other = Imported(np.zeros(100_000))
    script.value = script.Reduced(script.other)
    for _ in range(5):
        calls.key()
    other = weakref.ref(script.other)
    script.value = script.other = None
    calls.key()
    gc.collect()
    assert other() is None


@pytest.mark.parametrize("make", [lambda: [[0], "a"], lambda: Pair([0], "a")])
def test_a_change_between_proof_and_pickle(
    script: Any, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    """The proof is of what was there before, and would hold again when it is changed back."""
    script.value = make()
    dumps = DefinitionPickler.dumps

    def change(pickler: DefinitionPickler, value: Any) -> Any:
        if value is script.value:
            value[0][0] = 1
        return dumps(pickler, value)

    with ZmqExecutor(1) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(DefinitionPickler, "dumps", change)
            for _ in range(2):
                script.value[0][0] = 0
                assert executor.submit(script.get).result(60)[0] == [1]
        script.value[0][0] = 0
        assert executor.submit(script.get).result(60)[0] == [0]


# ------------------------------------------------------------ the calls of one `map`


@pytest.fixture
def defined(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was looked at, to see whether it has changed."""
    looked_at = []
    define = Definitions.define

    def watched(definitions: Definitions, func: Any, keys: Any) -> Any:
        looked_at.append(func)
        return define(definitions, func, keys)

    monkeypatch.setattr(Definitions, "define", watched)
    return looked_at


def bind_another_pair(script: Any, fields: str) -> None:
    make: Any = collections.namedtuple
    script.Pair = make("Pair", fields, module=script.__name__)


def test_objects_of_the_same_classes_have_the_same_definition(
    script: Any, defined: list[Any]
) -> None:
    pickler = CallPickler()
    made: Made = {}

    def key(*args: Any) -> bytes:
        return pickler.dump_call(script.take, args, {}, made).shared.key

    first = [key(1), key(script.Pair(1)), key(script.Reduced(1)), key(script.Pair(1), script.Pair)]
    assert len(defined) == 3
    assert first[1] == first[3]
    again = [key(2), key(script.Pair(3)), key(script.Reduced(5)), key(script.Pair, script.Pair(2))]
    assert again[:3] == first[:3]
    assert len(defined) == 3
    old = script.Pair(1)
    bind_another_pair(script, "right left")
    assert key(script.Pair(1, 2)) != first[1]
    assert len(defined) == 4
    key(old)  # of a class that no global is bound to
    assert len(defined) == 5


def test_functions_that_are_passed_are_looked_at_each_time(script: Any, defined: list[Any]) -> None:
    pickler = CallPickler()
    made: Made = {}
    for value in range(3):
        script.value = value
        pickler.dump_call(script.take, (script.get,), {}, made)
    assert len(defined) == 3


def test_definitions_of_many_classes_are_not_kept(script: Any) -> None:
    pickler = CallPickler()
    made: Made = {}
    for number in range(200):
        kind = type(f"Kind{number}", (), {"__module__": script.__name__})
        setattr(script, f"Kind{number}", kind)
        pickler.dump_call(script.take, (kind(),), {}, made)
    assert 1 < len(made) <= 64


def test_map_with_objects_of_the_script(script: Any, defined: list[Any]) -> None:
    with ZmqExecutor(1) as executor:

        def pairs() -> Iterator[Any]:
            for number in range(10):
                yield script.Pair(number)
            bind_another_pair(script, "right")
            for number in range(10, 20):
                yield script.Pair(number)

        results = list(executor.map(script.take, pairs(), timeout=60))
        assert results[:10] == [(number, 2) for number in range(10)]
        assert results[10:] == [(number,) for number in range(10, 20)]
        assert [result._fields for result in results] == [("left", "right")] * 10 + [
            ("right",)
        ] * 10
    assert len(defined) == 2


def test_map_with_a_method(script: Any, defined: list[Any]) -> None:
    """What its function is, is looked at once; the object is one of the arguments."""
    script.Counter = type(
        "Counter", (), {"__module__": script.__name__, "count": 0, "add": _add_to_count}
    )
    counter = script.Counter()

    def numbers() -> Iterator[int]:
        for number in range(10):
            counter.count = 100 * number
            yield number

    with ZmqExecutor(1) as executor:
        results = list(executor.map(counter.add, numbers(), timeout=60))
        assert results == [101 * number for number in range(10)]
        assert len(defined) == 1
        # In chunks the method is a part of the function that is called.
        assert list(executor.map(counter.add, range(4), chunksize=2)) == [900, 901, 902, 903]


def _add_to_count(counter: Any, number: int) -> int:
    total: int = counter.count + number
    return total


# ------------------------------------------------------------------ what is remembered


def test_nothing_is_remembered_of_globals_that_are_gone(script: Any) -> None:
    pickler = CallPickler()
    for number in range(3000):
        code = f"v{number} = [object]\ndef f{number}(): return v{number}"
        exec(code, vars(script))
        for _ in range(2):
            pickler.dump_call(vars(script)[f"f{number}"], (), {})
        del vars(script)[f"f{number}"], vars(script)[f"v{number}"]
    definitions = pickler._definitions
    for cache in (definitions._bound, definitions._repeated, definitions._pieces):
        assert len(cache) <= 1024


def test_a_module_that_is_no_longer_sent_by_value(script: Any) -> None:
    """Its name says nothing any more, also of what was sent while it did."""
    script.value = np.zeros(100_000)
    pickler = CallPickler()
    pickler.dump_call(script.get, (), {})
    cloudpickle.unregister_pickle_by_value(script)
    try:
        bind(lambda _: None)(script)
        for _ in range(2):
            pickler.dump_call(lambda: np, (), {})
        assert not travels_by_value(script.__name__)
    finally:
        cloudpickle.register_pickle_by_value(script)


def make_class(script: Any, table: list[int]) -> Any:
    return type("Local", (), {"__module__": script.__name__, "table": table})


def count_bound() -> int:
    gc.collect()
    return sum(type(each).__name__ == "_Bound" for each in gc.get_objects())


def test_nothing_is_remembered_of_classes_that_have_died(script: Any) -> None:
    with ZmqExecutor(1) as executor:
        tables = []
        for number in range(600):  # more than a worker keeps definitions
            kind = make_class(script, [number])
            assert executor.submit(script.take, kind()).result(60).table == [number]
            tables.append(weakref.ref(kind))
        del kind
        gc.collect()
        assert not any(ref() for ref in tables[:-1])
        definitions = executor._opening.pool()._pickler._definitions
        assert len(definitions._pieces) < 10
        assert len(definitions._classes) < 10
        assert executor.submit(count_bound).result(60) < 550


def test_what_a_dead_class_had_is_not_kept_by_its_proof(script: Any) -> None:
    pickler = CallPickler()
    kept = []
    for _ in range(2):
        table = functools.partial(print)  # of a type that can be referred to weakly
        kind = make_class(script, [])
        kind.table = table
        kept.append(weakref.ref(table))
        for _ in range(3):
            pickler.dump_call(script.take, (kind(),), {})
        del kind, table
    gc.collect()
    pickler.dump_call(script.take, (), {})
    assert not any(ref() for ref in kept)
