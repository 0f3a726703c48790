"""How enumerations of the script are taken apart and made again.

cloudpickle makes the members anew from their values. So what `__new__` and `__init__` of the
class did with these is missing there, and so are aliases. Here members are made as they are,
and neither of the two is run.
"""

from __future__ import annotations

import copyreg
import enum
import types
from typing import Any, Final

from cloudpickle import cloudpickle as cp

from ..system.interrupts import is_interrupt

__all__ = ["make_enum", "reduce_enum", "set_members_state"]

_MADE_BY_METACLASS: Final = (
    "_generate_next_value_",
    "_member_names_",
    "_member_map_",
    "_member_type_",
    "_value2member_map_",
)
_MADE_ANEW: Final = ("_name_", "_value_", "__objclass__")
"""Attributes of a member that `make_enum` sets."""


def reduce_enum(cls: type[enum.Enum]) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """Return what makes the class, its arguments, and its state."""
    attributes, slots = cp._class_getstate(cls)
    named = cls._member_map_
    for name in (*_MADE_BY_METACLASS, *named):
        attributes.pop(name, None)
    args = cp._enum_getnewargs(cls)
    raw = _raw_members(cls)
    if raw is None:
        return cp._make_skeleton_enum, args, (attributes, slots)
    members = list({id(member): member for member in named.values()}.values())
    numbers = {id(member): number for number, member in enumerate(members)}
    parts = (
        [(member._name_, member._value_, new) for member, new in zip(members, raw, strict=True)],
        [(name, numbers[id(member)], name in vars(cls)) for name, member in named.items()],
        [
            (value, numbers[id(member)])
            for value, member in cls._value2member_map_.items()
            if id(member) in numbers
        ],
        list(cls._member_names_),
    )
    bases, name, qualname, _, module, tracker_id, extra = args
    states = {
        member._name_: {
            name: value for name, value in vars(member).items() if name not in _MADE_ANEW
        }
        for member in members
    }
    return (
        make_enum,
        (bases, name, qualname, parts, module, tracker_id, extra),
        (attributes, slots, states),
    )


def _raw_members(cls: type[enum.Enum]) -> list[tuple[Any, ...]] | None:
    """For each member, what `__new__` of `_made_by` makes it of; None if nobody can tell."""
    kind = _made_by(cls)
    raw: dict[int, tuple[Any, ...]] = {}
    for name, member in cls._member_map_.items():
        if not isinstance(vars(cls).get(name, member), cls):
            return None  # it has the name of an attribute of its members
        new: tuple[Any, ...] = ()
        if kind is not object:
            try:
                make, args = kind.__reduce_ex__(member, 4)[:2]
            except Exception as error:  # of no kind that can be pickled
                if is_interrupt(error):
                    raise
                return None
            if make is copyreg.__newobj__:  # type: ignore[attr-defined]
                new = args[1:]
            elif make is cls:
                new = args
            else:
                return None
        raw[id(member)] = new
    return list(raw.values())


def _made_by(cls: Any) -> Any:
    """The class below its data type, such as int, whose `__new__` is no code of the script."""
    bases: tuple[Any, ...] = cls._member_type_.__mro__
    return next(base for base in bases if isinstance(base.__new__, types.BuiltinFunctionType))


def make_enum(
    bases: tuple[Any, ...],
    name: str,
    qualname: str,
    parts: tuple[Any, ...],
    module: str,
    tracker_id: str,
    _extra: None,
) -> type:
    """Make an enumeration whose members have no attributes yet."""
    metaclass: Any = type(bases[-1])
    cls: Any = metaclass.__new__(metaclass, name, bases, metaclass.__prepare__(name, bases))
    cls.__module__, cls.__qualname__ = module, qualname
    made, names, values, canonical = parts
    kind = _made_by(cls)
    members = []
    for member_name, value, new in made:
        member = kind.__new__(cls, *new)
        member._name_, member._value_, member.__objclass__ = member_name, value, cls
        members.append(member)
    for member_name, number, is_attribute in names:
        cls._member_map_[member_name] = members[number]
        if is_attribute:
            type.__setattr__(cls, member_name, members[number])
    cls._value2member_map_.update((value, members[number]) for value, number in values)
    cls._member_names_.extend(canonical)
    return cp._lookup_class_or_track(tracker_id, cls)  # type: ignore[no-any-return]


def set_members_state(cls: type[enum.Enum], states: dict[str, dict[str, Any]]) -> None:
    """Give members their attributes."""
    for name, state in states.items():
        vars(cls._member_map_[name]).update(state)
