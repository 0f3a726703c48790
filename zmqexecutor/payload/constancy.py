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
import sys
import types
from collections.abc import Iterable
from enum import Enum
from typing import Any, Final

from .arrays import is_fixed, known_kinds
from .byvalue import arrived
from .namespaces import home_of, importable

__all__ = ["is_constant"]

_CONSTANTS: Final = frozenset(
    (
        *(type(None), bool, int, float, complex, str, bytes, range, type(...)),
        *(types.CodeType, types.MethodDescriptorType),
        *(types.WrapperDescriptorType, types.ClassMethodDescriptorType),
    )
)
_OF_OPERATOR: Final = (operator.attrgetter, operator.itemgetter, operator.methodcaller)
_CELL_OPS: Final = frozenset(dis.opmap[name] for name in ("STORE_DEREF", "DELETE_DEREF"))


def is_constant(func: Any) -> bool:
    """Whether no call of it can change what it is. Where that is not known the answer is no.

    Of what it holds all must be fixed: what its code can reach it may change, or have changed.
    """
    kind = type(func)
    if _are_fixed((func,)):
        return True
    if kind is types.FunctionType:
        return (
            home_of(func.__globals__) is not None
            and not (func.__closure__ and _binds_cells(func.__code__))
            and _are_fixed(map(_contents, func.__closure__ or ()))
            and _are_fixed(func.__defaults__ or ())
            and _are_fixed((func.__kwdefaults__ or {}).values())
            and _are_fixed(vars(func).values())
        )
    if kind is functools.partial:
        held = (*func.args, *func.keywords.values(), *vars(func).values())
        return is_constant(func.func) and _are_fixed(held)
    if kind is types.MethodType:
        return is_constant(func.__func__) and _are_fixed((func.__self__,))
    if kind in (types.BuiltinFunctionType, types.MethodWrapperType):
        return _are_fixed((func.__self__,))
    if kind is functools._lru_cache_wrapper:
        made = ("__wrapped__", "cache_parameters", *functools.WRAPPER_ASSIGNMENTS)
        held = tuple(value for name, value in vars(func).items() if name not in made)
        return is_constant(func.__wrapped__) and _are_fixed(held)
    if kind in _OF_OPERATOR:
        make, arguments = func.__reduce__()
        return is_constant(make) and _are_fixed(arguments)
    return False


def _are_fixed(values: Iterable[Any]) -> bool:
    """Whether these stay what they are, or are what all tasks share: globals, classes."""
    todo = list(values)
    seen: dict[int, object] = {}
    while todo:
        value = todo.pop()
        kind = type(value)
        if kind in _CONSTANTS or known_kinds().get(kind) or isinstance(value, (type, Enum)):
            continue
        if kind in (tuple, frozenset):
            if id(value) not in seen:
                seen[id(value)] = value
                todo += value
        elif not _is_global(value):
            return False
    return True


def _is_global(value: Any) -> bool:
    if isinstance(value, types.ModuleType):
        return sys.modules.get(value.__name__) is value
    if isinstance(value, (types.FunctionType, functools._lru_cache_wrapper)):
        return value in arrived or importable(value)
    if type(value) is types.BuiltinFunctionType:
        return _are_fixed((value.__self__,))
    return is_fixed(value)


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None  # empty


def _binds_cells(code: types.CodeType) -> bool:
    """Whether it, or code in it, binds variables in cells: those it closes over, perhaps."""
    if not _CELL_OPS.isdisjoint(code.co_code[::2]):
        return True
    return any(_binds_cells(part) for part in code.co_consts if isinstance(part, types.CodeType))
