"""Where code lives: which code travels by value, and the globals it shares.

Code of `__main__`, and of modules given to `cloudpickle.register_pickle_by_value`,
travels by value, since a worker cannot import it. All code of one such module has
one dict of globals, in the parent as in a worker. Everything else is left to be
imported by its name on the other side.
"""

from __future__ import annotations

import builtins
import dis
import sys
import types
import weakref
from typing import Any, Final, TypeAlias

from cloudpickle import cloudpickle as cp

from ..system.interrupts import is_interrupt

__all__ = [
    "BASE_NAMES",
    "MAIN",
    "MISSING",
    "Entry",
    "Key",
    "Payload",
    "bound_to",
    "class_by_id",
    "code_globals",
    "home_of",
    "homes",
    "id_of_class",
    "importable",
    "is_class",
    "is_dynamic",
    "make_namespace",
    "module_of",
    "name_of",
    "namespace",
    "travels_by_value",
]

Key: TypeAlias = tuple[str, str]
"""A module and the name of a global of it; or "" and the id of a class without one."""

Payload: TypeAlias = tuple[bytes, ...]
"""A pickled value; or a class in two pickles, what it is made of and its contents; or the
values of several globals that hold each other, their keys, and b""; or nothing, which
says that there is no such global."""

Entry: TypeAlias = tuple[str, str, bytes, Payload]
"""Module, name, digest and payload."""

MISSING: Final = object()
"""Stands for the value of a global that does not exist."""

MAIN: Final = "__main__"

_ERRORS: Final = f"{__name__.partition('.')[0]}.errors"

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
    """Return the one dict of globals that all code of this module shares here.

    If there is none, an empty dict, which belongs to nothing.
    """
    if module == MAIN or module == "__mp_main__":
        return sys.modules[MAIN].__dict__
    known = _namespaces.get(module)
    if known is not None:
        return known
    if module in sys.modules and travels_by_value(module):
        return sys.modules[module].__dict__
    return {}


def make_namespace(module: str) -> dict[str, Any]:
    """Return the same; if there is none, make it, since code of that module has arrived."""
    known = namespace(module)
    if known:
        return known
    return _namespaces.setdefault(module, {"__name__": module, "__builtins__": builtins.__dict__})


def homes() -> list[str]:
    """Return the modules whose code travels by value, `__main__` first."""
    found = [MAIN, *_namespaces]
    if cp._PICKLE_BY_VALUE_MODULES:
        found += [name for name in list(sys.modules) if travels_by_value(name)]
    return [name for name in dict.fromkeys(found) if name != "__mp_main__"]


def is_class(obj: object) -> bool:
    """Say whether this is a class."""
    return issubclass(type(obj), type)  # isinstance takes list[int] for one in Python 3.10


def module_of(obj: Any) -> str:
    """Return the name of the module a function or class is of, or ""."""
    # A child of multiprocessing knows the script by two names.
    module: object = getattr(obj, "__module__", None)
    return MAIN if module == "__mp_main__" else module if isinstance(module, str) else ""


def name_of(func: Any) -> str:
    """What a callable is called."""
    try:
        name = getattr(func, "__qualname__", None)
    except Exception as error:  # of a `__getattr__` of its own
        if is_interrupt(error):
            raise
        name = None
    return name if isinstance(name, str) and name else type(func).__qualname__


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
    try:
        module = getattr(obj, "__module__", None)
        name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    except Exception as error:  # of a `__getattr__` of its own
        if is_interrupt(error):
            raise
        return False
    if module == "__mp_main__" or not name or not isinstance(name, str):
        return False
    if module == _ERRORS:
        return True  # though a worker has not imported it, until pickle does
    if (
        isinstance(module, str)
        and module != MAIN
        and "." not in name
        and not cp._PICKLE_BY_VALUE_MODULES
    ):
        # What cloudpickle would find, for most objects in a third of the time.
        home = sys.modules.get(module)
        if type(home) is types.ModuleType and vars(home).get(name) is obj:
            return True
    found = cp._lookup_module_and_qualname(obj, name=name)
    return found is not None and not cp._is_registered_pickle_by_value(found[0])


def is_dynamic(cls: type) -> bool:
    """Say whether a class travels by value."""
    # Types of builtins that have no name there, such as NoneType, are left to cloudpickle.
    return cls.__module__ != "builtins" and not importable(cls)


_GLOBAL_OPS: Final = frozenset(
    ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
)
# Names the interpreter gives every namespace, which are each side's own.
_OWN_NAMES: Final = frozenset(("__name__", "__builtins__"))
# What code needs to find its files and to import relatively, whether it names it or not.
BASE_NAMES: Final = frozenset(("__file__", "__package__", "__path__"))

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


def class_by_id(tracker_id: str) -> type | None:
    """Return the class that has this id here, or None."""
    found: type | None = cp._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker_id)
    return found


def bound_to(key: Key) -> object:
    """Return what this global is bound to here, or the class; None if there is nothing."""
    module, name = key
    return namespace(module).get(name) if module else class_by_id(name)


def id_of_class(cls: type) -> str:
    """Return the id by which both sides know a class that travels by value."""
    tracker_id: str = cp._get_or_create_tracker_id(cls)
    return tracker_id
