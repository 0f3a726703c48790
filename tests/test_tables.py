"""A change of a large dictionary is never missed, whether CPython numbers it or not."""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from zmqexecutor.payload import tables
from zmqexecutor.payload.checks import same_items
from zmqexecutor.payload.tables import unchanged

Table = dict[Any, Any]
NUMBERED = sys.implementation.name == "cpython" and (3, 10) <= sys.version_info < (3, 14)


class Text(str):
    """A key that can be referred to weakly."""


def make() -> Table:
    return {n: str(n) for n in range(1000)}


def store_in_a_loop(table: Table) -> None:
    for n in range(1000):  # often enough for an instruction of its own
        table[n] = n


def delete(table: Table) -> None:
    del table[7]


def delete_and_put_back(table: Table) -> None:
    value = table.pop(7)
    table[7] = value  # another order


def bind_as_globals(table: Table) -> None:
    exec("name = 1", table)


CHANGES: dict[str, Callable[[Table], object]] = {
    "another value": lambda table: table.__setitem__(7, "another"),
    "an equal value": lambda table: table.__setitem__(777, "".join(["77", "7"])),
    "another entry": lambda table: table.__setitem__("more", 1),
    "in a loop": store_in_a_loop,
    "deleted": delete,
    "deleted and put back": delete_and_put_back,
    "pop": lambda table: table.pop(7),
    "popitem": lambda table: table.popitem(),
    "setdefault": lambda table: table.setdefault("more", 1),
    "update": lambda table: table.update({7: "another"}),
    "update by keywords": lambda table: table.update(more=1),
    "|=": lambda table: table.__ior__({7: "another"}),
    "clear": lambda table: table.clear(),
    "__init__": lambda table: table.__init__(more=1),  # type: ignore[misc]
    "the globals of code": bind_as_globals,
}
LOOKS: dict[str, Callable[[Table], object]] = {
    "get": lambda table: (table.get(7), table.get(-1), table[8]),
    "setdefault": lambda table: table.setdefault(7, "another"),
    "the same value": lambda table: table.__setitem__(7, table[7]),
    "items": lambda table: (list(table), list(table.values()), list(table.items())),
    "copy": lambda table: (table.copy(), table | {}),
    "refused": lambda table: table.pop(-1, None),
}
WAYS = ["numbered", "another Python", "no ctypes"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "another Python":
        monkeypatch.setattr(tables, "_numbers_changes", lambda: False)
    elif request.param == "no ctypes":
        monkeypatch.setitem(sys.modules, "ctypes", None)
    return str(request.param)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes(way: str, change: Callable[[Table], object]) -> None:
    table = make()
    if way == "numbered" and NUMBERED:
        assert unchanged(table) is not None
    else:
        assert unchanged(table) is None or way == "numbered"
    check = same_items(table)
    assert check()
    before = [*map(id, itertools.chain.from_iterable(table.items()))]
    kept = table.copy()
    change(table)
    assert before != [*map(id, itertools.chain.from_iterable(table.items()))]
    assert not check()
    assert kept  # so that no address was used again


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_looks(look: Callable[[Table], object]) -> None:
    table = make()
    check = same_items(table)
    look(table)
    assert check()


def test_changed_back() -> None:
    """A change that is undone is one for a number, and none for a comparison."""
    table = make()
    check = same_items(table)
    value = table[7]
    table[7] = None
    assert not check()
    table[7] = value
    assert check() != NUMBERED


@pytest.mark.skipif(not NUMBERED, reason="this Python does not number changes")
def test_no_copy_is_kept() -> None:
    key = Text("key")
    gone = weakref.ref(key)
    table: Table = {**make(), key: 1}
    check = same_items(table)
    del table[key], key
    gc.collect()
    assert gone() is None
    assert not check()


def test_small_tables_are_compared() -> None:
    table = {n: n for n in range(100)}
    assert unchanged(table) is None
    check = same_items(table)
    assert check()
    table[7] = True
    assert not check()
