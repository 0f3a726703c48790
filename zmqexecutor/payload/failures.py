"""What goes wrong with a call, to an exception that the user's process can load, and back.

Whatever an exception's own pickle does, the text of its traceback travels beside it.
"""

from __future__ import annotations

import io
import pickle
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from .picklers import ResultPickler

if TYPE_CHECKING:
    from ..worker_errors import SerializationError
    from .values import Buffer

__all__ = [
    "HINT",
    "PICKLING",
    "RUNNING",
    "UNPICKLING",
    "describe",
    "dump_exception",
    "load_exception",
    "serialization_error",
]

# How far a call had come, as messages say it; what a task raises needs none.
UNPICKLING = "The call cannot be unpickled in the worker"
RUNNING = ""
PICKLING = "The task's result cannot be pickled"

HINT = (
    "Send what it is made from (a path, a name, settings) and make it in the task, "
    "or once for each worker in an initializer."
)


class _Failure(NamedTuple):
    """The data of an outcome that is not ok, pickled as a plain tuple.

    Attributes:
        text: the traceback, as the worker saw it.
        message: if not empty, what went wrong beside the task: the exception
            is a SerializationError with this message, caused by the pickled one.
        exception: the pickled exception, or nothing if it could not be pickled.
        raised: whether the task raised it.
    """

    text: str
    message: str
    exception: bytes
    raised: bool


def describe(error: BaseException) -> str:
    """Return an exception in one line, whatever its `__str__` does."""
    try:
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    except BaseException:  # its __str__ may do anything
        return type(error).__name__


def _format(error: BaseException) -> str:
    """Return the traceback as text, without the frame of the one who caught it."""
    trace = error.__traceback__
    if trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, trace))
    except BaseException:  # memory or stack may have run out, a __str__ may do anything
        return f"{type(error).__name__}\n"


def _remote_traceback(text: str) -> Exception:
    # Not at the top: the module takes 20 ms to import, which a worker does not need.
    from concurrent.futures import process

    remote: Callable[[str], Exception] = process._RemoteTraceback  # type: ignore[assignment]
    return remote(f'\n"""\n{text}"""')


def serialization_error(message: str, error: BaseException) -> SerializationError:
    """Return a SerializationError caused by the given one.

    The cause loses its traceback, whose frames would keep arguments alive, and
    gets it as text, as a task's exception does.
    """
    from ..worker_errors import SerializationError

    if error.__cause__ is None and error.__traceback__ is not None:
        error.__cause__ = _remote_traceback(_format(error))
    error.__traceback__ = None
    wrapped = SerializationError(message)
    wrapped.__cause__ = error
    return wrapped


def dump_exception(stage: str, error: BaseException, note: Callable[[BaseException], str]) -> bytes:
    """Return the data of an outcome that is not ok. Never raises.

    Args:
        stage: how far the call had come.
        error: what was raised then; it loses its traceback.
        note: what to add, as lines, to the text of that.
    """
    text = _format(error)
    error.__traceback__ = None  # its frames hold the arguments
    text += note(error)
    message = ""
    # sys.exit() while the result is pickled is the task's own doing, like an error in it.
    if stage == UNPICKLING or (stage == PICKLING and isinstance(error, Exception)):
        message = f"{stage}: {describe(error)}."
    pickled = b""
    try:
        with io.BytesIO() as file:
            ResultPickler(file).dump(error)
            pickled = file.getvalue()
    except BaseException as problem:
        if not message:
            message = (
                f"The task raised {describe(error)}, an exception of {type(error)!r} "
                f"that cannot be pickled ({describe(problem)}). "
                f"The traceback in the worker was:\n\n{text}"
            )
    return pickle.dumps((text, message, pickled, stage == RUNNING), 5)


def load_exception(data: Buffer) -> BaseException:
    """Return the exception in the data of an outcome that is not ok. Never raises."""
    text, message, pickled, raised = _Failure(*pickle.loads(data))
    cause: BaseException = _remote_traceback(text)
    if pickled:
        try:
            error = pickle.loads(pickled)
            if not isinstance(error, BaseException):
                raise TypeError(f"unpickling made {type(error)!r} of an exception")
        except BaseException as problem:
            failure = serialization_error(
                f"The task's exception cannot be unpickled: {describe(problem)}. "
                f"The traceback in the worker was:\n\n{text}",
                problem,
            )
            failure.task_raised = raised
            return failure
        error.__cause__ = cause
        if not message:
            return error
        cause = error
    from ..worker_errors import SerializationError

    failure = SerializationError(message)
    failure.__cause__ = cause
    failure.task_raised = raised
    return failure
