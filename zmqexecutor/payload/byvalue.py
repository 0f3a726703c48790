"""How functions and classes travel by value: taken apart here, made again there.

cloudpickle knows how to take code apart. What differs from it is in this module:

- A function is made with the one namespace of its module, not a copy of what it uses.
- A class is made first and filled afterwards, so that its contents may refer to it.
  One that comes again changes in place. The hooks of the script's own base classes
  and metaclasses are not run: they did their work at home.
- Cells, caches and dispatchers keep what they share, and leave their locks behind.

A pickle names the functions below by module, so a plain `pickle.loads` runs them in
whatever process unpickles. What a pickle says of an entry (a global, or a class
without one) is `lookup`, which asks the binder at work in this thread (see
`bindings`) to bind that entry first.
"""

from __future__ import annotations

import builtins
import contextlib
import contextvars
import copyreg
import functools
import importlib
import io
import sys
import threading
import types
import typing
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, TypeAlias

from cloudpickle import cloudpickle as cp

from .arrays import known_kinds, reduce_array
from .namespaces import Key, class_by_id, importable, is_dynamic, namespace

__all__ = [
    "GUARDS",
    "REDUCERS",
    "SINGLEDISPATCH_CODE",
    "InProgressError",
    "Reduced",
    "Unavailable",
    "arrived",
    "is_ordinary",
    "is_registered",
    "lookup",
    "make_class",
    "make_function",
    "make_skeleton",
    "reduce_lru_cache",
    "reduce_singledispatch",
    "set_class_state",
    "set_function_state",
    "set_new_class_state",
    "unpickling",
]

Reduced: TypeAlias = Any
"""What a reducer returns: a tuple, a global's name, or NotImplemented."""

# ------------------------------------------------------------------- references


class InProgressError(Exception):
    """An entry refers to one that is being unpickled and cannot be referred to yet."""


class Binder(Protocol):
    """Binds entries (see `bindings`)."""

    busy: set[Key]
    """The entries that are being unpickled."""

    def prepare(self, key: Key) -> None:
        """Bind this entry, if it waits for it and can be bound."""


class _Unpickling(threading.local):
    binder: Binder | None = None
    """At work in this thread, if there is one."""
    found: dict[tuple[str, str, str | None], Any] | None = None
    """What references lead to, of a pickle that is unpickled again and again."""


unpickling: Final = _Unpickling()

arrived: weakref.WeakSet[Any] = weakref.WeakSet()
"""Functions and classes that arrived here as entries: their makers can be told by name."""

_empty_classes: weakref.WeakSet[type] = weakref.WeakSet()
"""Classes made here that have no contents yet."""


def lookup(module: str, name: str, tracker_id: str | None = None) -> Any:
    """Resolve a reference to an entry."""
    found = unpickling.found
    if found is None:
        return _look_up(module, name, tracker_id)
    if (module, name, tracker_id) not in found:
        found[module, name, tracker_id] = _look_up(module, name, tracker_id)
    return found[module, name, tracker_id]


def _look_up(module: str, name: str, tracker_id: str | None) -> Any:
    binder = unpickling.binder
    if binder is not None:
        binder.prepare((module, name))
    found = None if tracker_id is None else class_by_id(tracker_id)
    if found is not None:
        return found
    if binder is not None and (module, name) in binder.busy:
        raise InProgressError
    if not module:
        raise LookupError("a class that this call refers to is gone")
    first, *rest = name.split(".")
    try:
        return functools.reduce(getattr, rest, namespace(module)[first])
    except KeyError:
        raise AttributeError(f"module {module!r} has no attribute {name!r}") from None


# -------------------------------------------------------------------- functions


def make_function(
    code: types.CodeType,
    home: str | None,
    shared: bool,
    own: dict[str, Any] | None,
    closure: tuple[types.CellType, ...] | None,
) -> types.FunctionType:
    """Make a function whose globals are its home's, or its own if it has no home."""
    if home is None:
        globals_ = {} if own is None else own
        globals_.setdefault("__builtins__", builtins.__dict__)
    elif shared:
        globals_ = namespace(home)
    else:
        globals_ = importlib.import_module(home).__dict__
    return types.FunctionType(code, globals_, closure=closure)


def set_function_state(func: types.FunctionType, state: tuple[dict[str, Any], ...]) -> None:
    """Give a function the rest of it."""
    attributes, slots, used = state
    func.__dict__.update(attributes)
    func.__globals__.update(used)
    for name, value in slots.items():
        setattr(func, name, value)


def _make_cell() -> types.CellType:
    return types.CellType()


def _fill_cell(cell: types.CellType, state: tuple[Any]) -> None:
    (cell.cell_contents,) = state


def _reduce_cell(cell: types.CellType) -> Reduced:
    # In two steps, unlike cloudpickle: so two functions that share a cell still
    # share it, and a function may be in its own cell.
    try:
        state = (cell.cell_contents,)
    except ValueError:
        return _make_cell, ()
    return _make_cell, (), state, None, None, _fill_cell


# ---------------------------------------------------------------------- classes


def make_class(maker: Callable[..., type], args: tuple[Any, ...]) -> type:
    """Make a class without contents, or find the one that is here already."""
    cls = class_by_id(args[-2])
    if cls is None:
        bases = args[0] if maker is cp._make_skeleton_enum else args[2]
        with _without_subclass_hooks(bases):
            cls = maker(*args)
        _empty_classes.add(cls)
    if unpickling.binder is not None:
        arrived.add(cls)
    return cls


def make_skeleton(
    metaclass: Any,
    name: str,
    bases: tuple[Any, ...],
    body: dict[str, Any],
    tracker_id: str,
    extra: None,
) -> type:
    """Make a class as cloudpickle does, but not by the script's own metaclass.

    Like `__init_subclass__`, that did its work at home, with arguments it would
    lack here, and what it did travels as the contents of the classes.
    """
    maker = next(kind for kind in metaclass.__mro__ if not is_dynamic(kind))
    if maker is metaclass:
        cls = cp._make_skeleton_class(metaclass, name, bases, body, tracker_id, extra)
    else:
        resolved = types.resolve_bases(bases)
        if resolved is not bases:
            body = {**body, "__orig_bases__": bases}
        cls = maker.__new__(metaclass, name, resolved, body)
        cls = cp._lookup_class_or_track(tracker_id, cls)
    made: type = cls
    return made


@contextlib.contextmanager
def _without_subclass_hooks(bases: tuple[Any, ...]) -> Iterator[None]:
    hooks = {
        cls: cls.__dict__["__init_subclass__"]
        for base in bases
        for cls in getattr(base, "__mro__", ())
        if "__init_subclass__" in cls.__dict__ and is_dynamic(cls)
    }
    for cls in hooks:
        type.__delattr__(cls, "__init_subclass__")
    try:
        yield
    finally:
        for cls, hook in hooks.items():
            type.__setattr__(cls, "__init_subclass__", hook)


_attributes: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()
"""What classes got from home, to be taken away when it is gone there."""


def set_class_state(cls: type, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Give a class its contents, in the place of those it had."""
    for name in _attributes.get(cls, frozenset()).difference(state[0]):
        if name in cls.__dict__ and name != "_abc_impl":
            delattr(cls, name)
    cp._class_setstate(cls, state)
    _attributes[cls] = frozenset(state[0])
    _empty_classes.discard(cls)


def set_new_class_state(cls: type, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Give a class that came back from a worker its contents; never to one known here."""
    if cls in _empty_classes:
        set_class_state(cls, state)


# ----------------------------------------------- caches, dispatchers, and typing


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
    except Exception:  # there is none, or it cannot be sent: then tasks that set it do without
        options = {}
    return _make_context_variable, (variable.name, options)


GUARDS: Final[dict[type, Callable[[Any], Reduced]]] = {
    type(threading.Lock()): lambda _: (threading.Lock, ()),
    type(threading.RLock()): lambda _: (threading.RLock, ()),
    threading.local: lambda _: (threading.local, ()),
    contextvars.ContextVar: _reduce_context_variable,
}
"""What a program keeps beside its globals to guard them, and how to make a new one."""


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
    types.CellType: _reduce_cell,
    types.CodeType: _reduce_code,
    functools.cached_property: _reduce_cached_property,
    functools.singledispatchmethod: _reduce_singledispatchmethod,
    functools._lru_cache_wrapper: reduce_lru_cache,
    typing.TypeVar: _reduce_type_variable,
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


def reduce(obj: Any) -> Reduced:
    """What `reducer_of` its class says, or `reduce_array`; NotImplemented if that is nothing."""
    kind = type(obj)
    reducer = reducer_of(kind)
    if reducer is not None:
        return reducer(obj)
    if kind in known_kinds() and kind not in copyreg.dispatch_table:
        return reduce_array(obj)
    return NotImplemented


def is_ordinary(kind: type) -> bool:
    """Whether `reduce` leaves all instances of this class to pickle."""
    return reducer_of(kind) is None and kind not in known_kinds()


def is_registered(kind: type) -> bool:
    """Whether the program, or a library, has said how instances of this class are reduced."""
    return kind in copyreg.dispatch_table or reducer_of(kind) is not None


class Unavailable:
    """Takes the place of a global that could not be sent; any use of it says so.

    Only what debuggers, pickle and copy do with every object leaves it alone.
    """

    def __init__(self, reason: str) -> None:
        self.__dict__["reason"] = reason

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # what pickle, copy and inspect ask of everything
        return self()

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """Raise SerializationError, as does every other use."""
        from ..worker_errors import SerializationError

        raise SerializationError(self.__dict__["reason"])

    def __exit__(self, *_: object) -> None:  # "with" looks for it before it enters
        pass

    __aexit__ = __exit__


_USES: Final = """
    bool str format bytes hash fspath eq ne lt le gt ge
    int float complex index round trunc floor ceil neg pos abs invert
    add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or
    radd rsub rmul rmatmul rtruediv rfloordiv rmod rdivmod rpow rlshift rrshift rand rxor ror
    len iter next reversed contains getitem setitem delitem setattr delattr
    enter aenter await aiter anext instancecheck subclasscheck mro_entries
"""
# Python looks for these on the class, and does not ask `__getattr__`.
for _use in _USES.split():
    setattr(Unavailable, f"__{_use}__", Unavailable.__call__)
