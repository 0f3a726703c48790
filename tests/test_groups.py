"""Large graphs of objects, looked at by type: no change of any of them is missed."""

from __future__ import annotations

import copyreg
import dataclasses
import datetime
import decimal
import enum
import functools
import gc
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import sent_by_value
from tests.test_bulk import Counted
from zmqexecutor import ZmqExecutor
from zmqexecutor.payload import pieces
from zmqexecutor.payload.proofs import prove
from zmqexecutor.payload.serialization import CallPickler

SCRIPT = """
import dataclasses

@dataclasses.dataclass
class Point:
    x: object
    y: object = 2.5
    tags: list = dataclasses.field(default_factory=list)

class Other(Point):
    pass

class Slotted:
    __slots__ = ("left", "right")

    def __init__(self, left, right):
        self.left, self.right = left, right

class Single:
    __slots__ = ("item",)

    def __init__(self, item):
        self.item = item

class Both(Slotted):
    def __init__(self, left, right):
        super().__init__(left, right)
        self.more = 1

class Odd:
    def __init__(self, item):
        self.item = item

    def __reduce__(self):
        return Odd, (self.item,)

value = None

def get():
    return value
"""
MANY = 300


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Any]:
    """A module whose functions, classes and globals are sent by value."""
    with sent_by_value("grouped_script", SCRIPT, tmp_path) as module:
        yield module


class Colour(enum.Enum):
    """A few of them, in many objects."""

    RED = 1
    GREEN = 2


def points(script: Any) -> list[Any]:
    return [script.Point(n, n / 2, [n]) for n in range(MANY)]


def slotted(script: Any) -> dict[str, Any]:
    return {str(n): script.Slotted(n, script.Single([n])) for n in range(MANY)}


def tree(script: Any, depth: int = 8) -> Any:
    return script.Slotted(*(depth and tree(script, depth - 1) for _ in range(2)))


def lists(script: Any) -> list[Any]:
    return [[n, {n: {script.Single(n)}}, (n, [n])] for n in range(MANY)]


def swap(one: Any, other: Any) -> None:
    one.x, other.x = other.x, one.x


def put_last(point: Any) -> None:
    point.x = vars(point).pop("x")


def become(point: Any, kind: type) -> None:
    point.__class__ = kind


Graph = Any
CHANGES: dict[str, tuple[Callable[[Any], Graph], Callable[[Any, Graph], object]]] = {
    "an attribute": (points, lambda _, value: setattr(value[7], "x", "another")),
    "an equal number": (points, lambda _, value: setattr(value[1], "x", True)),
    "one more": (points, lambda _, value: setattr(value[7], "more", 1)),
    "one less": (points, lambda _, value: delattr(value[7], "y")),
    "another order": (points, lambda _, value: put_last(value[7])),
    "one moved": (points, lambda _, value: swap(value[7], value[8])),
    "all in another table": (points, lambda _, value: setattr(value[7], "__dict__", {"x": 1})),
    "another class": (points, lambda script, value: become(value[7], script.Other)),
    "what the class is": (points, lambda script, _: setattr(script.Point, "size", 1)),
    "what an object has": (points, lambda _, value: value[-1].tags.append(1)),
    "an item of it": (points, lambda _, value: value[-1].tags.__setitem__(0, "another")),
    "an object more": (points, lambda script, value: value.append(script.Point(1))),
    "two objects exchanged": (points, lambda _, value: value.insert(0, value.pop())),
    "one for another": (points, lambda script, value: value.__setitem__(3, script.Point(3, 1.5))),
    "a slot": (slotted, lambda _, value: setattr(value["7"], "left", "another")),
    "a deleted slot": (slotted, lambda _, value: delattr(value["7"], "left")),
    "the only slot": (slotted, lambda _, value: value["7"].right.item.clear()),
    "an entry": (slotted, lambda _, value: value.pop("7")),
    "deep in a tree": (tree, lambda _, value: setattr(value.left.right.left.right, "left", 1)),
    "a leaf": (
        tree,
        lambda _, value: setattr(
            functools.reduce(lambda node, _: node.right, range(8), value), "right", 1
        ),
    ),
    "an item": (lists, lambda _, value: value[7].append(1)),
    "a key": (lists, lambda _, value: value[7][1].update({"more": 1})),
    "in a set": (lists, lambda script, value: value[7][1][7].add(script.Single(1))),
    "in a tuple": (lists, lambda _, value: value[7][2][1].append(1)),
    "what is in a set": (lists, lambda _, value: setattr(next(iter(value[7][1][7])), "item", 1)),
}


@pytest.mark.parametrize(("make", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_changes_are_seen(
    script: Any, make: Callable[[Any], Graph], change: Callable[[Any, Graph], object]
) -> None:
    value = make(script)
    proof = prove(value)
    assert proof is not None
    proof.holds()  # the first time modules may be imported
    assert prove(value).holds()  # type: ignore[union-attr]
    proof = prove(value)
    assert proof is not None
    assert proof.holds()
    assert len(proof.checks) < MANY, "each by itself"
    change(script, value)
    assert not proof.holds()


def facts(value: Any) -> Any:
    """All that can be told of a graph that is a tree."""
    if isinstance(value, (list, tuple)):
        return [type(value), *map(facts, value)]
    if isinstance(value, set):
        return [set, sorted(map(str, map(facts, value)))]
    if isinstance(value, dict):
        return [dict, *((facts(key), facts(item)) for key, item in value.items())]
    attributes = dict(getattr(value, "__dict__", {}))
    for name in getattr(type(value), "__slots__", ()):
        if hasattr(value, name):
            attributes[name] = getattr(value, name)
    return [type(value), facts(attributes)] if attributes else (type(value), value)


def test_workers_have_what_is_there_now(script: Any) -> None:
    with ZmqExecutor(1) as executor:
        for make, change in CHANGES.values():
            script.value = make(script)
            for _ in range(3):
                assert facts(executor.submit(script.get).result(60)) == facts(script.value)
            change(script, script.value)
            for _ in range(2):
                assert facts(executor.submit(script.get).result(60)) == facts(script.value)


class Maker:
    """Makes graphs by chance, and changes them."""

    def __init__(self, script: Any, seed: int) -> None:
        self.script = script
        self.random = random.Random(seed)
        self.nodes: list[Any] = []

    def leaf(self) -> Any:
        return self.random.choice(
            [None, True, 1, 1.0, "text", b"bytes", (), Colour.RED, (1, "a"), 10**20]
        )

    def child(self) -> Any:
        if self.nodes and self.random.random() < 0.6:
            return self.random.choice(self.nodes[-200:])
        return self.leaf()

    def children(self) -> list[Any]:
        return [self.child() for _ in range(self.random.randrange(4))]

    def node(self) -> Any:
        script = self.script
        make: Callable[[], Any] = self.random.choice(
            [
                self.children,
                lambda: tuple(self.children()),
                lambda: dict(enumerate(self.children())),
                lambda: {n for n in self.children() if type(n) in (int, str, script.Slotted)},
                lambda: script.Point(self.child(), self.child()),
                lambda: script.Other(self.child()),
                lambda: script.Slotted(self.child(), self.child()),
                lambda: script.Single(self.child()),
                lambda: script.Both(self.child(), self.child()),
            ]
        )
        return make()

    def graph(self, size: int) -> Any:
        for _ in range(size):
            self.nodes.append(self.node())
        return [self.nodes[: size // 2], {"more": self.nodes[size // 2 :]}]

    def change(self) -> None:
        """Something of one object."""
        node, new = self.random.choice(self.nodes), self.child()
        if isinstance(node, list):
            node.insert(self.random.randint(0, len(node)), new)
        elif isinstance(node, dict):
            node[self.random.randrange(3)] = new
        elif isinstance(node, set):
            node ^= {self.random.choice([1, 2, "text"])}
        elif hasattr(node, "__slots__") and not hasattr(node, "__dict__"):
            setattr(node, self.random.choice(node.__slots__), new)
        elif not isinstance(node, tuple):
            setattr(node, self.random.choice(["x", "y", "more", "left"]), new)


@pytest.mark.parametrize("seed", range(12))
def test_changes_by_chance(script: Any, seed: int) -> None:
    """The proof says that nothing has changed only if a new pickle says the same."""
    maker = Maker(script, seed)
    value = maker.graph(maker.random.choice([100, 500, 1500]))
    prove(value)  # modules may be imported
    seen = []
    for _ in range(40):
        before = pickle.dumps(value)
        proof = prove(value)
        assert proof is not None
        assert proof.holds()
        maker.change()
        same = pickle.dumps(value) == before
        assert not proof.holds() or same
        seen.append((proof.holds(), same))
    assert (False, False) in seen
    assert seen.count((False, True)) < 10, "an equal object in the place of another"


def moments(_script: Any) -> list[Any]:
    return [
        (datetime.date(2020, 1, 1), decimal.Decimal(n), np.float64(n), Colour.RED)
        for n in range(MANY)
    ]


@pytest.mark.parametrize(
    "make",
    [
        moments,
        lambda script: [script.Point(Colour(n % 2 + 1), [n]) for n in range(5000)],
        lambda script: [script.Both(n, n) for n in range(MANY)],
        lambda script: {n: script.Point(script.Both(n, n)) for n in range(MANY)},
        lambda script: [script.Point(n, script.points) for n in range(MANY)],
        lambda script: [script.Point(np.zeros(1)) for n in range(MANY)],
    ],
)
def test_what_else_has_a_proof(script: Any, make: Callable[[Any], Any]) -> None:
    script.points = points(script)
    value = make(script)
    prove(value)
    proof = prove(value)
    assert proof is not None
    assert proof.holds()


def test_one_among_many_that_reduces_itself(script: Any) -> None:
    assert prove([*points(script), script.Odd(1)]) is None
    assert prove([script.Point(script.Odd(n)) for n in range(MANY)]) is None


def test_nothing_is_kept_of_what_has_been_deleted(script: Any) -> None:
    pickler = CallPickler()
    script.value = [script.Point(n) for n in range(5000)]
    keys = {pickler.dump_call(script.get, (), {}).shared.key for _ in range(4)}
    assert len(keys) == 1
    one = weakref.ref(script.value[7])
    script.value = None
    pickler.dump_call(lambda: 1, (), {})
    gc.collect()
    assert one() is None


def test_what_changes_each_time_is_not_looked_through(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take half as long again, in vain."""
    proved = []

    def watched(value: Any, **kwargs: Any) -> Any:
        if value is script.value:
            proved.append(value)
        return prove(value, **kwargs)

    monkeypatch.setattr(pieces, "prove", watched)
    pickler = CallPickler()
    counted = Counted(monkeypatch)

    def key() -> bytes:
        return pickler.dump_call(script.get, (), {}).shared.key

    script.value = points(script)
    assert key() == key()
    assert len(proved) == 1
    keys = []
    for n in range(5):
        script.value[n].x = "another"
        keys.append(key())
    assert len(set(keys)) == 5
    assert len(proved) == 1
    assert len({key() for _ in range(4)}) == 1
    assert len(proved) == 2
    pickles = counted.pickles
    key()
    assert counted.pickles == pickles
    script.value[0].x = "yet another"
    assert key() not in keys


# ------------------------------------------------------------- what was found by attacks


def test_types_that_are_equal_to_others() -> None:
    class Meta(type):
        def __eq__(cls, other: object) -> bool:
            return True

        def __hash__(cls) -> int:
            return 7

    class Old(metaclass=Meta):
        __slots__ = ("x",)

        def __init__(self, x: object) -> None:
            self.x = x

        def __len__(self) -> int:
            raise AssertionError

    class New(metaclass=Meta):
        __slots__ = ("x",)

    value = [Old(n) for n in range(MANY)]
    changes: list[Callable[[], None]] = [
        lambda: setattr(value[7], "x", "another"),
        lambda: become(value[7], New),
    ]
    for change in changes:
        proof = prove(value)
        assert proof is not None
        assert proof.holds()
        change()
        assert not proof.holds()


def test_a_slot_with_nothing_in_it(script: Any) -> None:
    value = slotted(script)
    del value["7"].left
    proof = prove(value)
    assert proof is not None
    assert proof.holds()
    value["7"].left = 1
    assert not proof.holds()


def reduced(_: object) -> tuple[Callable[..., Any], tuple[()]]:
    return list, ()


@pytest.mark.parametrize("count", [1, 10, 5000])
def test_a_reduction_that_is_registered_later(
    script: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(copyreg, "dispatch_table", dict(copyreg.dispatch_table))
    value = [script.Point(n) for n in range(count)]
    prove(value)
    proof = prove(value)
    assert proof is not None
    assert proof.holds()
    copyreg.pickle(script.Point, reduced)
    assert not proof.holds()


def test_what_a_dataclass_tells_of_its_fields(script: Any) -> None:
    proof = prove(script.Point)
    assert proof is not None
    assert proof.holds()
    script.Point.__dataclass_fields__["x"].default = 7
    assert not proof.holds()


@pytest.mark.parametrize("count", [100, 5000])
@pytest.mark.parametrize("kind", [list, dict])
def test_nothing_is_kept_of_what_has_been_emptied(script: Any, count: int, kind: type) -> None:
    pickler = CallPickler()
    script.value = kind((n, script.Point(n)) for n in range(count))
    for _ in range(4):
        pickler.dump_call(script.get, (), {})
    one = weakref.ref(script.value[7] if kind is dict else script.value[7][1])
    script.value.clear()
    pickler.dump_call(lambda: 1, (), {})
    gc.collect()
    assert one() is None
    assert pickler.dump_call(script.get, (), {}).shared is not None


def test_local_classes_that_change(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pickler = CallPickler()
    counted = Counted(monkeypatch)

    def make() -> Any:
        class Local:
            table = points(script)

        return Local

    for _ in range(3):
        cls = make()
        for n in range(4):
            pickler.dump_call(cls, (), {})
            cls.table[n].x = "another"
        for _ in range(3):
            pickler.dump_call(cls, (), {})
        pickles = counted.pickles
        pickler.dump_call(cls, (), {})
        assert counted.pickles == pickles
        dead = weakref.ref(cls)
        del cls
        gc.collect()
        assert dead() is None
    assert not pickler._definitions._changing


@pytest.mark.parametrize(
    "make", [lambda: np.zeros(100_000), lambda: tuple(range(10_000)), lambda: [[0] * 10_000]]
)
def test_an_equal_one_is_not_packed_again(
    script: Any, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    packed = []
    pickler = CallPickler()
    pack = pickler.packer.bulk

    def counted(*args: Any) -> Any:
        packed.append(args)
        return pack(*args)

    monkeypatch.setattr(pickler.packer, "bulk", counted)
    for _ in range(5):
        script.value = make()
        pickler.dump_call(script.get, (), {})
    assert len(packed) == 1


def fields_of(cls: Any) -> tuple[bool, ...]:
    return tuple(field.default_factory is dataclasses.MISSING for field in dataclasses.fields(cls))


def derive(cls: Any) -> Any:
    @dataclasses.dataclass
    class Derived(cls):  # type: ignore[misc]
        z: int = 7
        _: dataclasses.KW_ONLY = dataclasses.KW_ONLY  # type: ignore[assignment]
        more: list[int] = dataclasses.field(default_factory=list)

    made = Derived(1)
    return made.x, made.y, made.tags, made.z, made.more


def test_a_dataclass_of_the_script_is_one_in_workers(script: Any) -> None:
    """What dataclasses know a missing default by is one object, in each process."""
    with ZmqExecutor(1) as executor:
        assert executor.submit(fields_of, script.Point).result(60) == (True, True, False)
        assert executor.submit(derive, script.Point).result(60) == (1, 2.5, [], 7, [])
        assert executor.submit(script.Point, 1).result(60) == script.Point(1)
