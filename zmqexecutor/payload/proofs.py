"""What proves that a pickle that was kept says what a new one would say.

A pickle may be kept while nothing it captured can have changed. What it captured
is a graph; of each node that can change, the ids of its children are written
down. Ids suffice: the children are kept alive, or (functions and classes, which
must be free to die) are nodes themselves whose check fails once they are gone.

What has no proof (an instance with a `__reduce__` of its own, say) is pickled anew
for each call.
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
import typing
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from decimal import Context
from enum import Enum
from typing import Any, Final, TypeAlias

from cloudpickle import cloudpickle as cp

from ..wire.comparison import same
from .arrays import is_simple, known_kinds
from .namespaces import (
    MISSING,
    Key,
    code_globals,
    home_of,
    importable,
    is_class,
    namespace,
    travels_by_value,
)
from .reducers import is_registered, reducer_of

__all__ = ["CONTAINERS", "GlobalArray", "Proof", "holds", "prove"]

Read: TypeAlias = Callable[[Any], Iterable[object]]
"""Returns the children of a node, given the node or a weak reference to it."""
Check: TypeAlias = Callable[[], bool]
"""Says whether a node is what it was, or raises if it is gone."""


class Unprovable(Exception):  # noqa: N818 - an answer, not an error
    """Something captured may change without a trace."""


_MAX_CHILDREN: Final = 2000
"""A graph that is larger than this is pickled anew, rather than looked through."""
_MANY: Final = 64
"""From so many items on they are looked at together, if all of them are constants."""
_LARGEST_ARRAYS: Final = 64 * 1024
"""Bytes of arrays in a graph, of which the proof keeps a copy; if there are more, the same."""

_ATOMS: Final = frozenset(
    (
        *(type(None), bool, int, float, complex, str, bytes, range),
        *(type(...), type(NotImplemented), types.CodeType, types.BuiltinFunctionType),
        *(types.MethodDescriptorType, types.WrapperDescriptorType),
        *(types.ClassMethodDescriptorType, dataclasses._FIELD_BASE),  # type: ignore[attr-defined]
    )
)
_CONSTANTS: Final = frozenset((type(None), bool, int, float, complex, str, bytes))
# Modules, some of which pydantic's classes need, whose instances do not change.
_IMMUTABLE_MODULES: Final = frozenset(
    (
        *("annotated_types", "datetime", "decimal", "fractions", "ipaddress"),
        *("pathlib", "pydantic_core", "re", "typing", "uuid", "zoneinfo"),
    )
)
_OWN_DESCRIPTORS: Final = (types.GetSetDescriptorType, types.MemberDescriptorType)

_function_parts = operator.attrgetter(
    *("__code__", "__defaults__", "__kwdefaults__"),
    *("__name__", "__qualname__", "__module__", "__doc__"),
    *("__closure__", "__dict__", "__annotations__"),
)
_ATTRIBUTES: Final = 8
_TABLES: Final = 7  # where the tables begin, whose contents count
_class_parts = operator.attrgetter("__class__", "__bases__", "__name__", "__qualname__")


def _read_names(source: tuple[Callable[..., object], tuple[str, ...]]) -> Iterable[object]:
    get, names = source
    return map(get, names, itertools.repeat(MISSING))


def _read_dict(source: Mapping[Any, Any]) -> Iterable[object]:
    return (*source, *source.values())


def _read_function(ref: Callable[[], Any]) -> Sequence[object]:
    parts: tuple[Any, ...] = _function_parts(ref())
    if parts[-1] or parts[-2] or parts[-3]:
        closure, attributes, annotations = parts[-3:]
        if closure:
            parts += tuple([cell.cell_contents for cell in closure])
        for table in (attributes, annotations):
            parts += (*table, *table.values())
    return parts


def _read_class(ref: Callable[[], Any]) -> Iterable[object]:
    cls = ref()
    parts = (*_class_parts(cls), *cls.__dict__, *cls.__dict__.values())
    if "_abc_impl" in cls.__dict__:
        parts += (*abc._get_dump(cls)[0],)  # type: ignore[attr-defined]  # who registered
    return parts


def _read_instance(obj: Any) -> Iterable[object]:
    parts: tuple[object, ...] = (type(obj),)
    attributes = getattr(obj, "__dict__", None)
    if attributes:
        parts += (*attributes, *attributes.values())
    slots = copyreg._slotnames(type(obj))  # type: ignore[attr-defined]
    if slots:
        parts += tuple([getattr(obj, name, MISSING) for name in slots])
    return parts


# What the pickles of these depend on.
_READERS: Final[dict[type, Read]] = {
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
    functools._lru_cache_wrapper: _read_instance,
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
}
CONTAINERS: Final = frozenset((tuple, frozenset, *_READERS))
"""Types whose pickles depend on what they hold, and on nothing else."""


# Checks. Much of the time that a call takes to pickle is spent in them.


def _has_children(read: Read, source: Any, ids: list[int]) -> bool:
    return [*map(id, read(source))] == ids


def _are_constants(values: Collection[object]) -> bool:
    """Whether all are numbers, texts and the like, or tuples of these."""
    kinds = set(map(type, values))
    if tuple in kinds:
        kinds.remove(tuple)
        tuples: Any = (value for value in values if type(value) is tuple)
        kinds.update(map(type, itertools.chain.from_iterable(tuples)))
    return kinds <= _CONSTANTS


def _has_items(live: Sequence[Collection[object]], items: Sequence[list[object]]) -> bool:
    # A tenth of the time of `_has_children`, and of a pickle.
    return all(
        len(now) == len(then) and all(map(operator.is_, now, then))
        for now, then in zip(live, items, strict=True)
    )


def _many_constants(value: Any) -> Check | None:
    """A check for a list, set or dict of many constants, however many they are."""
    live = (value.keys(), value.values()) if type(value) is dict else (value,)
    items = [*map(list, live)]  # kept alive: what is at their addresses is what was there
    if not all(map(_are_constants, items)):
        return None
    return functools.partial(_has_items, live, items)


def _has_children_still(read: Read, ref: Callable[[], Any], ids: list[int]) -> bool:
    source = ref()
    return source is not None and _has_children(read, source, ids)


def _is_imported(module: str, name: str, ident: int) -> bool:
    return id(getattr(sys.modules[module], name)) == ident


def _is_nested(module: str, path: list[str], ident: int) -> bool:
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


def _plain_function(ref: Callable[[], Any], func: Any) -> Check | None:
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


def _is_array(value: object) -> bool:
    kind = type(value)
    return known_kinds().get(kind) == "" and not is_registered(kind) and is_simple(value)


def _form(array: Any) -> tuple[Any, ...]:
    return array.shape, array.strides, array.dtype, array.flags.writeable


def _has_contents(ref: Callable[[], Any], form: tuple[Any, ...], contents: bytes) -> bool:
    array = ref()
    return _form(array) == form and bool(array.tobytes("A") == contents)


def _is_bound_to(key: Key, form: tuple[Any, ...], contents: memoryview) -> bool:
    module, name = key
    array = namespace(module)[name]
    return (
        _is_array(array)
        and _form(array) == form
        and same(pickle.PickleBuffer(array).raw(), contents)
    )


class GlobalArray:
    """Proves that a global is the array that it was, by a copy of its memory.

    Without a reference to the array, not even a weak one: numpy would not resize it in place.
    """

    def __init__(self, array: Any) -> None:
        """Note what it is, before it is packed."""
        self._form = _form(array)
        small = array.nbytes <= _LARGEST_ARRAYS
        self._contents = memoryview(array.tobytes("A")) if small else None

    @classmethod
    def of(cls, value: object) -> GlobalArray | None:
        """None if it is no array that a comparison of memory could prove."""
        return cls(value) if _is_array(value) else None

    def proof(self, keys: Sequence[Key], packed: Sequence[memoryview]) -> Proof | None:
        """The proof.

        Args:
            keys: the global that is bound to it, and those that its pickle refers to.
            packed: the memory that was packed, if it is beside the pickle.
        """
        key = keys[0]
        contents = self._contents
        if contents is None:
            if len(packed) != 1:
                return None
            contents = packed[0]
        proof = Proof()
        proof.bind(keys)
        proof.checks[_is_bound_to, key] = functools.partial(_is_bound_to, key, self._form, contents)
        return proof


class Proof:
    """Tells whether anything a pickle was made of has changed since.

    Attributes:
        bindings: what globals were bound to.
        checks: of the nodes of the graph that may change.
    """

    __slots__ = ("_compiled", "_keep", "_modules", "_registered", "bindings", "checks")

    def __init__(self) -> None:
        self.bindings: dict[Key, int] = {}
        self.checks: dict[Any, Check] = {}
        self._keep: list[Any] = []
        # A new import may be a submodule that pickled code would have to import.
        self._modules = len(sys.modules)
        self._registered = frozenset(cp._PICKLE_BY_VALUE_MODULES)
        self._compiled: list[Check] | None = None

    def bind(self, keys: Iterable[Key]) -> None:
        """Note what these globals are bound to now."""
        for module, name in keys:
            if module:
                value = namespace(module).get(name, MISSING)
                self.bindings[module, name] = id(value)
                if _may_be_kept(value):
                    self._keep.append(value)

    @classmethod
    def union(cls, proofs: list[Proof]) -> Proof:
        """Return the proof that all of these hold."""
        union = cls()
        for proof in proofs:
            union.bindings.update(proof.bindings)
            union.checks.update(proof.checks)
            union._keep.append(proof._keep)
            union._modules = min(union._modules, proof._modules)
        return union

    def _compile(self) -> list[Check]:
        compiled: list[Check] = []
        for home in dict.fromkeys(module for module, _ in self.bindings):
            names = tuple(name for module, name in self.bindings if module == home)
            ids = [self.bindings[home, name] for name in names]
            globals_ = namespace(home)
            read: Read = operator.itemgetter(*names, names[0])  # one more: a tuple of at least two
            source: Any = globals_
            if all(name in globals_ for name in names):
                ids.append(ids[0])
            else:
                read, source = _read_names, (globals_.get, names)
            compiled.append(functools.partial(_has_children, read, source, ids))
        return [*compiled, *self.checks.values()]

    def holds(self) -> bool:
        """Say whether a new pickle would say the same. Never raises."""
        if len(sys.modules) != self._modules:
            return False
        if self._registered != cp._PICKLE_BY_VALUE_MODULES:
            return False
        if self._compiled is None:
            self._compiled = self._compile()
        try:
            for check in self._compiled:
                if not check():
                    return False
        except Exception:  # a name, a cell or a function is gone
            return False
        return True


def holds(proof: Proof | None) -> bool:
    """Say whether there is a proof, and it holds."""
    return proof is not None and proof.holds()


def _may_be_kept(value: object) -> bool:
    if known_kinds().get(type(value)) == "":  # large, perhaps; a check has a reference
        return not _is_array(value)
    return type(value) is not types.FunctionType and not is_class(value)


def prove(value: object, *, weakly: bool = False) -> Proof | None:
    """Write down what a pickle of this captures, or return None if it cannot be known.

    Args:
        value: what is pickled.
        weakly: whether the proof must not keep it alive, if it is no constant.
    """
    try:
        return _Prover(value, value if weakly else MISSING).proof
    except Exception:  # Unprovable, or something odd that no proof should rest on
        return None


class _Prover:
    """Walks through what a pickle would capture."""

    def __init__(self, value: object, weak: object) -> None:
        self.proof = Proof()
        self._weak = weak
        self._children = 0
        self._bytes = 0  # of arrays
        self._todo = [value]
        self._seen: set[int] = set()
        while self._todo:
            self._visit(self._todo.pop())

    def _visit(self, value: Any) -> None:
        kind = type(value)
        if value is self._weak:
            if id(value) in self._seen and self._keeps_more_than_atoms():
                raise Unprovable  # what is kept leads to it, and would keep it alive
        elif _may_be_kept(value):
            self.proof._keep.append(value)
        if kind in _ATOMS:
            owner = getattr(value, "__self__", None)
            if owner is not None and not isinstance(owner, (types.ModuleType, type)):
                raise Unprovable  # a builtin method of an object
            return
        if value is MISSING or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if kind is types.FunctionType:
            self._visit_function(value)
        elif issubclass(kind, type):
            self._visit_class(value)
        elif isinstance(value, types.ModuleType):
            if travels_by_value(value.__name__) or sys.modules.get(value.__name__) is not value:
                raise Unprovable
        elif kind in (tuple, frozenset):
            if len(value) < _MANY or not _are_constants(value):
                self._count(value)
                self._todo += value
        elif kind in (list, set, dict) and len(value) >= _MANY and (many := _many_constants(value)):
            self.proof.checks[_has_items, id(value)] = many
        elif kind in _READERS:
            self._check(_READERS[kind], value)
        elif kind in known_kinds():
            self._visit_numpy(value)
        elif kind is slice:
            self._todo += (value.start, value.stop, value.step)
        elif kind.__module__ == "operator":  # `itemgetter` and the like
            make, arguments = value.__reduce__()
            self._todo += (make, *arguments)
        elif kind.__module__.partition(".")[0] in _IMMUTABLE_MODULES and kind is not Context:
            self._todo += [typing.get_origin(value), *typing.get_args(value)]
            self._todo.append(getattr(value, "tzinfo", None))
        elif kind.__module__ == "attr._make" and issubclass(kind, tuple):
            self._todo += value  # the fields of a class of attrs
        elif isinstance(value, Enum) or _has_plain_state(kind):
            self._check(_read_instance, value)
        else:
            raise Unprovable

    def _visit_numpy(self, value: Any) -> None:
        if known_kinds()[type(value)]:
            return  # a scalar, which does not change
        if not _is_array(value):
            raise Unprovable
        self._bytes += value.nbytes
        if self._bytes > _LARGEST_ARRAYS:
            raise Unprovable
        ref = weakref.ref(value)
        self.proof.checks[_has_contents, id(ref)] = functools.partial(
            _has_contents, ref, _form(value), value.tobytes("A")
        )

    def _keeps_more_than_atoms(self) -> bool:
        return any(
            type(kept) not in _ATOMS and not isinstance(kept, types.ModuleType)
            for kept in self.proof._keep
        )

    def _check(self, read: Read, source: Any, children: Iterable[object] | None = None) -> None:
        found = list(read(source))
        self._count(found)
        ids = [*map(id, found)]
        check = functools.partial(_has_children, read, source, ids)
        if source is self._weak:
            check = functools.partial(_has_children_still, read, weakref.ref(source), ids)
        self.proof.checks[read, id(source)] = check
        self._todo += found if children is None else children

    def _count(self, children: Sized) -> None:
        self._children += len(children)
        if self._children > _MAX_CHILDREN:
            raise Unprovable

    def _check_import(self, value: Any) -> None:
        module, name = value.__module__, value.__qualname__
        if module != "builtins":
            self.proof.checks[module, name] = (
                functools.partial(_is_nested, module, name.split("."), id(value))
                if "." in name
                else functools.partial(_is_imported, module, name, id(value))
            )

    def _visit_function(self, func: types.FunctionType) -> None:
        if importable(func):
            self._check_import(func)
            return
        ref = weakref.ref(func)
        parts = _read_function(ref)
        # Not the tables themselves: kept alive, they might keep the function alive.
        children = [*parts[:_TABLES], *parts[_TABLES + 3 :]]
        if plain := _plain_function(ref, func):
            self._count(parts)
            self.proof.checks[_read_function, id(ref)] = plain
            self._todo += children
        else:
            self._check(_read_function, ref, children)
        if home_of(func.__globals__) is None:  # these globals are copied into the pickle
            names = tuple(code_globals(func.__code__))
            self._check(_read_names, (func.__globals__.get, names))

    def _visit_class(self, cls: type) -> None:
        if cls.__module__ == "builtins":
            return
        if importable(cls):
            self._check_import(cls)
            return
        ref = weakref.ref(cls)
        children = []
        for child in _read_class(ref):
            if isinstance(child, weakref.ref):  # of a class registered with an ABC
                self.proof._keep.append(child)
            elif type(child) not in _OWN_DESCRIPTORS and type(child).__name__ != "_abc_data":
                children.append(child)
        self._check(_read_class, ref, children)


_STATE_METHODS: Final = ("__reduce_ex__", "__reduce__", "__getstate__")
_HEAP_TYPE: Final = 1 << 9


def _has_plain_state(kind: type) -> bool:
    """Say whether instances pickle as their attributes and nothing else.

    Those of attrs itself do, though they have methods for it.
    """
    return (
        (
            kind.__module__.startswith("attr.")
            or all(
                getattr(kind, name, None) is getattr(object, name, None) for name in _STATE_METHODS
            )
        )
        and not hasattr(kind, "__getnewargs__")
        and not hasattr(kind, "__getnewargs_ex__")
        and not issubclass(kind, (list, dict))
        and kind not in copyreg.dispatch_table
        and reducer_of(kind) is None
        and all(base is object or base.__flags__ & _HEAP_TYPE for base in kind.__mro__)
    )
