"""What a script has imported from a module, and what is to be imported in a worker, not copied."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any, Final

from ..system.interrupts import is_interrupt
from .namespaces import MISSING, Key, importable, is_class, travels_by_value

__all__ = ["Import", "importable_as", "is_only_itself", "origin_of", "origin_of_object"]

_OF_THE_PROCESS: Final = (
    *(("os", "environ"), ("os", "environb"), ("sys", "modules"), ("sys", "flags")),
    *(("sys", name) for name in ("version_info", "implementation", "thread_info")),
    *(("sys", name) for name in ("float_info", "int_info", "hash_info")),
)
"""What tells of a process: of another one it would be wrong, or cannot be sent at all."""
_GENERATORS: Final = (("random", "_inst"), ("numpy.random.mtrand", "_rand"))
"""Where modules keep those whose methods are their functions, and the modules."""


def origin_of(value: Any) -> Key | None:
    """Return the module, and the name there, of what a copy would be of no use of.

    That are functions that draw from a module's own generator (`from random import random`),
    and what tells of the process.
    """
    kind = type(value)
    if kind is types.MethodType or kind is types.BuiltinMethodType:
        for home, generator in _GENERATORS:
            owner = getattr(sys.modules.get(home), generator, None)
            if owner is not None and value.__self__ is owner:
                return home, value.__name__
        return None
    for home, known in _OF_THE_PROCESS:
        if value is getattr(sys.modules[home], known, MISSING):
            return home, known
    return None


def importable_as(name: str, value: object) -> Key | None:
    """Return the module that has this object under this name, if there is no doubt which."""
    found = []
    for module, known in list(sys.modules.items()):
        if type(known) is not types.ModuleType or vars(known).get(name, MISSING) is not value:
            continue
        if getattr(known, "__spec__", None) is not None and not travels_by_value(module):
            found.append(module)
    home = type(value).__module__
    if home in found:
        return home, name
    if len({module.partition(".")[0] for module in found}) != 1:
        return None
    return min(found, key=len), name


def is_only_itself(value: object) -> bool:
    """Say whether an object has nothing that tells it from others, such as a `MISSING`."""
    kind = type(value)
    if kind is object:
        return True
    if (
        kind.__base__ is not object
        or "__dict__" not in vars(kind)  # builtin, or with slots
        or kind.__reduce_ex__ is not object.__reduce_ex__
        or kind.__reduce__ is not object.__reduce__
        or kind.__basicsize__ > _Empty.__basicsize__
    ):
        return False
    try:
        return not getattr(value, "__dict__", None)
    except Exception as error:
        if is_interrupt(error):
            raise
        return False


class _Empty:
    """As large as objects are that have room for attributes and for nothing else."""


def origin_of_object(key: Key, value: object) -> Key | None:
    """Where an object has been imported from that cannot be sent, if it is just an object.

    A function or class of the script, or an object of such a class, is what the script has put
    into the module.
    """
    module, name = key
    if not module or isinstance(value, types.FunctionType) or is_class(value):
        return None
    return importable_as(name, value) if importable(type(value)) else None


# --------------------------------------------------------------- references


class Import:
    """Stands for what a worker is to import, and for what it has if it cannot."""

    def __init__(self, origin: Key, value: object, otherwise: object) -> None:
        """Say so.

        Args:
            origin: where it is imported from.
            value: what is there at home.
            otherwise: what the worker has if there is nothing of that kind.
        """
        self._arguments = (*origin, _name_of_kind(value), otherwise)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _imported, self._arguments


def _imported(module: str, name: str, kind: str, otherwise: Any) -> Any:
    """What a module has under this name here, if that is of this kind."""
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception:  # it may do anything, and what it did at home may not have been to import it
        return otherwise
    return found if _name_of_kind(found) == kind else otherwise


def _name_of_kind(value: object) -> str:
    """The name of an object's class, by which two processes know that it is the same."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
