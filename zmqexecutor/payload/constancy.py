"""Whether one copy of a callable will do for all tasks of a worker.

Each task has its own copy of what was submitted: of its arguments, and of what the callable
holds if it is no global (a closure, a `partial`, an object). So it is with the standard library.
But to unpickle a closure takes many times as long as to call it; so one in which no task
can leave anything is unpickled once.
"""

from __future__ import annotations

import dis
import functools
import operator
import types
from collections.abc import Iterator
from enum import Enum
from typing import Any, Final

from .arrays import known_kinds
from .byvalue import arrived
from .namespaces import home_of, importable

__all__ = ["is_constant"]

_CONSTANTS: Final = frozenset(
    (
        *(type(None), bool, int, float, complex, str, bytes, range, type(...)),
        *(types.CodeType, types.ModuleType, types.MethodDescriptorType),
        *(types.WrapperDescriptorType, types.ClassMethodDescriptorType),
    )
)
_OF_OPERATOR: Final = (operator.attrgetter, operator.itemgetter, operator.methodcaller)
_CELL_OPS: Final = frozenset(("STORE_DEREF", "DELETE_DEREF"))
_ATTRIBUTE_OPS: Final = frozenset(("STORE_ATTR", "DELETE_ATTR"))


def is_constant(value: object) -> bool:
    """Whether nothing in it can change. Global functions and classes count as that.

    Where it is not known the answer is no.
    """
    functions: dict[int, types.FunctionType] = {}
    todo = [value]
    while todo:
        value = todo.pop()
        kind = type(value)
        if kind in _CONSTANTS or known_kinds().get(kind) or isinstance(value, (type, Enum)):
            continue
        if _is_global(value):
            continue
        if isinstance(value, types.FunctionType):
            # One that holds itself may well count its calls.
            if id(value) in functions or home_of(value.__globals__) is None or _stores(value):
                return False
            functions[id(value)] = value
        children = _children(value)
        if children is None:
            return False
        todo += children
    codes = [function.__code__ for function in functions.values()]
    return len(codes) < 2 or not any(op in _ATTRIBUTE_OPS for op, _ in _operations(*codes))


def _is_global(value: Any) -> bool:
    if isinstance(value, (types.FunctionType, functools._lru_cache_wrapper)):
        return value in arrived or importable(value)
    return type(value).__name__ == "ufunc" and importable(value)  # numpy's


def _children(value: Any) -> list[Any] | None:
    """What it holds; None if that may change."""
    kind = type(value)
    if kind in (tuple, frozenset):
        return list(value)
    if kind is types.FunctionType:
        cells = value.__closure__ or ()
        named = {**(value.__kwdefaults__ or {}), **vars(value)}
        return [*map(_contents, cells), *(value.__defaults__ or ()), *named.values()]
    if kind is functools.partial:
        named = {**value.keywords, **vars(value)}
        return [value.func, *value.args, *named.values()]
    if kind is types.MethodType:
        return [value.__func__, value.__self__]
    if kind in (types.BuiltinFunctionType, types.MethodWrapperType):
        return [value.__self__]
    if kind is functools._lru_cache_wrapper:
        return [value.__wrapped__]
    if kind in _OF_OPERATOR:
        make, arguments = value.__reduce__()
        return [make, *arguments]
    return None


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None  # empty


def _stores(function: types.FunctionType) -> bool:
    """Whether it, or a function in it, binds what it closes over."""
    names = function.__code__.co_freevars
    return bool(names) and any(
        op in _CELL_OPS and name in names for op, name in _operations(function.__code__)
    )


def _operations(*codes: types.CodeType) -> Iterator[tuple[str, Any]]:
    for code in codes:
        for instruction in dis.get_instructions(code):
            yield instruction.opname, instruction.argval
        yield from _operations(
            *(part for part in code.co_consts if isinstance(part, types.CodeType))
        )
