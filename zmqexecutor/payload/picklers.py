"""The picklers: values as pickle has them, code as `byvalue` does it, entries by reference.

    ValuePickler            by value what the other side cannot import
      ArgumentPickler       the parent's, of arguments: functions and classes of the
        │                   script are references, which a worker resolves by name
        DefinitionPickler   the parent's, of one entry: whatever another global is
                            bound to is a reference
      ResultPickler         the worker's: what came from the parent goes back as a
                            reference

A pickler notes what its pickle refers to (`refs`), and which globals the code in it
uses (`names`): so much more has to be there before it can be used.
"""

from __future__ import annotations

import functools
import io
import pickle
import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from cloudpickle import cloudpickle as cp

from . import byvalue, reducers
from .bulk import Outside
from .byvalue import Reduced, arrived, lookup
from .enums import reduce_enum
from .namespaces import (
    BASE_NAMES,
    MAIN,
    Key,
    Payload,
    code_globals,
    home_of,
    homes,
    id_of_class,
    importable,
    is_class,
    is_dynamic,
    module_of,
    namespace,
    travels_by_value,
)
from .shares import Share, SharedObject, take
from .unavailable import Unavailable

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

__all__ = [
    "ArgumentPickler",
    "DefinitionPickler",
    "ResultPickler",
    "ValuePickler",
    "bound_objects",
    "find_key",
    "global_of",
]

_OURS: Final = vars(byvalue)


class ValuePickler(pickle.Pickler, ABC):
    """Pickles by value what the other side cannot import.

    Attributes:
        by_value: whether anything that is sent by value was met.
        ordinary: classes that were met whose instances are left to pickle. What is told of
            a class may change between two pickles.
        refs: entries whose objects the pickle refers to.
        names: globals that code in the pickle uses.
    """

    # It has no `dispatch_table`, since `reducers.reduce` is asked; so pickle looks into copyreg's.
    _finish_class = staticmethod(byvalue.set_class_state)
    _as_is = False
    """Whether read-only arrays stay so."""

    def __init__(
        self,
        file: SupportsWrite[bytes],
        buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None,
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffer_callback)
        self.by_value = False
        self.ordinary: set[type] = set()
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
        if kind in self.ordinary:
            return NotImplemented  # at once: of these there may be many
        make: Callable[[Any], Reduced]
        if kind is types.FunctionType:
            if obj.__globals__ is _OURS or importable(obj):
                return NotImplemented
            make = self._function_by_value
        elif issubclass(kind, type):
            if obj.__module__ == "builtins":
                return cp._class_reduce(obj)  # some have no name there, such as NoneType
            if importable(obj):
                return NotImplemented
            make = self._class_by_value
        elif kind is functools._lru_cache_wrapper and not importable(obj):
            make = reducers.reduce_lru_cache
        elif kind is SharedObject:
            return self._share(obj)
        else:
            reduced = reducers.reduce(obj, as_is=self._as_is)
            if reduced is NotImplemented:
                if reducers.is_ordinary(kind):
                    self.ordinary.add(kind)
                elif reducers.is_proxy(kind):
                    self._hold(obj)
            return reduced
        self.by_value = True
        reference = self.reference(obj)
        return make(obj) if reference is None else reference

    @abstractmethod
    def reference(self, obj: Any) -> Reduced | None:
        """Return a reference to the entry this object is, or None if it is none."""

    def _hold(self, _proxy: object) -> None:
        pass

    def _share(self, _handle: SharedObject[Any]) -> Reduced:
        return NotImplemented  # so that it tells itself where it may be

    def _function_by_value(self, func: types.FunctionType) -> Reduced:
        if func.__code__ is reducers.SINGLEDISPATCH_CODE:
            return reducers.reduce_singledispatch(func)
        state, slots = cp._function_getstate(func)
        used = slots.pop("__globals__")
        closure = slots.pop("__closure__")
        if parameters := getattr(func, "__type_params__", ()):
            slots["__type_params__"] = parameters  # since Python 3.12; cloudpickle forgets them
        if not slots["_cloudpickle_submodules"]:
            del slots["_cloudpickle_submodules"]
        home = home_of(func.__globals__)
        own = None
        shared = home is not None and travels_by_value(home)
        if home is None:
            own = self._copied_globals(func.__globals__)
        else:
            # What pytest makes of `assert` uses names that no module has by itself, nor a source.
            used = {} if shared else {name: used[name] for name in used if name.startswith("@")}
            if shared:
                names = code_globals(func.__code__) | BASE_NAMES.intersection(func.__globals__)
                self.names.update([(home, name) for name in names])
        args = (func.__code__, home, shared, own, closure)
        contents = state, slots, used
        return byvalue.make_function, args, contents, None, None, byvalue.set_function_state

    def _copied_globals(self, globals_: dict[str, Any]) -> dict[str, Any]:
        known = self._own_globals.get(id(globals_))
        if known is None:
            base = ("__name__", *BASE_NAMES)
            known = {name: globals_[name] for name in base if name in globals_}
            self._own_globals[id(globals_)] = known
        return known

    def _class_by_value(self, cls: type) -> Reduced:
        reduced = reduce_enum(cls) if issubclass(cls, Enum) else cp._dynamic_class_reduce(cls)
        maker, args, (attributes, *others), *_ = reduced
        if "__slots__" in attributes and not issubclass(cls, (tuple, Enum)):
            args[3]["__slots__"] = attributes["__slots__"]  # too late as an attribute
        if maker is cp._make_skeleton_class:
            maker = byvalue.make_skeleton
        # Written into a class when its first instance is pickled, or when someone asks
        # for annotations: not a change that should reach the worker.
        attributes.pop("__slotnames__", None)
        if not attributes.get("__annotations__", True):
            del attributes["__annotations__"]
        if cls.__qualname__ != cls.__name__:
            attributes["__qualname__"] = cls.__qualname__  # cloudpickle forgets it
        contents = attributes, *others
        return byvalue.make_class, (maker, args), contents, None, None, self._finish_class


class ArgumentPickler(ValuePickler):
    """The parent's pickler of arguments: values, but functions and classes by reference.

    Attributes:
        shares: what the handles in the pickle stand for, by key.
        proxies: of multiprocessing's managers, without which the pickle is of no use.
    """

    _keys: dict[int, Key] | None = None

    def __init__(
        self,
        file: SupportsWrite[bytes],
        buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None,
    ) -> None:
        super().__init__(file, buffer_callback)
        self.shares: dict[bytes, Share] = {}
        self.proxies: list[object] = []

    def take_shares(self) -> tuple[Share, ...]:
        """Return the shares that were met, and forget them."""
        shares = tuple(self.shares.values())
        self.shares.clear()
        return shares

    def take_proxies(self) -> tuple[object, ...]:
        """Return the proxies that were met, and forget them."""
        proxies = tuple(self.proxies)
        self.proxies.clear()
        return proxies

    def _hold(self, proxy: object) -> None:
        self.proxies.append(proxy)

    def _share(self, handle: SharedObject[Any]) -> Reduced:
        share = handle._share
        for needed in (*share.needs, share):
            self.shares[needed.key] = needed
        if share.keys:
            self.by_value = True
            self.refs |= share.keys
        return take, (share.key,)

    def reset(self) -> None:
        """Forget all that was pickled, so that nothing of it is kept alive."""
        super().reset()
        self._keys = None

    def reference(self, obj: Any) -> Reduced | None:
        """Refer to the entry that the object is, unless it belongs into this pickle."""
        key = self.key_of(obj)
        tracker_id = id_of_class(obj) if is_class(obj) else None
        if key is None and tracker_id is not None:
            key = ("", tracker_id)
        if key is None or self._is_inside(key):
            return None
        self.refs.add(key)
        return lookup, (*key, tracker_id)

    def _is_inside(self, _key: Key) -> bool:
        return False

    def key_of(self, obj: Any) -> Key | None:
        """Return the global that is bound to this object, or None."""
        if self._keys is None and (type(obj) is types.FunctionType or is_class(obj)):
            return find_key(obj)  # cheaper than the map, for the few there are
        if self._keys is None:
            self._keys = bound_objects()
        key = self._keys.get(id(obj))
        if key is not None and namespace(key[0]).get(key[1]) is obj:
            return key
        return None


def _has_own_name(obj: Any) -> bool:
    """Whether it is a function or class that `find_key` finds by its own name."""
    if type(obj) is not types.FunctionType and not is_class(obj):
        return False
    home = module_of(obj)
    return travels_by_value(home) and namespace(home).get(obj.__qualname__) is obj


def find_key(obj: Any) -> Key | None:
    """Return the global that is bound to a callable, or None."""
    home, name = module_of(obj), getattr(obj, "__qualname__", "")
    if not travels_by_value(home):
        home = MAIN
    elif namespace(home).get(name) is obj:
        return home, name
    for bound, value in list(namespace(home).items()):
        if value is obj:
            return home, bound
    return None


def global_of(func: Any) -> Key | None:
    """Return the global that a task calls, or None if it calls a value.

    A value is what no global is bound to, and any object that is no function or class.
    """
    if not (isinstance(func, (types.FunctionType, functools._lru_cache_wrapper)) or is_class(func)):
        return None
    return None if importable(func) else find_key(func)


def bound_objects() -> dict[int, Key]:
    """Map the ids of all objects that globals are bound to; of two names the first counts."""
    return {
        id(value): (home, name)
        for home in homes()
        for name, value in reversed(list(namespace(home).items()))
    }


class DefinitionPickler(ArgumentPickler):
    """The parent's pickler of entries and callables.

    In an entry, every object that a global is bound to is a reference. A callable
    that is not bound to a global may hold such objects, too. They are values, as
    arguments are: the worker's global may by now be bound to something else.

    Attributes:
        outside: takes large buffers out of the pickle.
        inlined: ids of objects that the pickle has in it, and that would be references if
            another global were bound to them.
    """

    _as_is = True
    _is_bound = False
    """Whether a global is bound to the callable."""

    def __init__(self, root: Key | None, inline: frozenset[Key] = frozenset()) -> None:
        self._file = io.BytesIO()
        self.outside = Outside(closed=bool(inline))
        super().__init__(self._file, self.outside)
        self._root = root
        self._inline = inline
        self._inside_class = False
        self.inlined: set[int] = set()

    def reference(self, obj: Any) -> Reduced | None:
        """As in arguments; what is no reference is noted."""
        reference = super().reference(obj)
        if reference is None and not _has_own_name(obj):
            self.inlined.add(id(obj))
        return reference

    def dumps(self, value: Any) -> Payload:
        """Pickle a value, or an ordinary class in two parts."""
        root = self._root
        if root is None:
            # A function that is bound to one is a reference.
            self._is_bound = not isinstance(value, types.FunctionType) and bool(self.key_of(value))
        elif (
            is_class(value)
            and is_dynamic(value)
            and not issubclass(value, Enum)
            and self.key_of(value) in (None, root)
        ):
            return self._dump_class(value, root)
        self.dump(value)
        return (self._file.getvalue(),)

    def _dump_class(self, cls: type, root: Key) -> Payload:
        self.outside.closed = True
        _, parts, contents, *_ = self._class_by_value(cls)
        self.dump(parts)
        size = self._file.tell()
        self.clear_memo()
        self._inside_class = True  # its contents refer to the class itself
        self.dump(contents)
        self.refs.discard(root)
        pickled = self._file.getvalue()
        return pickled[:size], pickled[size:]

    def _share(self, _handle: SharedObject[Any]) -> Reduced:
        return NotImplemented  # a definition outlives the call, and would keep it

    def _is_inside(self, key: Key) -> bool:
        return key in self._inline or (key == self._root and not self._inside_class)

    def reducer_override(self, obj: Any) -> Reduced:
        """As in arguments; but instances that a global is bound to may be references too.

        A lock that guards globals of the script becomes a new one, which guards
        those of the worker. Among arguments it would be a mistake, and is an error.
        """
        kind = type(obj)
        if kind is types.FunctionType or issubclass(kind, type):
            return super().reducer_override(obj)
        if kind is types.CodeType or kind is types.CellType:
            return reducers.reduce(obj)
        if isinstance(obj, types.ModuleType):
            return cp._module_reduce(obj)
        if kind not in self.ordinary and reducers.is_executor(kind):
            # It is beside what a task needs, in a class or a function.
            return Unavailable, (
                f"a {kind.__qualname__} cannot be used in a worker. A task may make one of its own",
            )
        if self._root is None:
            if self._is_bound and kind in reducers.GUARDS:
                return reducers.GUARDS[kind](obj)
            return super().reducer_override(obj)
        if self._keys is None:
            self._keys = bound_objects()
        if id(obj) in self._keys and (reference := self.reference(obj)) is not None:
            return reference
        self.inlined.add(id(obj))
        if kind in self.ordinary:
            return NotImplemented
        if kind in reducers.GUARDS:
            return reducers.GUARDS[kind](obj)
        reduced = reducers.reduce(obj, as_is=True)
        if reduced is NotImplemented and reducers.is_ordinary(kind):
            self.ordinary.add(kind)
        return reduced


class ResultPickler(ValuePickler):
    """The worker's pickler: what came from the parent goes back as a reference."""

    _finish_class = staticmethod(byvalue.set_new_class_state)

    def reference(self, obj: Any) -> Reduced | None:
        """Refer to what the parent sent under a name that still leads to it."""
        if obj not in arrived or "<locals>" in obj.__qualname__:
            return None
        home, name = module_of(obj), obj.__qualname__
        if is_class(obj):
            return (lookup, (home, name, id_of_class(obj))) if travels_by_value(home) else None
        if travels_by_value(home) and namespace(home).get(name) is obj:
            return lookup, (home, name)
        return None
