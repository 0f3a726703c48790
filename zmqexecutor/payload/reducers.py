"""How objects of other kinds are taken apart: caches, dispatchers, typing, locks, files, code.

cloudpickle cannot send some of them, forgets a part of others, or sends what would be of no
use elsewhere. Caches and dispatchers keep what they share, and leave their locks behind.
Everything else is left to cloudpickle's reducers, and to pickle.
"""

from __future__ import annotations

import contextvars
import copyreg
import dataclasses
import functools
import io
import struct
import sys
import threading
import types
import typing
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from cloudpickle import cloudpickle as cp

from ..system.interrupts import is_interrupt
from .arrays import known_kinds, reduce_array
from .byvalue import Reduced, reduce_cell
from .namespaces import importable

__all__ = [
    "GUARDS",
    "REDUCERS",
    "SENTINELS",
    "SINGLEDISPATCH_CODE",
    "is_executor",
    "is_ordinary",
    "is_proxy",
    "is_registered",
    "reduce",
    "reduce_lru_cache",
    "reduce_singledispatch",
    "reducer_of",
]

# ------------------------------------------------------- caches and dispatchers


def _make_lru_cache(func: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(func)


def reduce_lru_cache(wrapper: Any) -> Reduced:
    """Send what is cached, and how; what the cache holds stays at home."""
    if importable(wrapper):
        return wrapper.__qualname__
    parameters = wrapper.cache_parameters()
    made_anew = ("__wrapped__", "cache_parameters")
    state = {name: value for name, value in vars(wrapper).items() if name not in made_anew}
    return _make_lru_cache, (wrapper.__wrapped__, *parameters.values()), state


def _make_cached_property(func: Callable[..., Any], name: str | None) -> Any:
    made: functools.cached_property[Any] = functools.cached_property(func)
    made.attrname = name
    return made


def _reduce_cached_property(prop: functools.cached_property[Any]) -> Reduced:
    return _make_cached_property, (prop.func, prop.attrname)  # its lock stays at home


SINGLEDISPATCH_CODE: Final = functools.singledispatch(lambda _: None).__code__  # type: ignore[attr-defined]


_Cases: TypeAlias = list[tuple[type, Callable[..., Any]]]


def _set_dispatcher_state(dispatcher: Any, state: tuple[_Cases, dict[str, Any]]) -> None:
    cases, attributes = state
    for cls, func in cases:
        dispatcher.register(cls, func)
    vars(dispatcher).update(attributes)


# What each of them has before anybody gives it attributes.
_DISPATCHERS: Final[dict[Any, frozenset[str]]] = {
    make: frozenset(vars(make(lambda _: None)))
    for make in (functools.singledispatch, functools.singledispatchmethod)
}


def _reduce_dispatcher(make: Any, dispatcher: Any, func: Any, registry: Any) -> Reduced:
    # Copies, at once: another thread may register a case.
    cases, attributes = dict(registry), dict(vars(dispatcher))
    del cases[object]
    for name in _DISPATCHERS[make]:
        attributes.pop(name, None)
    return make, (func,), (list(cases.items()), attributes), None, None, _set_dispatcher_state


def reduce_singledispatch(dispatcher: Any) -> Reduced:
    """Send a generic function as its cases, and what attributes it was given."""
    cases = dispatcher.registry
    return _reduce_dispatcher(functools.singledispatch, dispatcher, cases[object], cases)


def _reduce_singledispatchmethod(method: functools.singledispatchmethod[Any]) -> Reduced:
    cases = method.dispatcher.registry
    return _reduce_dispatcher(functools.singledispatchmethod, method, method.func, cases)


# ----------------------------------------------------------------------- typing


# Things of `typing` that pickle as a name, and what makes each of them anew.
_TYPING_ARGUMENTS: Final = {
    getattr(typing, name): attributes
    for name, attributes in {
        "NewType": ("__name__", "__supertype__"),
        "ParamSpec": ("__name__",),
        "TypeVarTuple": ("__name__",),
        "TypeAliasType": ("__name__", "__value__"),
    }.items()
    if hasattr(typing, name)
}


def _reduce_typing(obj: Any) -> Reduced:
    if importable(obj):
        return obj.__name__
    kind: Any = type(obj)
    arguments = tuple(getattr(obj, name) for name in _TYPING_ARGUMENTS[kind])
    keywords = {}
    if getattr(obj, "__type_params__", ()):  # of an alias, since Python 3.12
        keywords["type_params"] = obj.__type_params__
    if _has_default(obj):
        keywords["default"] = obj.__default__
    return functools.partial(kind, **keywords) if keywords else kind, arguments


def _has_default(parameter: Any) -> bool:
    """Whether a type parameter has one, as it may since Python 3.13."""
    return hasattr(parameter, "has_default") and parameter.has_default()


def _make_type_variable(tracker_id: str, name: str, constraints: Any, options: Any) -> Any:
    return cp._lookup_class_or_track(tracker_id, typing.TypeVar(name, *constraints, **options))


def _reduce_type_variable(variable: Any) -> Reduced:
    reduced = cp._typevar_reduce(variable)
    if reduced[0] is not cp._make_typevar or not _has_default(variable):
        return reduced
    # cloudpickle forgets the default, without which a generic class wants more arguments.
    name, bound, constraints, covariant, contravariant, tracker_id = reduced[1]
    options = {
        "bound": bound,
        "covariant": covariant,
        "contravariant": contravariant,
        "default": variable.__default__,
    }
    return _make_type_variable, (tracker_id, name, constraints or (), options)


# ------------------------------------------- files, locks, and context variables


def _reduce_text_file(file: io.TextIOWrapper) -> Reduced:
    if file in (sys.stdin, sys.stdout, sys.stderr):
        return cp._file_reduce(file)
    # cloudpickle would read it, and send its text.
    raise TypeError(
        f"cannot send an open file ({getattr(file, 'name', '?')!r}); "
        "send its name, and open it in the task"
    )


def _make_context_variable(name: str, options: dict[str, Any]) -> contextvars.ContextVar[Any]:
    return contextvars.ContextVar(name, **options)


def _reduce_context_variable(variable: contextvars.ContextVar[Any]) -> Reduced:
    # Its value stays at home. In a context where it has none, it gives its default.
    try:
        default = contextvars.Context().run(variable.get)
        options = {"default": default}
        if type(default) not in GUARDS:
            cp.dumps(default)
    except Exception as error:  # there is none, or it cannot be sent
        if is_interrupt(error):
            raise
        options = {}  # tasks that set it do without
    return _make_context_variable, (variable.name, options)


GUARDS: Final[dict[type, Callable[[Any], Reduced]]] = {
    type(threading.Lock()): lambda _: (threading.Lock, ()),
    type(threading.RLock()): lambda _: (threading.RLock, ()),
    threading.local: lambda _: (threading.local, ()),
    contextvars.ContextVar: _reduce_context_variable,
}
"""What a program keeps beside its globals to guard them, and how to make a new one."""


# ------------------------------------------------------------------ dataclasses

SENTINELS: Final = {
    type(getattr(dataclasses, name)): name
    for name in ("MISSING", "KW_ONLY", "_HAS_DEFAULT_FACTORY")
}
"""Types of which dataclasses have one object, and know it: by its name in their module."""


# ----------------------------------------------------------------- all of them

_FILENAME = 10  # of the arguments of `types.CodeType`, since Python 3.10


def _reduce_code(code: types.CodeType) -> Reduced:
    """Code with the name of its file, by which tracebacks find its lines.

    cloudpickle leaves that out from 3.1.3 on.
    """
    make, arguments, *_ = cp._code_reduce(code)
    filename = "".join(code.co_filename)  # a text of its own, so that equal code pickles equally
    return make, (*arguments[:_FILENAME], filename, *arguments[_FILENAME + 1 :])


REDUCERS: Final[dict[type, Callable[[Any], Reduced]]] = {
    **cp.Pickler._dispatch_table,
    io.TextIOWrapper: _reduce_text_file,
    types.CellType: reduce_cell,
    types.CodeType: _reduce_code,
    struct.Struct: lambda form: (struct.Struct, (form.format,)),
    functools.cached_property: _reduce_cached_property,
    functools.singledispatchmethod: _reduce_singledispatchmethod,
    functools._lru_cache_wrapper: reduce_lru_cache,
    typing.TypeVar: _reduce_type_variable,
    **dict.fromkeys(SENTINELS, lambda sentinel: SENTINELS[type(sentinel)]),
    **dict.fromkeys(_TYPING_ARGUMENTS, _reduce_typing),
}
"""Ours, and cloudpickle's."""


def reducer_of(kind: type) -> Callable[[Any], Reduced] | None:
    """What reduces instances of this class; None if it is for pickle to find out.

    Ours and cloudpickle's come first, then copyreg's, which pickle knows. multiprocessing's come
    last, since its reduction of bound methods would undo cloudpickle's, and only if the
    program has imported it.
    """
    reducer = REDUCERS.get(kind)
    if reducer is None and (reduction := sys.modules.get("multiprocessing.reduction")) is not None:
        reducer = reduction.ForkingPickler._extra_reducers.get(kind)
        if reducer is not None and kind in copyreg.dispatch_table:
            return None
    return reducer


def reduce(obj: Any, *, as_is: bool = False) -> Reduced:
    """What `reducer_of` its class says, or `reduce_array`; NotImplemented if that is nothing."""
    kind = type(obj)
    reducer = reducer_of(kind)
    if reducer is not None:
        return reducer(obj)
    if kind in known_kinds() and kind not in copyreg.dispatch_table:
        return reduce_array(obj, as_is=as_is)
    return NotImplemented


def is_ordinary(kind: type) -> bool:
    """Whether all instances of this class are left to pickle."""
    return reducer_of(kind) is None and kind not in known_kinds() and not is_proxy(kind)


def is_proxy(kind: type) -> bool:
    """Whether instances stand for what a multiprocessing's manager has while they are alive."""
    managers = sys.modules.get("multiprocessing.managers")
    return managers is not None and issubclass(kind, managers.BaseProxy)


def is_executor(kind: type) -> bool:
    """Whether instances run the tasks of a program, as executors of whatever library do."""
    base = sys.modules.get("concurrent.futures._base")
    return base is not None and issubclass(kind, base.Executor)


def is_registered(kind: type) -> bool:
    """Whether the program, or a library, has said how instances of this class are reduced."""
    return kind in copyreg.dispatch_table or reducer_of(kind) is not None
