"""How to start another interpreter that sees the same modules as this one."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from typing import Final

__all__ = ["DEEPEST", "PACKAGE", "WORKER", "python_command", "search_path", "start_path"]

PACKAGE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The directory of zmqexecutor."""
WORKER: Final = "zmqexecutor.worker.calls"
"""The module that an executor's own workers run."""

DEEPEST: Final = 6
"""How deep executors may be nested: tasks that make one, whose tasks make one, ..."""

depth = 0
"""How many executors this process is inside of; set by the code that boots a worker.
In a supervisor it is `DEEPEST`: no executor may be made there."""


def python_command(*arguments: str) -> list[str]:
    """The command that runs this in a fresh interpreter like this one.

    Args:
        arguments: what is to be run: `-c` and code, or `-m`, a module and its arguments.

    Raises:
        RuntimeError: it is not known where the interpreter is, or there is none.
    """
    if getattr(sys, "frozen", False):  # its executable is the program, which would start itself
        raise RuntimeError(
            "zmqexecutor cannot start processes in a frozen program (made by PyInstaller, for "
            "example), since there is no Python interpreter to run them. Run the program with "
            "Python, or use a ProcessPoolExecutor"
        )
    if not sys.executable:
        raise RuntimeError(
            "sys.executable is empty: set it to a Python interpreter that can import zmqexecutor"
        )
    # The flags, such as -O and -W, that decide how modules are found and compiled.
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, *arguments]


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

    What is not the standard library's or installed goes to the end: a `queue.py`
    beside the user's script must not stand for the standard library's, and would be
    run by each of our processes.
    """
    standard = {os.path.abspath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    home = os.path.dirname(PACKAGE)

    def is_users(entry: str) -> bool:
        parts = entry.split(os.sep)
        return not (
            "site-packages" in parts
            or "dist-packages" in parts
            or entry.endswith(".zip")
            or any(entry == path or entry.startswith(path + os.sep) for path in standard)
        )

    # A stable sort: what is ours may itself be among the user's, if not installed.
    path = sorted(search_path(), key=is_users)
    return path if home in path else [*path, home]
