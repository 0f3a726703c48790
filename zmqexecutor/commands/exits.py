"""How commands end."""

from __future__ import annotations

import enum

__all__ = ["EXIT_CODES", "CommandError", "Exit"]


class Exit(enum.IntEnum):
    """The exit codes of the command line."""

    DONE = 0
    FAILED = 1
    USAGE = 2  # argparse's, too
    NO_MASTER = 3
    NO_WORKER = 4
    TIMEOUT = 5
    WORKER_LOST = 6
    INTERRUPTED = 130


EXIT_CODES = """\
exit codes:
  0    done; a worker or group was asked to end (SIGTERM, Ctrl-C), or let go
  1    the job failed; another failure, which the message names
  2    the command line cannot be meant
  3    no master was found at the endpoint, or it went away, or it refused us
  4    no worker for the service came while the master waited for one
  5    no result within --timeout
  6    the worker died while it ran the job
  130  interrupted
"""


class CommandError(Exception):
    """Ends the command with a message and this exit code."""

    def __init__(self, message: object, code: Exit) -> None:
        super().__init__(str(message))
        self.code = code
