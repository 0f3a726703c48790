"""The command `keygen`."""

from __future__ import annotations

from argparse import Namespace

from ..keys import Keys, add_worker
from .exits import CommandError, Exit

__all__ = ["keygen"]


def keygen(arguments: Namespace) -> int:
    """Make the keys of a master, or of another worker."""
    try:
        if arguments.worker is None:
            made = Keys.create(arguments.directory).directory
            print(
                f"{made}: the keys of a master, and of a worker that it admits.\n"
                "On another host a worker needs its own (zmqexecutor keygen --worker NAME), or a "
                "copy of the directory."
            )
        else:
            folder = add_worker(arguments.directory, arguments.worker)
            print(
                f"{folder}: the keys of {arguments.worker}; the master admits them from now on.\n"
                "Move the folder to the host of that worker or client, as its directory of keys."
            )
    except ValueError as error:
        raise CommandError(error, Exit.USAGE) from None
    except OSError as error:
        raise CommandError(error, Exit.FAILED) from None
    return Exit.DONE
