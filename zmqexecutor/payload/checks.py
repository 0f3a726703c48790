"""What the pickles of objects depend on, and checks whether that is what it was.

A *reader* tells the children of a node; a *check* compares their ids with those that were
written down, or, where that takes less time, the whole of what is there with what was.
"""

from __future__ import annotations

import abc
import collections
import copyreg
import dataclasses
import functools
import itertools
import logging
import operator
import pickle
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from ..system.interrupts import is_interrupt
from ..wire.comparison import same, same_objects
from .arrays import is_simple, known_kinds
from .namespaces import MISSING, Key, importable, namespace
from .reducers import SENTINELS, is_registered, reduce, reduce_singledispatch
from .tables import unchanged

__all__ = [
    "ATOMS",
    "CONSTANTS",
    "CONTAINERS",
    "FUNCTION_TABLES",
    "IMMUTABLE_MODULES",
    "NAMED_TUPLE_ARGS",
    "OWN_DESCRIPTORS",
    "READERS",
    "Check",
    "Read",
    "form_of",
    "has_children",
    "has_children_still",
    "has_constants",
    "has_contents",
    "instance_reader",
    "is_bound_to",
    "is_imported",
    "is_nested",
    "is_plain_array",
    "plain_function",
    "read_class",
    "read_dispatcher",
    "read_function",
    "read_instance",
    "read_names",
    "same_data",
    "same_items",
]

Read: TypeAlias = Callable[[Any], Iterable[object]]
"""Returns the children of a node, given the node or a weak reference to it."""
Check: TypeAlias = Callable[[], bool]
"""Says whether a node is what it was, or raises if it is gone."""


ATOMS: Final = frozenset(
    (
        *(type(None), bool, int, float, complex, str, bytes, range),
        *(type(...), type(NotImplemented), types.CodeType, types.BuiltinFunctionType),
        *(types.MethodDescriptorType, types.WrapperDescriptorType),
        *(types.ClassMethodDescriptorType, *SENTINELS),
        dataclasses._FIELD_BASE,  # type: ignore[attr-defined]
    )
)
CONSTANTS: Final = frozenset((type(None), bool, int, float, complex, str, bytes))
# Modules, some of which pydantic's classes need, whose instances do not change.
IMMUTABLE_MODULES: Final = frozenset(
    (
        *("annotated_types", "datetime", "decimal", "fractions", "ipaddress"),
        *("pathlib", "pydantic_core", "re", "_struct", "typing", "uuid", "zoneinfo"),
    )
)
OWN_DESCRIPTORS: Final = (types.GetSetDescriptorType, types.MemberDescriptorType)

_function_parts = operator.attrgetter(
    *("__code__", "__defaults__", "__kwdefaults__"),
    *("__name__", "__qualname__", "__module__", "__doc__"),
    *("__closure__", "__dict__", "__annotations__"),
)
_ATTRIBUTES: Final = 8
FUNCTION_TABLES: Final = 7  # where the tables begin, whose contents count
_class_parts = operator.attrgetter("__class__", "__bases__", "__name__", "__qualname__")


def read_names(source: tuple[Callable[..., object], tuple[str, ...]]) -> Iterable[object]:
    """What these names are bound to, given a function that gets them."""
    get, names = source
    return map(get, names, itertools.repeat(MISSING))


def _read_dict(source: Mapping[Any, Any]) -> Iterable[object]:
    return (*source, *source.values())


def read_function(ref: Callable[[], Any]) -> Sequence[object]:
    """What a function is made of, and what is in its cells and tables."""
    parts: tuple[Any, ...] = _function_parts(ref())
    if parts[-1] or parts[-2] or parts[-3]:
        closure, attributes, annotations = parts[-3:]
        if closure:
            parts += tuple([cell.cell_contents for cell in closure])
        for table in (attributes, annotations):
            parts += (*table, *table.values())
    return parts


def read_class(ref: Callable[[], Any]) -> Iterable[object]:
    """What a class is made of."""
    cls = ref()
    parts = (*_class_parts(cls), *cls.__dict__, *cls.__dict__.values())
    if "_abc_impl" in cls.__dict__:
        parts += (*abc._get_dump(cls)[0],)  # type: ignore[attr-defined]  # who registered
    return parts


def read_instance(obj: Any) -> Iterable[object]:
    """The attributes of an object, and its class."""
    parts: tuple[object, ...] = (type(obj),)
    attributes = getattr(obj, "__dict__", None)
    if attributes:
        parts += (*attributes, *attributes.values())
    slots = copyreg._slotnames(type(obj))  # type: ignore[attr-defined]
    if slots:
        parts += tuple([getattr(obj, name, MISSING) for name in slots])
    return parts


def instance_reader(obj: Any) -> Read:
    """What reads the attributes of such an object, and its class."""
    slots = copyreg._slotnames(type(obj))  # type: ignore[attr-defined]
    if slots and not hasattr(obj, "__dict__") and all(hasattr(obj, name) for name in slots):
        return operator.attrgetter("__class__", *slots)  # in a third of the time
    return read_instance


def _read_dispatcher(reduced: Any) -> Iterable[object]:
    _, (func,), (cases, attributes), *_ = reduced
    return (func, *itertools.chain.from_iterable(cases), *_read_dict(attributes))


def read_dispatcher(ref: Callable[[], Any]) -> Iterable[object]:
    """The cases of a generic function, and what attributes it was given."""
    return _read_dispatcher(reduce_singledispatch(ref()))


_NamedTuple = collections.namedtuple("_NamedTuple", "field")
NAMED_TUPLE_ARGS: Final = vars(_NamedTuple)["__getnewargs__"].__code__
"""By which a class is known for one of a named tuple."""

# What the pickles of these depend on.
READERS: Final[dict[type, Read]] = {
    tuple: tuple,
    frozenset: tuple,
    list: tuple,
    set: tuple,
    dict: _read_dict,
    types.MappingProxyType: _read_dict,
    property: operator.attrgetter("fget", "fset", "fdel", "__doc__"),
    staticmethod: lambda method: (method.__func__,),
    classmethod: lambda method: (method.__func__,),
    types.MethodType: operator.attrgetter("__func__", "__self__"),
    functools.partial: operator.attrgetter("func", "args", "keywords", "__dict__"),
    functools.cached_property: operator.attrgetter("func", "attrname"),
    functools._lru_cache_wrapper: read_instance,
    functools.singledispatchmethod: lambda method: _read_dispatcher(reduce(method)),
    types.GenericAlias: operator.attrgetter("__origin__", "__args__"),
    types.SimpleNamespace: lambda obj: _read_dict(vars(obj)),
    collections.OrderedDict: lambda table: (*_read_dict(table), *_read_dict(vars(table))),
    collections.Counter: _read_dict,
    collections.defaultdict: lambda table: (table.default_factory, *_read_dict(table)),
    collections.deque: lambda queue: (queue.maxlen, *queue),
    logging.Logger: operator.attrgetter("name"),
    logging.RootLogger: lambda _: (),
    types.MethodWrapperType: operator.attrgetter("__self__", "__name__"),
    types.UnionType: operator.attrgetter("__args__"),
    type(vars(_NamedTuple)["field"]): lambda field: field.__reduce__()[1],
}
CONTAINERS: Final = frozenset(READERS)
"""Types whose pickles depend on what they hold, and on nothing else."""
_LARGEST_DATA: Final = 256 * 1024
"""Bytes of a pickle that is kept to be compared with others."""


# Checks. Much of the time that a call takes to pickle is spent in them.


def has_children(read: Read, source: Any, ids: list[int]) -> bool:
    """Whether these are still the ids of its children."""
    return [*map(id, read(source))] == ids


def _are_constants(values: Collection[object]) -> bool:
    """Whether all are numbers, texts and the like, or tuples of these."""
    kinds = set(map(type, values))
    if tuple in kinds:
        kinds.remove(tuple)
        tuples: Any = (value for value in values if type(value) is tuple)
        kinds.update(map(type, itertools.chain.from_iterable(tuples)))
    return kinds <= CONSTANTS


def _has_items(live: Sequence[Collection[object]], items: Sequence[tuple[object, ...]]) -> bool:
    return all(
        len(now) == len(then) and same_objects(tuple(now), then)
        for now, then in zip(live, items, strict=True)
    )


def _items_of(value: Any) -> tuple[Collection[object], ...]:
    return (value.keys(), value.values()) if type(value) is dict else (value,)


def has_constants(value: Any) -> bool:
    """Whether a container has nothing else in it."""
    return all(map(_are_constants, _items_of(value)))


def same_items(value: Any) -> Check:
    """A check for a list, set or dict, however large, that tells the same items from others."""
    if type(value) is dict and (check := unchanged(value)) is not None:
        return check
    live = _items_of(value)
    # Kept alive: what is at their addresses is what was there.
    return functools.partial(_has_items, live, [*map(tuple, live)])


class _DataPickler(pickle.Pickler):
    """Pickles what is built of constants with the types that are builtin, and nothing else."""

    def reducer_override(self, obj: Any) -> Any:
        raise TypeError(f"no data: {type(obj)}")


class _Data:
    """A pickle that is not large: a pickler writes it in pieces of 64 KiB or more."""

    def __init__(self, value: object) -> None:
        self.size = 0
        self.pieces: list[bytes] = []
        _DataPickler(self, 5).dump(value)

    def write(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.size > _LARGEST_DATA:
            raise OverflowError("too large")
        self.pieces.append(bytes(piece))


def _is_data(value: object, pieces: list[bytes]) -> bool:
    return _Data(value).pieces == pieces


def same_data(value: object) -> Check | None:
    """A check for containers in containers, if nothing but constants is in them.

    A pickle takes a tenth of the time that it takes to look into each of them, and not more than to
    look at all of them together (see `groups`).

    Raises:
        OverflowError: it is large.
    """
    try:
        return functools.partial(_is_data, value, _Data(value).pieces)
    except Exception as error:  # something else is in it
        if is_interrupt(error) or isinstance(error, OverflowError):
            raise
        return None


def has_children_still(read: Read, ref: Callable[[], Any], ids: list[int]) -> bool:
    """The same, by a reference to what may be gone."""
    source = ref()
    return source is not None and has_children(read, source, ids)


def is_imported(module: str, name: str, ident: int) -> bool:
    """Whether a module still has this object under its name."""
    return id(getattr(sys.modules[module], name)) == ident


def is_nested(module: str, path: list[str], ident: int) -> bool:
    """Whether something in a module still has it."""
    return id(functools.reduce(getattr, path, sys.modules[module])) == ident


def _is_plain_function(
    ref: Callable[[], Any], parts: Sequence[object], notes: Sequence[object]
) -> bool:
    # `is`: what is equal may be pickled differently. Written out, it takes half of the time.
    code, defaults, _, name, qualname, module, doc, _ = parts
    (
        new_code,
        new_defaults,
        kwdefaults,
        new_name,
        new_qualname,
        new_module,
        new_doc,
        closure,
        attributes,
        new_notes,
    ) = _function_parts(ref())
    return (
        new_code is code
        and new_defaults is defaults
        and kwdefaults is None
        and new_name is name
        and new_qualname is qualname
        and new_module is module
        and new_doc is doc
        and closure is None
        and not attributes
        and (
            len(new_notes) * 2 == len(notes)
            and all(map(operator.is_, (*new_notes, *new_notes.values()), notes))
            if new_notes
            else not notes
        )
    )


def plain_function(ref: Callable[[], Any], func: Any) -> Check | None:
    """A check that takes less time, for a function that has nothing unusual."""
    parts: tuple[Any, ...] = _function_parts(func)
    *_, kwdefaults, _, _, _, _, closure, attributes, annotations = parts
    if kwdefaults is not None or closure is not None or attributes:
        return None
    for value in annotations.values():
        plain = value is None or type(value) is str
        if not plain and (type(value) is not type or not importable(value)):
            return None
    # Not the tables themselves: kept alive, they might keep the function alive.
    notes = (*annotations, *annotations.values())
    return functools.partial(_is_plain_function, ref, parts[:_ATTRIBUTES], notes)


def is_plain_array(value: object) -> bool:
    """Whether it is an array of numbers that nobody has said how to reduce."""
    kind = type(value)
    return known_kinds().get(kind) == "" and not is_registered(kind) and is_simple(value)


def form_of(array: Any) -> tuple[Any, ...]:
    """What its pickle says of an array, but its contents."""
    return array.shape, array.strides, array.dtype, array.flags.writeable


def has_contents(ref: Callable[[], Any], form: tuple[Any, ...], contents: bytes) -> bool:
    """Whether an array is what it was."""
    array = ref()
    return form_of(array) == form and bool(array.tobytes("A") == contents)


def is_bound_to(key: Key, form: tuple[Any, ...], contents: memoryview) -> bool:
    """Whether a global is bound to such an array."""
    module, name = key
    array = namespace(module)[name]
    return (
        is_plain_array(array)
        and form_of(array) == form
        and same(pickle.PickleBuffer(array).raw(), contents)
    )
