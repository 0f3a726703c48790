"""How to start another interpreter that sees the same modules as this one."""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["python_command", "search_path", "start_path"]


def python_command(code: str) -> list[str]:
    """The command that runs this code in a fresh interpreter like this one.

    Raises:
        RuntimeError: it is not known where the interpreter is.
    """
    if not sys.executable:
        raise RuntimeError(
            "sys.executable is empty: set it to a Python interpreter that can import zmqexecutor"
        )
    # The flags, such as -O and -W, that decide how modules are found and compiled.
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-c", code]


def search_path() -> list[str]:
    """Our `sys.path` with absolute entries, for another process."""
    path = []
    for entry in sys.path:
        try:
            path.append(os.path.abspath(entry))
        except FileNotFoundError:
            pass  # relative to a current directory that has been removed
    return path


def start_path() -> list[str]:
    """The same for an interpreter that first has to import what is ours.

    The folder of the user's script goes to the end: a `queue.py` there must not
    stand for the standard library's until the user's code runs.
    """
    path = search_path()
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if path and path[0] != home:
        path.append(path.pop(0))
    return path
