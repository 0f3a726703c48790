"""Those of the public exceptions that a worker needs (see `errors`).

The others are kinds of `BrokenProcessPool`, and the module of that one takes longer to
import than all else that a worker imports of ours.
"""

from __future__ import annotations

from pickle import PicklingError

__all__ = ["ProtocolError", "RegistrationError", "SerializationError", "ZmqExecutorError"]


class ZmqExecutorError(Exception):
    """Base class of the exceptions defined here; catch it to catch them all."""


class RegistrationError(ZmqExecutorError, ConnectionError):
    """A worker found no master at its endpoint, or the master refused it."""


class SerializationError(ZmqExecutorError, PicklingError):
    """Something on its way to or from a worker could not be pickled or unpickled.

    The exception that stopped it is the `__cause__`.

    Attributes:
        task_raised: whether the task raised an exception, and that is what it was.
    """

    task_raised = False


class ProtocolError(ZmqExecutorError, ValueError):
    """Bytes that are not a message of the protocol, or not one expected here."""


for _error in (ZmqExecutorError, RegistrationError, SerializationError, ProtocolError):
    _error.__module__ = f"{__package__}.errors"  # where users find them
