"""The file by which Circus's own `circusd` runs a group of workers."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence

from ..supervision.launch import NUMBER, with_number

__all__ = ["circus_ini"]


def circus_ini(
    name: str,
    command: Sequence[str],
    numprocesses: int,
    *,
    working_dir: str,
    graceful_timeout: float,
    environment: Mapping[str, str],
) -> str:
    """A complete circus.ini with one group of processes.

    Args:
        name: for the group.
        command: exact arguments, the program first; `$WID` becomes the process's number.
        numprocesses: how many to keep alive.
        working_dir: where they run.
        graceful_timeout: seconds between SIGTERM and SIGKILL.
        environment: set for them beside what circusd's own environment has.

    Raises:
        ValueError: something cannot be written into such a file.
    """
    # Not Circus's own default, ports on which every user of the host can command it.
    control = os.path.join(os.path.expanduser("~"), f".circus-{name}")
    sections = {
        "circus": {
            "endpoint": f"ipc://{control}.ipc",
            "pubsub_endpoint": f"ipc://{control}-events.ipc",
            "multicast_endpoint": '""',  # as this reader spells an empty value
            "check_delay": "1",
        },
        f"watcher:{name}": {
            "cmd": _argument(command[0]),
            "args": " ".join(_argument(argument) for argument in command[1:]),
            "numprocesses": str(numprocesses),
            "working_dir": working_dir,
            "graceful_timeout": f"{graceful_timeout:g}",
            "copy_env": "True",
        },
        f"env:{name}": dict(environment),
    }
    lines = [
        f"# Run it:      circusd {name}.ini",
        f"# Command it:  circusctl --endpoint ipc://{control}.ipc stats",
    ]
    for section, options in sections.items():
        if options:
            lines += ["", f"[{section}]"]
            lines += [_line(key, value) for key, value in options.items()]
    return "\n".join(lines) + "\n"


def _argument(text: str) -> str:
    """Quoted for Circus, which splits as a shell does."""
    # A ";" after a space begins a comment, in quotes too; with these it comes after a quote.
    quoted = shlex.quote(text).replace(" ;", " '';")
    return with_number(quoted, NUMBER)


def _line(key: str, value: str) -> str:
    if re.search(r"[\r\n\0]|\s;", value):
        raise ValueError(f"{key} = {value!r} cannot be written into a circus.ini")
    return f"{key} = {value}"
