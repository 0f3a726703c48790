"""What proves that a pickle that was kept says what a new one would say.

A pickle may be kept while nothing it captured can have changed. What it captured
is a graph; of each node that can change, the ids of its children are written
down. Ids suffice: the children are kept alive, or (functions and classes, which
must be free to die) are nodes themselves whose check fails once they are gone.

What has no proof (an instance with a `__reduce__` of its own, say) is pickled anew
for each call.
"""

from __future__ import annotations

import copyreg
import functools
import operator
import sys
import time
import types
import typing
import weakref
from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from decimal import Context
from enum import Enum
from typing import Any, Final

from cloudpickle import cloudpickle as cp

from ..system.interrupts import is_interrupt
from .arrays import is_fixed, known_kinds
from .checks import (
    ATOMS,
    CONSTANTS,
    FUNCTION_TABLES,
    IMMUTABLE_MODULES,
    NAMED_TUPLE_ARGS,
    OWN_DESCRIPTORS,
    READERS,
    Check,
    Read,
    form_of,
    has_children,
    has_children_still,
    has_constants,
    has_contents,
    instance_reader,
    is_bound_to,
    is_imported,
    is_nested,
    is_plain_array,
    plain_function,
    read_class,
    read_dispatcher,
    read_function,
    read_instance,
    read_names,
    same_data,
    same_items,
)
from .costs import CHEAP, Costs
from .groups import group_reader, holds_the_same
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
from .reducers import SINGLEDISPATCH_CODE, reducer_of

__all__ = ["GlobalArray", "Proof", "holds", "prove"]


class Unprovable(Exception):  # noqa: N818 - an answer, not an error
    """Something captured may change without a trace."""


_BUILTIN_CONTAINERS: Final = frozenset((tuple, frozenset, list, set, dict))
_MOST_VISITS: Final = 2000
"""If more is to be looked at one by one, all is pickled anew, which takes less time."""
_MANY: Final = 64
"""From so many items on it pays to look whether all of them are constants."""
_GROUP: Final = 4
"""From so many objects of one type on it pays to look at them together."""
_LARGEST_ARRAYS: Final = 64 * 1024
"""Bytes of arrays in a graph, of which the proof keeps a copy; if there are more, the same."""


class GlobalArray:
    """Proves that a global is the array that it was, by a copy of its memory.

    Without a reference to the array, not even a weak one: numpy would not resize it in place.
    """

    def __init__(self, array: Any) -> None:
        """Note what it is, before it is packed."""
        self._form = form_of(array)
        small = array.nbytes <= _LARGEST_ARRAYS
        self._contents = memoryview(array.tobytes("A")) if small else None

    @classmethod
    def of(cls, value: object) -> GlobalArray | None:
        """None if it is no array that a comparison of memory could prove."""
        return cls(value) if is_plain_array(value) else None

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
        proof.checks[is_bound_to, key] = functools.partial(is_bound_to, key, self._form, contents)
        return proof


class Proof:
    """Tells whether anything a pickle was made of has changed since.

    Attributes:
        bindings: what globals were bound to.
        checks: of the nodes of the graph that may change.
        is_slow: whether it took as long to make as a pickle takes, and that is long.
    """

    __slots__ = (
        *("_compiled", "_keep", "_modules", "_reducers", "_registered"),
        *("bindings", "checks", "is_slow"),
    )

    def __init__(self) -> None:
        self.bindings: dict[Key, int] = {}
        self.checks: dict[Any, Check] = {}
        self.is_slow = False
        self._keep: list[Any] = []
        # A new import may be a submodule that pickled code would have to import.
        self._modules = len(sys.modules)
        self._reducers = len(copyreg.dispatch_table)
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
            union._reducers = min(union._reducers, proof._reducers)
        return union

    def measure(self, costs: Costs, what: str) -> None:
        """Have it measured what the checks take from now on, if that is much.

        Args:
            costs: where it is noted.
            what: the global that they are of, in words.
        """
        start = time.thread_time()
        if self.holds() and time.thread_time() - start > CHEAP:
            self.checks = {(Costs, what): costs.timed(what, self.checks.values())}
            self._compiled = None

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
                read, source = read_names, (globals_.get, names)
            compiled.append(functools.partial(has_children, read, source, ids))
        return [*compiled, *self.checks.values()]

    def holds(self) -> bool:
        """Say whether a new pickle would say the same. Raises nothing of its own."""
        if len(sys.modules) != self._modules or len(copyreg.dispatch_table) != self._reducers:
            return False
        if self._registered != cp._PICKLE_BY_VALUE_MODULES:
            return False
        if self._compiled is None:
            self._compiled = self._compile()
        try:
            for check in self._compiled:
                if not check():
                    return False
        except Exception as error:  # a name, a cell or a function is gone
            if is_interrupt(error):
                raise
            return False
        return True


def holds(proof: Proof | None) -> bool:
    """Say whether there is a proof, and it holds."""
    return proof is not None and proof.holds()


def _may_be_kept(value: object) -> bool:
    if known_kinds().get(type(value)) == "":  # large, perhaps; a check has a reference
        return not is_plain_array(value)
    return type(value) is not types.FunctionType and not is_class(value)


def _may_all_be_kept(values: Iterable[object]) -> bool:
    return not any(
        kind is types.FunctionType or issubclass(kind, type) or known_kinds().get(kind) == ""
        for kind in set(map(type, values))
    )


def prove(value: object, *, weakly: bool = False) -> Proof | None:
    """Write down what a pickle of this captures, or return None if it cannot be known.

    Args:
        value: what is pickled.
        weakly: whether the proof must not keep it alive, if it is no constant.
    """
    try:
        return _Prover(value, weakly=weakly).proof
    except Exception as error:  # Unprovable, or something odd that no proof should rest on
        if is_interrupt(error):
            raise
        return None


class _Prover:
    """Walks through what a pickle would capture."""

    def __init__(self, value: object, *, weakly: bool) -> None:
        self.proof = Proof()
        self._weak, self._root = (value, MISSING) if weakly else (MISSING, value)
        self._visits = 0
        self._bytes = 0  # of arrays
        self._todo = [value]
        self._seen: set[int] = set()
        while self._todo:
            values, self._todo = self._todo, []
            if len(values) >= _GROUP:
                values = self._visit_groups(values)
            for value in values:
                self._visit(value)

    def _visit_groups(self, values: list[Any]) -> list[Any]:
        """Return those that are to be looked at one by one."""
        groups: dict[
            int, list[Any]
        ] = {}  # by the id of their type, since a type may have an odd hash
        for value in dict(zip(map(id, values), values, strict=True)).values():  # each once
            groups.setdefault(id(type(value)), []).append(value)
        left: list[Any] = []
        for group in groups.values():
            if len(group) < _GROUP or not self._visit_group(type(group[0]), group):
                left += group
        return left

    def _visit_group(self, kind: type, values: list[Any]) -> bool:
        """Whether these objects could be looked at together."""
        if kind in CONSTANTS:
            self.proof._keep.append(values)
            return True
        slots = copyreg._slotnames(kind) if _has_plain_state(kind) else None  # type: ignore[attr-defined]
        read = group_reader(kind, slots)
        if read is None:
            return False
        if kind is type(self._weak) and any(value is self._weak for value in values):
            raise Unprovable  # see `_visit`
        group = [value for value in values if id(value) not in self._seen]
        try:
            contents = read(group)
        except AttributeError:  # a slot with nothing in it
            return False
        if not _may_all_be_kept(contents.children):
            return False
        self._seen.update(map(id, group))
        self.proof._keep.append(group)
        if kind is not tuple and kind is not frozenset:
            check = functools.partial(holds_the_same, read, group, contents)
            self.proof.checks[holds_the_same, id(group)] = check
            self.proof.is_slow |= len(group) >= _MANY
        self._todo.append(kind)
        self._todo += [child for child in contents.children if type(child) not in CONSTANTS]
        return True

    def _visit(self, value: Any) -> None:
        kind = type(value)
        self._visits += 1
        if self._visits > _MOST_VISITS:
            raise Unprovable
        if value is self._weak:
            if id(value) in self._seen and self._keeps_more_than_atoms():
                raise Unprovable  # what is kept leads to it, and would keep it alive
        elif _may_be_kept(value):
            self.proof._keep.append(value)
        if kind in ATOMS:
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
        elif kind in _BUILTIN_CONTAINERS:
            self._visit_container(value, kind)
        elif kind in READERS:
            self._check(READERS[kind], value)
        elif kind in known_kinds():
            self._visit_numpy(value)
        elif is_fixed(value):
            pass
        elif kind is slice:
            self._todo += (value.start, value.stop, value.step)
        elif kind.__module__ == "operator":  # `itemgetter` and the like
            make, arguments = value.__reduce__()
            self._todo += (make, *arguments)
        elif kind.__module__.partition(".")[0] in IMMUTABLE_MODULES and kind is not Context:
            self._todo += [typing.get_origin(value), *typing.get_args(value)]
            self._todo.append(getattr(value, "tzinfo", None))
        elif kind.__module__.partition(".")[0] == "pandas" and issubclass(kind, (date, timedelta)):
            self._todo.append(getattr(value, "tzinfo", None))
        elif kind.__module__ == "attr._make" and issubclass(kind, tuple):
            self._todo += value  # the fields of a class of attrs
        elif _is_named_tuple(kind):
            self._check(read_instance, value)
            self._todo += value
        elif isinstance(value, Enum) or _has_plain_state(kind):
            self._check(instance_reader(value), value)
        else:
            raise Unprovable

    def _visit_container(self, value: Any, kind: type) -> None:
        frozen = kind is tuple or kind is frozenset
        # Before it is looked through: another thread may change it meanwhile.
        check = same_items(value) if len(value) >= _MANY and not frozen else None
        if has_constants(value):
            if frozen:
                return
            if check is not None:
                self.proof.checks[same_items, id(value)] = check
                return
        elif value is self._root and (same := same_data(value)) is not None:
            self.proof.checks[same_data, id(value)] = same
            return
        children = READERS[kind](value)
        if frozen:
            self._todo += children
        elif check is not None and _may_all_be_kept(children):
            self.proof.checks[same_items, id(value)] = check
            self._todo += [child for child in children if type(child) not in CONSTANTS]
        else:
            self._check(READERS[kind], value)

    def _visit_numpy(self, value: Any) -> None:
        if known_kinds()[type(value)]:
            return  # a scalar, which does not change
        if not is_plain_array(value):
            raise Unprovable
        self._bytes += value.nbytes
        if self._bytes > _LARGEST_ARRAYS:
            raise Unprovable
        ref = weakref.ref(value)
        self.proof.checks[has_contents, id(ref)] = functools.partial(
            has_contents, ref, form_of(value), value.tobytes("A")
        )

    def _keeps_more_than_atoms(self) -> bool:
        return any(
            type(kept) not in ATOMS and not isinstance(kept, types.ModuleType)
            for kept in self.proof._keep
        )

    def _check(self, read: Read, source: Any, children: Iterable[object] | None = None) -> None:
        found = list(read(source))
        ids = [*map(id, found)]
        check = functools.partial(has_children, read, source, ids)
        if source is self._weak:
            check = functools.partial(has_children_still, read, weakref.ref(source), ids)
        self.proof.checks[has_children, id(source)] = check
        self._todo += found if children is None else children

    def _check_import(self, value: Any) -> None:
        module, name = value.__module__, value.__qualname__
        if module != "builtins":
            self.proof.checks[module, name] = (
                functools.partial(is_nested, module, name.split("."), id(value))
                if "." in name
                else functools.partial(is_imported, module, name, id(value))
            )

    def _visit_function(self, func: types.FunctionType) -> None:
        if importable(func):
            self._check_import(func)
            return
        ref = weakref.ref(func)
        if func.__code__ is SINGLEDISPATCH_CODE:
            self._check(read_dispatcher, ref)
            return
        parts = read_function(ref)
        # Not the tables themselves: kept alive, they might keep the function alive.
        children = [*parts[:FUNCTION_TABLES], *parts[FUNCTION_TABLES + 3 :]]
        if plain := plain_function(ref, func):
            self.proof.checks[read_function, id(ref)] = plain
            self._todo += children
        else:
            self._check(read_function, ref, children)
        if home_of(func.__globals__) is None:  # these globals are copied into the pickle
            names = tuple(code_globals(func.__code__))
            self._check(read_names, (func.__globals__.get, names))

    def _visit_class(self, cls: type) -> None:
        if cls.__module__ == "builtins":
            return
        if importable(cls):
            self._check_import(cls)
            return
        ref = weakref.ref(cls)
        children = []
        for child in read_class(ref):
            if isinstance(child, weakref.ref):  # of a class registered with an ABC
                self.proof._keep.append(child)
            elif type(child) not in OWN_DESCRIPTORS and type(child).__name__ != "_abc_data":
                children.append(child)
        self._check(read_class, ref, children)


_STATE_METHODS: Final = ("__reduce_ex__", "__reduce__", "__getstate__")
_HEAP_TYPE: Final = 1 << 9


def _reduces_plainly(kind: type) -> bool:
    """Say whether it is object's methods that reduce its instances.

    attrs has methods for it, which come to the same.
    """
    return (
        (
            kind.__module__.startswith("attr.")
            or all(
                getattr(kind, name, None) is getattr(object, name, None) for name in _STATE_METHODS
            )
        )
        and not hasattr(kind, "__getnewargs_ex__")
        and kind not in copyreg.dispatch_table
        and reducer_of(kind) is None
    )


def _has_plain_state(kind: type) -> bool:
    """Say whether instances pickle as their attributes and nothing else."""
    return (
        _reduces_plainly(kind)
        and not hasattr(kind, "__getnewargs__")
        and not issubclass(kind, (list, dict))
        and all(base is object or base.__flags__ & _HEAP_TYPE for base in kind.__mro__)
    )


def _is_named_tuple(kind: type) -> bool:
    """Say whether instances pickle as their fields and attributes."""
    arguments = getattr(kind, "__getnewargs__", None)
    return (
        issubclass(kind, tuple)
        and getattr(arguments, "__code__", None) is NAMED_TUPLE_ARGS
        and kind.__iter__ is tuple.__iter__
        and _reduces_plainly(kind)
    )
