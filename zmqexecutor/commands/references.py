"""Functions of the user's that the command line names as `module:function`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from types import TracebackType
from typing import Any

from ..system.interpreter import PACKAGE

__all__ = ["ReferenceNameError", "UserCodeError", "add_to_path", "load", "users_traceback"]


class ReferenceNameError(Exception):
    """What the user has written names nothing."""


class UserCodeError(Exception):
    """The user's module raised when it was imported; `traceback` shows where."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback


def load(reference: str) -> Any:
    """What `module:name` or `module:name.name` refers to.

    Raises:
        ReferenceNameError: it is malformed, or there is no such module or name.
        UserCodeError: the module is there, and its import fails.
    """
    module_name, _, path = reference.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")]):
        raise ReferenceNameError(f"{reference!r}: expected MODULE:FUNCTION, such as shapes:square")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Not one that the user's module wants to import.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _broken(module_name, error) from None
        raise ReferenceNameError(
            f"{reference!r}: there is no module {error.name!r} in {os.getcwd()}, where it was "
            "looked for first, nor elsewhere on the module search path; --directory names "
            "another place"
        ) from None
    except (Exception, SystemExit) as error:
        raise _broken(module_name, error) from None
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            near = difflib.get_close_matches(name, dir(found), 1)
            hint = f"; do you mean {near[0]!r}?" if near else ""
            raise ReferenceNameError(f"{reference!r}: there is no {name!r} in it{hint}") from None
    return found


def _broken(name: str, error: BaseException) -> UserCodeError:
    return UserCodeError(f"the module {name!r} cannot be imported", users_traceback(error))


def users_traceback(error: BaseException) -> str:
    """The traceback of an error in the user's code, without what called that."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and _is_ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


def _is_ours(filename: str) -> bool:
    return (
        os.path.abspath(filename).startswith(PACKAGE + os.sep)
        or filename.startswith("<frozen importlib")
        or filename == importlib.__file__
    )


def add_to_path(directory: str) -> None:
    """Have modules be looked for there first."""
    if directory not in sys.path[:1]:
        sys.path.insert(0, directory)
