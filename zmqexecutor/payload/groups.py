"""Many objects of one type, looked at together: whether they still hold what they held.

One at a time each takes a microsecond, and two to be pickled. Functions of the interpreter that go
through all of them take 0.3.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Final, NamedTuple, TypeAlias

from ..wire.comparison import same_objects

__all__ = ["Contents", "ReadGroup", "group_reader", "holds_the_same"]


class Contents(NamedTuple):
    """What the objects of a group hold.

    Attributes:
        form: how much each of them holds, and whatever else must stay the same.
        children: all of it, one object's after the other's.
    """

    form: Sequence[object]
    children: tuple[object, ...]


ReadGroup: TypeAlias = Callable[[Sequence[Any]], Contents]

_attributes_of: Final = operator.attrgetter("__dict__")


def _types_of(instances: Sequence[Any]) -> set[int]:
    # By their ids, since a type may have an odd idea of what is equal to it.
    return set(map(id, map(type, instances)))


def _read_items(containers: Sequence[Any]) -> Contents:
    return Contents([*map(len, containers)], tuple(chain.from_iterable(containers)))


def _read_entries(tables: Sequence[dict[Any, Any]]) -> Contents:
    keys, values = chain.from_iterable(tables), chain.from_iterable(map(dict.values, tables))
    return Contents([*map(len, tables)], tuple(chain(keys, values)))


def _read_attributes(instances: Sequence[Any]) -> Contents:
    sizes, children = _read_entries([*map(_attributes_of, instances)])
    return Contents([_types_of(instances), *sizes], children)


def _read_slots(slots_of: Callable[[Any], Any], instances: Sequence[Any]) -> Contents:
    children = tuple(chain.from_iterable(map(slots_of, instances)))
    return Contents([_types_of(instances)], children)


def group_reader(kind: type, slots: Sequence[str] | None) -> ReadGroup | None:
    """What reads the contents of objects of this type; None if that cannot be done at once.

    Args:
        kind: their type, exactly.
        slots: attributes that have one. None if they are pickled as more than their attributes.
    """
    if any(kind is each for each in (tuple, frozenset, list, set)):
        return _read_items
    if kind is dict:
        return _read_entries
    if slots is None or bool(slots) == bool(kind.__dictoffset__):
        return None
    if not slots:
        return _read_attributes
    # Of a single one `attrgetter` would return no tuple.
    return functools.partial(_read_slots, operator.attrgetter(*slots, slots[0]))


def holds_the_same(read: ReadGroup, group: Sequence[Any], contents: Contents) -> bool:
    """Whether the objects of a group hold what they did."""
    form, children = read(group)
    return form == contents.form and same_objects(children, contents.children)
