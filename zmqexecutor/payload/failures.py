"""What goes wrong with a call, to an exception that the user's process can load, and back.

Whatever an exception's own pickle does, the text of its traceback travels beside it.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import traceback
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..worker_errors import SerializationError
from .byvalue import Reduced
from .picklers import ResultPickler

if TYPE_CHECKING:
    from .values import Buffer

__all__ = [
    "HINT",
    "HINT_FOR_CLASSES",
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
HINT_FOR_CLASSES = "Move it to a module, which workers can import: then only its name is sent."


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


_name_of: Final = vars(type)["__name__"].__get__
"""The name of an exception's class, whatever its metaclass makes of it."""


def describe(error: BaseException) -> str:
    """Return an exception in one line, whatever its `__str__` does."""
    name: str = _name_of(type(error))
    try:
        return f"{name}: {error}" if str(error) else name
    except BaseException:  # its __str__ may do anything
        return name


def _format(error: BaseException) -> str:
    """Return the traceback as text, without the frame of the one who caught it."""
    try:
        trace = error.__traceback__
        if trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        return "".join(traceback.format_exception(type(error), error, trace))
    except BaseException:  # memory or stack may have run out, a __str__ may do anything
        return f"{_name_of(type(error))}\n"


def _remote_traceback(text: str) -> Exception:
    # Not at the top: the module takes 20 ms to import, which a worker does not need.
    from concurrent.futures import process

    remote: Callable[[str], Exception] = process._RemoteTraceback  # type: ignore[assignment]
    return remote(f'\n"""\n{text}"""')


# Past what an exception's own class makes of `__setattr__`: a frozen dataclass refuses.
_set_cause: Final = vars(BaseException)["__cause__"].__set__
_set_args: Final = vars(BaseException)["args"].__set__


def _drop_traceback(error: BaseException) -> None:
    BaseException.with_traceback(error, None)


def serialization_error(message: str, error: BaseException) -> SerializationError:
    """Return a SerializationError caused by the given one.

    The cause loses its traceback, whose frames would keep arguments alive, and
    gets it as text, as a task's exception does.
    """
    if error.__cause__ is None and error.__traceback__ is not None:
        _set_cause(error, _remote_traceback(_format(error)))
    _drop_traceback(error)
    wrapped = SerializationError(message)
    wrapped.__cause__ = error
    return wrapped


def _set_attributes(error: BaseException, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        BaseException.__setattr__(error, name, value)


def _make_exception(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """Make an exception as pickle does, even if its `__init__` wants other arguments."""
    try:
        error = kind(*args)
    except Exception:
        error = kind.__new__(kind, *args)
        inits = (vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base))
        next(init for init in inits if not _is_code(init))(error, *args)
    if kind.__reduce__ is BaseException.__reduce__:
        _set_args(error, args)  # of which `__init__` may have made others
    return error


def _is_code(method: object) -> bool:
    return isinstance(method, FunctionType)


def _is_built_by_init(kind: type) -> bool:
    """Whether pickle would call an `__init__` that may know nothing of it."""
    return (
        issubclass(kind, BaseException)
        and _is_code(kind.__init__)
        and not _is_code(kind.__reduce__)
        and not _is_code(kind.__reduce_ex__)
        and kind not in copyreg.dispatch_table
    )


def _is_guarded(kind: type) -> bool:
    """Whether a `__setattr__` stands in the way of what pickle does with such exceptions."""
    return (
        issubclass(kind, BaseException)
        and kind.__setattr__ is not BaseException.__setattr__
        and kind.__setstate__ is BaseException.__setstate__
        and kind not in copyreg.dispatch_table
    )


class _ExceptionPickler(ResultPickler):
    """The worker's pickler of what was raised: its type and message are worth the most."""

    def reducer_override(self, obj: Any) -> Reduced:
        """As in results; but text for what Python's own exceptions hold and cannot be pickled."""
        kind = type(obj)
        if kind is ContextVar or kind is weakref.ref:  # of a LookupError, a KeyError
            return str, (repr(obj),)
        reduced = super().reducer_override(obj)
        guarded = _is_guarded(kind)
        if reduced is NotImplemented and (guarded or _is_built_by_init(kind)):
            reduced = obj.__reduce_ex__(5)
            if not isinstance(reduced, tuple):
                return reduced
            if reduced[0] is kind and _is_built_by_init(kind):
                reduced = (_make_exception, reduced[:2], *reduced[2:])
            if guarded and len(reduced) == 3 and isinstance(reduced[2], dict):
                return *reduced, None, None, _set_attributes
        return reduced


def dump_exception(stage: str, error: BaseException, note: Callable[[BaseException], str]) -> bytes:
    """Return the data of an outcome that is not ok. Never raises.

    Args:
        stage: how far the call had come.
        error: what was raised then; it loses its traceback.
        note: what to add, as lines, to the text of that; never raises.
    """
    text = _format(error)
    _drop_traceback(error)  # its frames hold the arguments
    text += note(error)
    message = ""
    # sys.exit() while the result is pickled is the task's own doing, like an error in it.
    if stage == UNPICKLING or (stage == PICKLING and isinstance(error, Exception)):
        message = f"{stage}: {describe(error)}."
        # A module that the worker imports may use an executor, whose worker imports it too, ...
        if type(error) is SerializationError and str(error).startswith(stage):
            message = str(error)
    pickled = b""
    try:
        with io.BytesIO() as file:
            _ExceptionPickler(file).dump(error)
            pickled = file.getvalue()
    except BaseException as problem:
        if not message:
            message = (
                f"The task raised {describe(error)}, an exception of {type.__repr__(type(error))} "
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
                raise TypeError(f"unpickling made {type.__repr__(type(error))} of an exception")
        except BaseException as problem:
            failure = serialization_error(
                f"The task's exception cannot be unpickled: {describe(problem)}. "
                f"The traceback in the worker was:\n\n{text}",
                problem,
            )
            failure.task_raised = raised
            return failure
        _set_cause(error, cause)
        if not message:
            return error
        cause = error
    failure = SerializationError(message)
    failure.__cause__ = cause
    failure.task_raised = raised
    return failure
