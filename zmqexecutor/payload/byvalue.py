"""How functions and classes travel by value: taken apart here, made again there.

cloudpickle knows how to take code apart. What differs from it is in this module:

- A function is made with the one namespace of its module, not a copy of what it uses.
- A class is made first and filled afterwards, so that its contents may refer to it.
  One that comes again changes in place. The hooks of the script's own base classes
  and metaclasses are not run: they did their work at home.
- Cells that functions share stay shared. (Other things: see `reducers`.)

A pickle names the functions below by module, so a plain `pickle.loads` runs them in
whatever process unpickles. What a pickle says of an entry (a global, or a class
without one) is `lookup`, which asks the binder at work in this thread (see
`bindings`) to bind that entry first.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, TypeAlias

from cloudpickle import cloudpickle as cp

from .enums import make_enum, set_members_state
from .namespaces import Key, class_by_id, is_dynamic, make_namespace, namespace

__all__ = [
    "InProgressError",
    "Reduced",
    "arrived",
    "contents_of",
    "lookup",
    "make_class",
    "make_function",
    "make_skeleton",
    "reduce_cell",
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
        globals_ = make_namespace(home)
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


def reduce_cell(cell: types.CellType) -> Reduced:
    """Send what is in it, if there is anything."""
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
        bases = args[0] if maker in (make_enum, cp._make_skeleton_enum) else args[2]
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


def set_class_state(cls: Any, state: tuple[dict[str, Any], ...]) -> None:
    """Give a class its contents, in the place of those it had."""
    attributes, slots, *members = state
    for name in _attributes.get(cls, frozenset()).difference(attributes):
        if name in cls.__dict__ and name != "_abc_impl":
            delattr(cls, name)
    cp._class_setstate(cls, (attributes, slots))
    for states in members:
        set_members_state(cls, states)
    _attributes[cls] = frozenset(attributes)
    _empty_classes.discard(cls)


def contents_of(cls: type) -> object:
    """What tells the contents that a class has got from those that it gets next."""
    return _attributes.get(cls)


def set_new_class_state(cls: type, state: tuple[dict[str, Any], ...]) -> None:
    """Give a class that came back from a worker its contents; never to one known here."""
    if cls in _empty_classes:
        set_class_state(cls, state)
