"""Code that travels by value, and the globals it shares wherever it arrives.

A worker cannot import the user's script, so functions and classes of `__main__`
(and of modules given to `cloudpickle.register_pickle_by_value`) travel by value.
cloudpickle gives each of them a copy of the globals it uses. Here they share one
namespace per module, as they did at home:

    parent                                        worker
    __main__.__dict__                             __main__.__dict__
      f ──── names ──► helper, LIMIT                f, helper, LIMIT, cache
      helper ─ names ► cache                        ▲
                                                    │ only what is new here
    definition of f ────────────────────────────────┘
      entries: f, helper, LIMIT, cache    each with a digest and a pickle
      root:    "the global f"

- An *entry* is one global: a module, a name, its pickled value, and a digest.
  A function is pickled without its globals; their names lead to more entries.
  What another global is bound to is pickled as a *reference* to that entry. So
  cycles through globals do no harm, and identity is kept.
- The worker binds an entry only if the digest differs from the one it bound for
  that name before. What a task or an initializer put there itself (a counter, a
  connection) therefore stays until the parent rebinds or changes its own value.
- Classes are found by cloudpickle's tracker id, so they are the same class on
  both sides. A class that is sent again changes in place. Classes without a
  global name (local ones) are entries too, of the module "" and their id.
- What comes back from a worker refers to the parent's functions and classes. It
  never writes to them.
"""

from __future__ import annotations

import abc
import builtins
import collections
import contextlib
import copyreg
import dataclasses
import dis
import functools
import importlib
import io
import itertools
import logging
import operator
import pickle
import sys
import threading
import types
import typing
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from hashlib import blake2b
from typing import IO, Any, Final, NamedTuple, TypeAlias

from cloudpickle import cloudpickle as cp

__all__ = [
    "ArgumentPickler",
    "DefinitionError",
    "Definitions",
    "Entry",
    "Key",
    "Received",
    "ResultPickler",
    "ValuePickler",
]

Key: TypeAlias = tuple[str, str]
"""A module and the name of a global of it; or "" and the id of a class without one."""

Payload: TypeAlias = tuple[bytes, ...]
"""A pickled value; or a class in two pickles, what it is made of and its contents; or the
values of several globals that hold each other, their keys, and b""; or nothing, which
says that there is no such global."""

Entry: TypeAlias = tuple[str, str, bytes, Payload]
"""Module, name, digest and payload."""

Reduced: TypeAlias = Any
"""What a reducer returns: a tuple, a global's name, or NotImplemented."""

MISSING: Final = object()
"""Stands for the value of a global that does not exist."""

MAIN: Final = "__main__"

# ------------------------------------------------------------- where code lives

_namespaces: dict[str, dict[str, Any]] = {}
"""Globals of modules that are here only because code of theirs arrived by value."""


def travels_by_value(module: str) -> bool:
    """Say whether a module's functions and classes travel by value."""
    if module == MAIN or module == "__mp_main__" or module in _namespaces:
        return True
    if not cp._PICKLE_BY_VALUE_MODULES:
        return False
    known = sys.modules.get(module)
    return isinstance(known, types.ModuleType) and cp._is_registered_pickle_by_value(known)


def namespace(module: str) -> dict[str, Any]:
    """Return the one dict of globals that all code of this module shares here."""
    if module == MAIN or module == "__mp_main__":
        return sys.modules[MAIN].__dict__
    known = _namespaces.get(module)
    if known is not None:
        return known
    if module in sys.modules and travels_by_value(module):
        return sys.modules[module].__dict__
    return _namespaces.setdefault(module, {"__name__": module, "__builtins__": builtins.__dict__})


def _is_class(obj: object) -> bool:
    return issubclass(type(obj), type)  # isinstance takes list[int] for one in Python 3.10


def _module_of(obj: Any) -> str:
    # A child of multiprocessing knows the script by two names.
    module: object = getattr(obj, "__module__", None)
    return MAIN if module == "__mp_main__" else module if isinstance(module, str) else ""


def home_of(namespace_: dict[str, Any]) -> str | None:
    """Return the module whose globals these are, or None for a dict of their own."""
    module = namespace_.get("__name__")
    if not isinstance(module, str):
        return None
    if travels_by_value(module):
        module = MAIN if module == "__mp_main__" else module
        return module if namespace(module) is namespace_ else None
    known = sys.modules.get(module)
    # Without a spec nobody could import it: a module made by hand.
    if getattr(known, "__dict__", None) is namespace_ and getattr(known, "__spec__", None):
        return module
    return None


def importable(obj: Any) -> bool:
    """Say whether the other side finds a function, class or the like by its name."""
    if getattr(obj, "__module__", None) == "__mp_main__":
        return False
    name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    found = cp._lookup_module_and_qualname(obj, name=name) if name else None
    return found is not None and not cp._is_registered_pickle_by_value(found[0])


def _is_dynamic(cls: type) -> bool:
    # Types of builtins that have no name there, such as NoneType, are left to cloudpickle.
    return cls.__module__ != "builtins" and not importable(cls)


_GLOBAL_OPS: Final = frozenset(
    ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
)
# Names the interpreter gives every namespace, which are each side's own.
_OWN_NAMES: Final = frozenset(("__name__", "__builtins__"))
# What code needs to find its files and to import relatively, whether it names it or not.
_BASE_NAMES: Final = frozenset(("__file__", "__package__", "__path__"))

_code_globals: weakref.WeakKeyDictionary[types.CodeType, frozenset[str]]
_code_globals = weakref.WeakKeyDictionary()


def code_globals(code: types.CodeType) -> frozenset[str]:
    """Return the names of the globals that code, or code nested in it, refers to.

    Unlike cloudpickle's, this sees what bodies of nested classes load by name.
    """
    known = _code_globals.get(code)
    if known is None:
        names = {i.argval for i in dis.get_instructions(code) if i.opname in _GLOBAL_OPS}
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                names |= code_globals(constant)
        known = _code_globals[code] = frozenset(names) - _OWN_NAMES
    return known


# ------------------------------------------------------------------- rebuilding
# These run in whatever process unpickles. A plain `pickle.loads` calls them.

_thread = threading.local()
"""`binder`: the `_Binder` at work in this thread."""

_received: weakref.WeakSet[Any] = weakref.WeakSet()
"""Functions and classes that arrived here as entries: their makers can be told by name."""

_empty_classes: weakref.WeakSet[type] = weakref.WeakSet()
"""Classes made here that have no contents yet."""


def _class_by_id(tracker_id: str) -> type | None:
    found: type | None = cp._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker_id)
    return found


def _tracker_id(cls: type) -> str:
    tracker_id: str = cp._get_or_create_tracker_id(cls)
    return tracker_id


def _lookup(module: str, name: str, tracker_id: str | None = None) -> Any:
    """Resolve a reference to an entry."""
    binder: _Binder | None = getattr(_thread, "binder", None)
    if binder is not None:
        binder.prepare((module, name))
    found = None if tracker_id is None else _class_by_id(tracker_id)
    if found is not None:
        return found
    if binder is not None and (module, name) in binder.busy:
        raise _InProgressError
    if not module:
        raise LookupError("a class that this call refers to is gone")
    first, *rest = name.split(".")
    try:
        return functools.reduce(getattr, rest, namespace(module)[first])
    except KeyError:
        raise AttributeError(f"module {module!r} has no attribute {name!r}") from None


def _make_function(
    code: types.CodeType,
    home: str | None,
    shared: bool,
    own: dict[str, Any] | None,
    closure: tuple[types.CellType, ...] | None,
) -> types.FunctionType:
    if home is None:
        globals_ = {} if own is None else own
        globals_.setdefault("__builtins__", builtins.__dict__)
    elif shared:
        globals_ = namespace(home)
    else:
        globals_ = importlib.import_module(home).__dict__
    return types.FunctionType(code, globals_, closure=closure)


def _set_function_state(func: types.FunctionType, state: tuple[dict[str, Any], ...]) -> None:
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


def _make_class(maker: Callable[..., type], args: tuple[Any, ...]) -> type:
    cls = _class_by_id(args[-2])
    if cls is None:
        bases = args[0] if maker is cp._make_skeleton_enum else args[2]
        with _without_subclass_hooks(bases):
            cls = maker(*args)
        _empty_classes.add(cls)
    if getattr(_thread, "binder", None) is not None:
        _received.add(cls)
    return cls


def _make_skeleton(
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
    maker = next(kind for kind in metaclass.__mro__ if not _is_dynamic(kind))
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
        if "__init_subclass__" in cls.__dict__ and _is_dynamic(cls)
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


def _set_class_state(cls: type, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for name in _attributes.get(cls, frozenset()).difference(state[0]):
        if name in cls.__dict__ and name != "_abc_impl":
            delattr(cls, name)
    cp._class_setstate(cls, state)
    _attributes[cls] = frozenset(state[0])
    _empty_classes.discard(cls)


def _set_new_class_state(cls: type, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    # A class that is known here is not changed by what comes back from a worker.
    if cls in _empty_classes:
        _set_class_state(cls, state)


def _make_lru_cache(func: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(func)


def _reduce_lru_cache(wrapper: Any) -> Reduced:
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


_SINGLEDISPATCH_CODE: Final = functools.singledispatch(lambda _: None).__code__  # type: ignore[attr-defined]


def _register_all(dispatcher: Any, cases: list[tuple[type, Callable[..., Any]]]) -> None:
    for cls, func in cases:
        dispatcher.register(cls, func)


def _reduce_singledispatch(dispatcher: Any) -> Reduced:
    cases = dict(dispatcher.registry)
    args = (cases.pop(object),)
    return functools.singledispatch, args, list(cases.items()), None, None, _register_all


def _reduce_singledispatchmethod(method: functools.singledispatchmethod[Any]) -> Reduced:
    cases = dict(method.dispatcher.registry)
    del cases[object]
    args = (method.func,)
    return functools.singledispatchmethod, args, list(cases.items()), None, None, _register_all


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
    return type(obj), tuple(getattr(obj, name) for name in _TYPING_ARGUMENTS[type(obj)])


class Unavailable:
    """Takes the place of a global that could not be sent; any use of it says so."""

    def __init__(self, reason: str) -> None:
        self.__dict__["reason"] = reason

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # what pickle, copy and inspect ask of everything
        return self()

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """Raise SerializationError, as does every other use."""
        from .errors import SerializationError

        raise SerializationError(self.__dict__["reason"])

    __enter__ = __iter__ = __len__ = __getitem__ = __setitem__ = __contains__ = __call__

    def __exit__(self, *_: object) -> None:  # "with" looks for it before it enters
        pass


# --------------------------------------------------------------------- picklers


class _Reducers(dict[type, Callable[[Any], Reduced]]):
    """A dispatch table: ours and cloudpickle's, then copyreg's, then multiprocessing's.

    multiprocessing's come last, since its reduction of bound methods would undo
    cloudpickle's, and only if the program has imported it.
    """

    def __missing__(self, kind: type) -> Callable[[Any], Reduced]:
        reducer = copyreg.dispatch_table.get(kind)
        if reducer is None:
            reduction: Any = sys.modules.get("multiprocessing.reduction")
            if reduction is None:
                raise KeyError(kind)
            reducer = reduction.ForkingPickler._extra_reducers[kind]
        return reducer


_OURS: Final = globals()


class ValuePickler(pickle.Pickler):
    """Pickles by value what the other side cannot import.

    Attributes:
        by_value: whether anything that is sent by value was met.
        refs: entries whose objects the pickle refers to.
        names: globals that code in the pickle uses.
    """

    dispatch_table = _Reducers(
        {
            **cp.Pickler._dispatch_table,
            types.CellType: _reduce_cell,
            functools.cached_property: _reduce_cached_property,
            functools.singledispatchmethod: _reduce_singledispatchmethod,
            functools._lru_cache_wrapper: _reduce_lru_cache,
            **dict.fromkeys(_TYPING_ARGUMENTS, _reduce_typing),
        }
    )
    _finish_class = staticmethod(_set_class_state)

    def __init__(
        self, file: IO[bytes], buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffer_callback)
        self.by_value = False
        self.refs: set[Key] = set()
        self.names: set[Key] = set()
        self._own_globals: dict[int, dict[str, Any]] = {}

    def reset(self) -> None:
        """Forget all that was pickled, so that nothing of it is kept alive."""
        self.clear_memo()
        self.by_value = False
        self.refs.clear()
        self.names.clear()
        self._own_globals.clear()

    def reducer_override(self, obj: Any) -> Reduced:
        """Take functions and classes from pickle; it would look for their names."""
        kind = type(obj)
        make: Callable[[Any], Reduced]
        if kind is types.FunctionType:
            if obj.__globals__ is _OURS or importable(obj):
                return NotImplemented
            make = self._function_by_value
        elif issubclass(kind, type):
            if not _is_dynamic(obj):
                return cp._class_reduce(obj)
            make = self._class_by_value
        elif kind is functools._lru_cache_wrapper and not importable(obj):
            make = _reduce_lru_cache
        else:
            return NotImplemented
        self.by_value = True
        reference = self.reference(obj)
        return make(obj) if reference is None else reference

    def reference(self, obj: Any) -> Reduced | None:
        """Return a reference to the entry this object is, or None if it is none."""
        raise NotImplementedError

    def _function_by_value(self, func: types.FunctionType) -> Reduced:
        if func.__code__ is _SINGLEDISPATCH_CODE:
            return _reduce_singledispatch(func)
        state, slots = cp._function_getstate(func)
        used = slots.pop("__globals__")
        closure = slots.pop("__closure__")
        if not slots["_cloudpickle_submodules"]:
            del slots["_cloudpickle_submodules"]
        home = home_of(func.__globals__)
        own = None
        shared = home is not None and travels_by_value(home)
        if home is None:
            own = self._copied_globals(func.__globals__)
        else:
            used = {}
            if shared:
                names = code_globals(func.__code__) | _BASE_NAMES.intersection(func.__globals__)
                self.names.update([(home, name) for name in names])
        args = (func.__code__, home, shared, own, closure)
        return _make_function, args, (state, slots, used), None, None, _set_function_state

    def _copied_globals(self, globals_: dict[str, Any]) -> dict[str, Any]:
        known = self._own_globals.get(id(globals_))
        if known is None:
            base = ("__name__", *_BASE_NAMES)
            known = {name: globals_[name] for name in base if name in globals_}
            self._own_globals[id(globals_)] = known
        return known

    def _class_by_value(self, cls: type) -> Reduced:
        maker, args, (attributes, slots), *_ = cp._dynamic_class_reduce(cls)
        if "__slots__" in attributes and not issubclass(cls, (tuple, Enum)):
            args[3]["__slots__"] = attributes["__slots__"]  # too late as an attribute
        if maker is cp._make_skeleton_class:
            maker = _make_skeleton
        # Written into a class when its first instance is pickled, or when someone asks
        # for annotations: not a change that should reach the worker.
        attributes.pop("__slotnames__", None)
        if not attributes.get("__annotations__", True):
            del attributes["__annotations__"]
        return _make_class, (maker, args), (attributes, slots), None, None, self._finish_class


class ArgumentPickler(ValuePickler):
    """The parent's pickler of arguments: values, but functions and classes by reference."""

    _root: Key | None = None
    _inside_class = False
    _inline: frozenset[Key] = frozenset()
    _keys: dict[int, Key] | None = None

    def reset(self) -> None:
        """Forget all that was pickled, so that nothing of it is kept alive."""
        super().reset()
        self._keys = None

    def reference(self, obj: Any) -> Reduced | None:
        """Refer to the entry that the object is, unless it is the one to be pickled."""
        key = self.key_of(obj)
        tracker_id = _tracker_id(obj) if _is_class(obj) else None
        if key is None and tracker_id is not None:
            key = ("", tracker_id)
        if key is None or key in self._inline:
            return None
        if key == self._root and not self._inside_class:
            return None
        self.refs.add(key)
        return _lookup, (*key, tracker_id)

    def key_of(self, obj: Any) -> Key | None:
        """Return the global that is bound to this object, or None."""
        if self._keys is None and (type(obj) is types.FunctionType or _is_class(obj)):
            return _key_of(obj)  # cheaper than the map, for the few there are
        if self._keys is None:
            self._keys = _bound_objects()
        key = self._keys.get(id(obj))
        if key is not None and namespace(key[0]).get(key[1]) is obj:
            return key
        return None


def _key_of(obj: Any) -> Key | None:
    home, name = _module_of(obj), getattr(obj, "__qualname__", "")
    if not travels_by_value(home):
        home = MAIN
    elif namespace(home).get(name) is obj:
        return home, name
    for bound, value in list(namespace(home).items()):
        if value is obj:
            return home, bound
    return None


def _bound_objects() -> dict[int, Key]:
    """Map the ids of all objects that globals are bound to; of two names the first counts."""
    homes = dict.fromkeys((MAIN, *_namespaces))
    for module in list(sys.modules) if cp._PICKLE_BY_VALUE_MODULES else ():
        if travels_by_value(module) and module != "__mp_main__":
            homes[module] = None
    return {
        id(value): (home, name)
        for home in homes
        for name, value in reversed(list(namespace(home).items()))
    }


class DefinitionPickler(ArgumentPickler):
    """The parent's pickler of entries and callables.

    In an entry, every object that a global is bound to is a reference. A callable
    that is not bound to a global may hold such objects, too. They are values, as
    arguments are: the worker's global may by now be bound to something else.
    """

    _callable: object = None

    def __init__(self, root: Key | None, inline: frozenset[Key] = frozenset()) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file)
        self._root = root
        self._inline = inline

    def dumps(self, value: Any) -> Payload:
        """Pickle a value, or an ordinary class in two parts."""
        if _is_class(value) and _is_dynamic(value) and self._root is not None:
            key = self.key_of(value)
            if (key is None or key == self._root) and not issubclass(value, Enum):
                return self._dump_class(value)
        if self._root is None:
            self._callable = value
        self.dump(value)
        return (self._file.getvalue(),)

    def _dump_class(self, cls: type) -> Payload:
        _, parts, contents, *_ = self._class_by_value(cls)
        self.dump(parts)
        size = self._file.tell()
        self.clear_memo()
        self._inside_class = True  # its contents refer to the class itself
        self.dump(contents)
        if self._root is not None:
            self.refs.discard(self._root)
        pickled = self._file.getvalue()
        return pickled[:size], pickled[size:]

    def reducer_override(self, obj: Any) -> Reduced:
        """As in arguments; but instances that a global is bound to may be references too."""
        kind = type(obj)
        if kind is types.FunctionType or issubclass(kind, type):
            return super().reducer_override(obj)
        if kind is types.CodeType or kind is types.CellType:
            return NotImplemented
        if isinstance(obj, types.ModuleType):
            return cp._module_reduce(obj)
        if self._root is None and obj is not self._callable:
            return super().reducer_override(obj)
        return self.reference(obj) or NotImplemented


class ResultPickler(ValuePickler):
    """The worker's pickler: what came from the parent goes back as a reference."""

    _finish_class = staticmethod(_set_new_class_state)

    def reference(self, obj: Any) -> Reduced | None:
        """Refer to what the parent sent under a name that still leads to it."""
        if obj not in _received or "<locals>" in obj.__qualname__:
            return None
        home, name = _module_of(obj), obj.__qualname__
        if _is_class(obj):
            return (_lookup, (home, name, _tracker_id(obj))) if travels_by_value(home) else None
        if travels_by_value(home) and namespace(home).get(name) is obj:
            return _lookup, (home, name)
        return None


# ---------------------------------------------------------------- in the worker


class _InProgressError(Exception):
    """An entry refers to one that is being unpickled and cannot be referred to yet."""


class _Skeleton(NamedTuple):
    """A class that has been made, and its contents to be."""

    cls: type
    digest: bytes
    contents: bytes


class _Binder:
    """Binds entries in turn, or when another refers to them.

    A class is made before its contents are unpickled, and is there to be referred
    to from then on. So classes may refer to each other in any way, and to objects
    that refer to them; what else refers to itself the parent did not send as
    references.
    """

    def __init__(self, received: Received, entries: list[Entry]) -> None:
        self.busy: set[Key] = set()
        # What no global keeps alive; first, lest one dies before it is asked for.
        self.classes = [_class_by_id(name) for module, name, _, _ in entries if not module]
        self._received = received
        self._waiting = {
            (module, name): (digest, payload)
            for module, name, digest, payload in entries
            if not received.has(module, name, digest)
        }
        self._skeletons: dict[Key, _Skeleton] = {}
        self._bases_only = False

    def run(self) -> bool:
        """Bind all; say whether there were any."""
        if not self._waiting:
            return False
        outer = getattr(_thread, "binder", None)
        _thread.binder = self
        try:
            while self._waiting:
                self.prepare(next(iter(self._waiting)))
                if not self._waiting:
                    for key in list(self._skeletons):
                        self._finish(key)
        finally:
            _thread.binder = outer
        return True

    def prepare(self, key: Key) -> None:
        """Bind this entry, if it waits for it and can be bound."""
        if key in self._waiting:
            digest, payload = self._waiting[key]
            if len(payload) == 2:
                self._make(key, digest, payload)
            else:
                self._bind(key, digest, payload)
        if key in self._skeletons and not self._bases_only:
            self._finish(key)

    def _bind(self, key: Key, digest: bytes, payload: Payload) -> None:
        keys: list[Key] = pickle.loads(payload[1]) if len(payload) == 3 else [key]
        entries = {key: self._waiting.pop(key) for key in keys if key in self._waiting}
        self.busy.update(keys)
        outer, self._bases_only = self._bases_only, False
        try:
            value = pickle.loads(payload[0]) if payload else MISSING
        except _InProgressError:
            self._waiting.update(entries)
            raise
        finally:
            self._bases_only = outer
            self.busy.difference_update(keys)
        values: Any = value if len(payload) == 3 else (value,)
        for bound, part in zip(keys, values, strict=True):
            self.classes += [] if bound[0] else [part]
            self._received.bind(bound, digest, part)

    def _make(self, key: Key, digest: bytes, payload: Payload) -> None:
        del self._waiting[key]
        outer, self._bases_only = self._bases_only, True
        try:
            cls = _make_class(*pickle.loads(payload[0]))
            self.classes.append(cls)
        finally:
            self._bases_only = outer
        self._skeletons[key] = _Skeleton(cls, digest, payload[1])

    def _finish(self, key: Key) -> None:
        skeleton = self._skeletons.pop(key, None)
        if skeleton is None:
            return
        try:
            contents = pickle.loads(skeleton.contents)
        except _InProgressError:  # an object that holds the class; when that is there
            self._skeletons[key] = skeleton
            return
        _set_class_state(skeleton.cls, contents)
        self._received.bind(key, skeleton.digest, skeleton.cls)


class Received:
    """The worker's side: binds entries, and knows what it bound last."""

    def __init__(self) -> None:
        self.version = 0
        """Grows whenever something is bound."""
        self._digests: dict[Key, bytes] = {}
        # What was there before any code of the user is ours, and may be overwritten.
        self._bootstrap = frozenset(namespace(MAIN))

    def has(self, module: str, name: str, digest: bytes) -> bool:
        """Say whether this is what was bound last (a class has to be alive, too)."""
        if self._digests.get((module, name)) != digest:
            return False
        return bool(module) or _class_by_id(name) is not None

    def apply(self, entries: list[Entry]) -> tuple[bool, list[type | None]]:
        """Bind the entries that are new or changed.

        Return whether there were any, and the classes that no global keeps alive.
        """
        binder = _Binder(self, entries)
        return binder.run(), binder.classes

    def bind(self, key: Key, digest: bytes, value: object) -> None:
        """Bind one entry to its value."""
        module, name = key
        if module:
            self._bind_global(module, name, value)
        self._digests[key] = digest
        self.version += 1

    def _bind_global(self, module: str, name: str, value: object) -> None:
        globals_ = namespace(module)
        ours = module == MAIN and name in self._bootstrap
        if (module, name) not in self._digests and name in globals_ and not ours:
            return  # set by a task or an initializer before the parent's value was needed
        if value is MISSING:
            globals_.pop(name, None)
            return
        globals_[name] = value
        if name == "__package__":
            globals_["__spec__"] = None  # ours, which would contradict it
        if isinstance(value, (types.FunctionType, functools._lru_cache_wrapper)):
            _received.add(value)

    def forget(self, entries: list[Entry]) -> None:
        """Let go of what was remembered of classes that have died."""
        for module, name, _, _ in entries:
            if not module and _class_by_id(name) is None:
                self._digests.pop((module, name), None)


# ----------------------------------------------------------------------- proofs
# A pickle may be kept while nothing it captured can have changed. What it captured
# is a graph; of each node that can change, the ids of its children are written
# down. Ids suffice: the children are kept alive, or (functions and classes, which
# must be free to die) are nodes themselves whose check fails once they are gone.

Read: TypeAlias = Callable[[Any], Iterable[object]]
"""Returns the children of a node, given the node or a weak reference to it."""


class Unprovable(Exception):  # noqa: N818 - an answer, not an error
    """Something captured may change without a trace."""


_MAX_CHILDREN: Final = 2000
"""A graph that is larger than this is pickled anew, rather than looked through."""

_ATOMS: Final = frozenset(
    (
        *(type(None), bool, int, float, complex, str, bytes, range, slice),
        *(type(...), type(NotImplemented), types.CodeType, types.BuiltinFunctionType),
        *(types.MethodDescriptorType, types.WrapperDescriptorType),
        *(types.ClassMethodDescriptorType, dataclasses._FIELD_BASE),  # type: ignore[attr-defined]
    )
)
# Modules, some of which pydantic's classes need, whose instances do not change.
_IMMUTABLE_MODULES: Final = frozenset(
    (
        *("annotated_types", "datetime", "decimal", "fractions", "ipaddress", "operator"),
        *("pathlib", "pydantic_core", "re", "typing", "uuid", "zoneinfo"),
    )
)
_OWN_DESCRIPTORS: Final = (types.GetSetDescriptorType, types.MemberDescriptorType)

_function_parts = operator.attrgetter(
    *("__code__", "__defaults__", "__kwdefaults__"),
    *("__name__", "__qualname__", "__module__", "__doc__"),
    *("__closure__", "__dict__", "__annotations__"),
)
_TABLES: Final = 7  # where the tables begin, whose contents count
_class_parts = operator.attrgetter("__class__", "__bases__", "__name__", "__qualname__")


def _read_names(source: tuple[Callable[..., object], tuple[str, ...]]) -> Iterable[object]:
    get, names = source
    return map(get, names, itertools.repeat(MISSING))


def _read_import(source: tuple[str, str]) -> Iterable[object]:
    module, path = source
    found = sys.modules[module]
    if "." in path:
        return (functools.reduce(getattr, path.split("."), found),)
    return (getattr(found, path),)


def _read_dict(source: Mapping[Any, Any]) -> Iterable[object]:
    return (*source, *source.values())


def _read_function(ref: Callable[[], Any]) -> Sequence[object]:
    # Much of the time that a call takes to pickle is spent here.
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
    functools._lru_cache_wrapper: _read_instance,
    types.GenericAlias: operator.attrgetter("__origin__", "__args__"),
    types.SimpleNamespace: lambda obj: _read_dict(vars(obj)),
    collections.OrderedDict: _read_dict,
    collections.Counter: _read_dict,
    collections.defaultdict: lambda table: (table.default_factory, *_read_dict(table)),
    collections.deque: lambda queue: (queue.maxlen, *queue),
    logging.Logger: operator.attrgetter("name"),
    logging.RootLogger: lambda _: (),
    types.MethodWrapperType: operator.attrgetter("__self__", "__name__"),
    types.UnionType: operator.attrgetter("__args__"),
}


class Proof:
    """Tells whether anything a pickle was made of has changed since.

    Attributes:
        bindings: what globals were bound to.
        checks: nodes of the graph: how to read one, what to read, the children it had.
    """

    __slots__ = ("_compiled", "_keep", "_modules", "_registered", "bindings", "checks")

    def __init__(self) -> None:
        self.bindings: dict[Key, int] = {}
        self.checks: dict[Any, tuple[Read, Any, list[int]]] = {}
        self._keep: list[Any] = []
        # A new import may be a submodule that pickled code would have to import.
        self._modules = len(sys.modules)
        self._registered = frozenset(cp._PICKLE_BY_VALUE_MODULES)
        self._compiled: list[tuple[Read, Any, list[int]]] | None = None

    def bind(self, keys: Iterable[Key]) -> None:
        """Note what these globals are bound to now."""
        for module, name in keys:
            if module:
                value = namespace(module).get(name, MISSING)
                self.bindings[module, name] = id(value)
                self._keep.append(value if _may_be_kept(value) else None)

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

    def _compile(self) -> list[tuple[Read, Any, list[int]]]:
        compiled = []
        for home in dict.fromkeys(module for module, _ in self.bindings):
            names = tuple(name for module, name in self.bindings if module == home)
            ids = [self.bindings[home, name] for name in names]
            compiled.append((_read_names, (namespace(home).get, names), ids))
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
            for read, source, ids in self._compiled:
                if [*map(id, read(source))] != ids:
                    return False
        except Exception:  # a name, a cell or a function is gone
            return False
        return True


def _holds(proof: Proof | None) -> bool:
    return proof is not None and proof.holds()


def _may_be_kept(value: object) -> bool:
    return type(value) is not types.FunctionType and not _is_class(value)


def prove(value: object) -> Proof | None:
    """Write down what a pickle of this captures, or return None if it cannot be known."""
    try:
        return _Prover(value).proof
    except Exception:  # Unprovable, or something odd that no proof should rest on
        return None


class _Prover:
    """Walks through what a pickle would capture."""

    def __init__(self, value: object) -> None:
        self.proof = Proof()
        self._children = 0
        self._todo = [value]
        self._seen: set[int] = set()
        while self._todo:
            self._visit(self._todo.pop())

    def _visit(self, value: Any) -> None:
        if _may_be_kept(value):
            self.proof._keep.append(value)
        kind = type(value)
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
        elif kind in _READERS:
            self._check(_READERS[kind], value)
        elif kind.__module__.partition(".")[0] in _IMMUTABLE_MODULES:
            self._todo += [typing.get_origin(value), *typing.get_args(value)]
        elif kind.__module__ == "attr._make" and issubclass(kind, tuple):
            self._check(tuple, value)  # the fields of a class of attrs
        elif isinstance(value, Enum) or _has_plain_state(kind):
            self._check(_read_instance, value)
        else:
            raise Unprovable

    def _check(self, read: Read, source: Any, children: Iterable[object] | None = None) -> None:
        found = list(read(source))
        self._children += len(found)
        if self._children > _MAX_CHILDREN:
            raise Unprovable
        self.proof.checks[read, id(source)] = read, source, [*map(id, found)]
        self._todo += found if children is None else children

    def _check_import(self, value: Any) -> None:
        if value.__module__ != "builtins":
            source = value.__module__, value.__qualname__
            self.proof.checks[source] = _read_import, source, [id(value)]

    def _visit_function(self, func: types.FunctionType) -> None:
        if importable(func):
            self._check_import(func)
            return
        ref = weakref.ref(func)
        parts = _read_function(ref)
        # Not the tables themselves: kept alive, they might keep the function alive.
        self._check(_read_function, ref, [*parts[:_TABLES], *parts[_TABLES + 3 :]])
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
        and ValuePickler.dispatch_table.get(kind) is None
        and kind not in copyreg.dispatch_table
        and all(base is object or base.__flags__ & _HEAP_TYPE for base in kind.__mro__)
    )


# ------------------------------------------------------------------ definitions


_FAILURES: Final = (Exception, SystemExit, GeneratorExit)
"""What pickling may raise; a KeyboardInterrupt comes from elsewhere."""


class DefinitionError(Exception):
    """Part of a definition cannot be pickled: which part, and the exception."""

    def __init__(self, what: str, error: BaseException) -> None:
        super().__init__(what, error)
        self.what = what
        self.error = error


class _Piece(NamedTuple):
    """An entry, or the root of a definition, in the making."""

    payload: Payload
    digest: bytes
    refs: frozenset[Key]
    names: frozenset[Key]
    is_class: bool
    proof: Proof | None
    available: bool = True


class Definition(NamedTuple):
    """A callable with all the globals it can reach, as it travels to workers."""

    function_id: bytes
    function: bytes
    proof: Proof | None


class _Known(NamedTuple):
    """The definitions of one callable, by what its arguments referred to besides."""

    ref: weakref.ref[Any]
    by_keys: dict[frozenset[Key], Definition]


def _digest(*parts: bytes) -> bytes:
    hashed = blake2b(digest_size=16)
    for part in parts:
        hashed.update(part)
    return hashed.digest()


class Definitions:
    """The parent's side: makes definitions, and keeps them while they are proven.

    Threads may race here: each works on objects of its own, and puts them into
    the caches whole. The caches are bounded, since what they hold can, by a
    detour, keep alive the callable that they should only keep while it lives.
    """

    _BOUND: Final = 1024

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._pieces: dict[Key, _Piece] = {}

    def define(self, func: Any, keys: frozenset[Key]) -> Definition:
        """Return the definition of a callable whose arguments refer to these entries."""
        known = self._known.get(id(func))
        old = None
        if known is not None and known.ref() is func:
            old = known.by_keys.get(keys)
            if old is not None and _holds(old.proof):
                return old
        # A function that is met for the first time may well be met only once (a lambda
        # in a loop): a proof is made when it comes again.
        new = self._make_definition(func, keys, again=old is not None)
        if old is not None and old.function_id == new.function_id:
            new = new._replace(function=old.function)  # one copy of it is enough
        self._keep(func, keys, new)
        return new

    def _keep(self, func: Any, keys: frozenset[Key], definition: Definition) -> None:
        all_known, ident = self._known, id(func)
        known = all_known.get(ident)
        if known is None or known.ref() is not func:
            try:
                ref = weakref.ref(func, lambda _: all_known.pop(ident, None))
            except TypeError:
                return
            if len(all_known) >= self._BOUND:
                all_known.clear()
            known = all_known[ident] = _Known(ref, {})
        if len(known.by_keys) >= 16:
            known.by_keys.clear()
        known.by_keys[keys] = definition

    def _make_definition(self, func: Any, keys: frozenset[Key], again: bool) -> Definition:
        key = None if importable(func) else _key_of(func)
        try:
            # If it is a global, the proof of that entry is enough.
            root = _make_piece(func, None, proven=again and key is None)
        except _FAILURES as error:
            raise DefinitionError("", error)
        if key is not None:
            root = root._replace(proof=Proof())
        pieces = self._closure(root, keys)
        entries: list[Entry] = []
        for key in sorted(pieces, key=lambda key: (not pieces[key].is_class, key)):
            digest = pieces[key].digest
            if pieces[key].refs:
                digest = _digest(*(pieces[other].digest for other in sorted(_reach(pieces, key))))
            entries.append((*key, digest, pieces[key].payload))
        parts = [
            part
            for module, name, digest, _ in entries
            for part in (module.encode(), name.encode(), digest)
        ]
        function_id = _digest(root.digest, *parts)
        function = pickle.dumps((entries, *root.payload), 5)
        if not again and key is None:
            return Definition(function_id, function, None)
        proofs = [piece.proof for piece in (root, *pieces.values())]
        proven = [proof for proof in proofs if proof is not None]
        proof = Proof.union(proven) if len(proven) == len(proofs) else None
        return Definition(function_id, function, proof)

    def _closure(self, root: _Piece, keys: frozenset[Key]) -> dict[Key, _Piece]:
        """Return all entries that can be reached."""
        pieces: dict[Key, _Piece] = {}
        # What only methods of classes name is often not needed (the pool itself, say,
        # in the method that submits the others); so it may be missing.
        needed = [*root.refs, *root.names, *keys]
        optional: list[Key] = []
        while needed or optional:
            todo = needed or optional
            key = todo.pop()
            if key in pieces:
                continue
            piece = pieces[key] = self._piece(key, optional=todo is optional)
            todo.extend(piece.refs)
            (optional if piece.is_class else todo).extend(piece.names)
        return _grouped(pieces)

    def _piece(self, key: Key, optional: bool) -> _Piece:
        old = self._pieces.get(key)
        if old is not None and (old.available or optional) and _holds(old.proof):
            return old
        try:
            piece = _make_entry(key)
        except _FAILURES as error:
            if not optional:
                raise DefinitionError(_describe_key(key), error)
            piece = _make_unavailable(key, error)
        if piece.proof is not None:
            if len(self._pieces) >= self._BOUND:
                self._pieces.clear()
            self._pieces[key] = piece
        return piece


def _describe_key(key: Key) -> str:
    module, name = key
    if module:
        return f"the global {name!r} of {module}"
    return f"the class {getattr(_class_by_id(name), '__qualname__', name)}"


def _make_entry(key: Key) -> _Piece:
    module, name = key
    value = namespace(module).get(name, MISSING) if module else _class_by_id(name)
    if value is MISSING:
        proof = Proof()
        proof.bind([key])
        return _Piece((), b"", frozenset(), frozenset(), False, proof)
    return _make_piece(value, key)


def _make_unavailable(key: Key, error: BaseException) -> _Piece:
    value = namespace(key[0]).get(key[1], MISSING) if key[0] else MISSING
    reason = f"{_describe_key(key)} cannot be used in a worker, as it cannot be pickled: {error}"
    piece = _make_piece(Unavailable(reason), None)._replace(available=False)
    # A lock or a pool stays what it is. Something in a container may be replaced.
    kind = type(value)
    replaceable = kind in _READERS or (kind.__module__ != "builtins" and not importable(kind))
    if piece.proof is None or replaceable:
        return piece._replace(proof=None)
    piece.proof.bind([key])
    return piece


def _make_piece(value: object, key: Key | None, proven: bool = True) -> _Piece:
    # The proof comes first: what changes after it is seen at the next call.
    proof = prove(value) if proven else None
    pickler = DefinitionPickler(key)
    payload = pickler.dumps(value)
    refs = frozenset(pickler.refs)
    if proof is not None:
        proof.bind(refs if key is None else (*refs, key))
    names = frozenset(pickler.names)
    return _Piece(payload, _digest(*payload), refs, names, _is_class(value), proof)


def _reach(pieces: dict[Key, _Piece], start: Key) -> set[Key]:
    """Return the entries whose objects this one holds, and itself.

    Classes do not count. One that is sent again changes in place, so who holds it
    need not be sent again.
    """
    reached = {start}
    todo = list(pieces[start].refs)
    while todo:
        key = todo.pop()
        if key not in reached and not pieces[key].is_class:
            reached.add(key)
            todo.extend(pieces[key].refs)
    return reached


def _grouped(pieces: dict[Key, _Piece]) -> dict[Key, _Piece]:
    """Put objects that hold each other into one pickle.

    References between entries are resolved one entry at a time. A class is there
    to be referred to before its contents are, nothing else is.
    """
    holders = {key: _reach(pieces, key) for key, piece in pieces.items() if piece.refs}
    grouped = dict(pieces)
    for key, held in holders.items():
        group = sorted(other for other in held if key in holders.get(other, ()))
        if grouped[key] is not pieces[key] or not _is_cycle(pieces, key, group):
            continue
        pickler = DefinitionPickler(key, frozenset(group))
        values = tuple(namespace(module).get(name) for module, name in group)
        payload = (*pickler.dumps(values), pickle.dumps(group, 5), b"")
        for member in group:
            grouped[member] = pieces[member]._replace(
                payload=payload, digest=_digest(*payload), refs=frozenset(pickler.refs)
            )
    return grouped


def _is_cycle(pieces: dict[Key, _Piece], key: Key, group: list[Key]) -> bool:
    return not pieces[key].is_class and (len(group) > 1 or key in pieces[key].refs)
