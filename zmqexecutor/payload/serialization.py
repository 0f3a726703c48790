"""Callables, arguments, results and exceptions, to payloads and back.

This is the only place that knows what is inside a payload. How code of the script
gets into one is told in `definitions`. Master and worker carry bytes:

    the user's process                                a worker
    CallPickler.dump_call(fn, args, kwargs)
      function_id  16 bytes, names the function
      function     the definition of fn      ───────► CallRunner.load_function
                   (once for each worker)
      data         (args, kwargs)            ───────► CallRunner.run ──► fn(*args, **kwargs)
      buffers      big arrays                                              │
    CallPickler.load_outcome                 ◄─────── Outcome ◄────────────┘
      the result, or raises                           ok, data, buffers

- A *definition* is a pickled callable with the globals of the script that it can
  reach. It has the digest of its content as its id, travels once to each worker,
  and is unpickled there before its first call.
- *Data* is a plain pickle, which `pickle.loads` reads at C speed. Numbers and short
  text alone are marshalled instead, in a third of the time: the arguments if there are
  no kwargs, or the result. Both ends are of the same version of Python.
- *Buffers* are the memory of big arrays (pickle protocol 5), at least 32 KiB each, 192 in
  results; what is smaller stays in the data. One byte for each buffer, after the pickle in
  the data, says whether it is read-only. Arguments are copied when the call is
  made: the caller may go on to change them. Results are not: send them before
  the next call runs.
- A pickle that is itself that big, of big bytes for example, is the first buffer, and
  the data is empty.
- Where there are `Segments`, buffers are copied into one of them, results too.
- Every failure ends up as the outcome of its call, an exception that the user's
  process can load whatever its own pickle does: the text of the traceback
  travels beside it.
"""

from __future__ import annotations

import functools
import io
import marshal
import pickle
import traceback
import types
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

import msgspec

from ..wire.buffers import IN_SEGMENT, Lease, Segments
from . import shares
from .bindings import Received
from .definitions import Definition, DefinitionError, Definitions
from .namespaces import Entry, Key
from .packing import Packer
from .picklers import ArgumentPickler, ResultPickler, ValuePickler
from .shares import Contents, Share

if TYPE_CHECKING:
    from ..wire.protocol import Result, Segment, Shared
    from ..worker_errors import SerializationError

__all__ = ["OUT_OF_BAND", "Buffer", "Call", "CallPickler", "CallRunner", "Outcome"]

OUT_OF_BAND: Final = 32 * 1024
"""Buffers of arguments of at least this many bytes travel beside the data, not in it."""
RESULT_OUT_OF_BAND: Final = 192 * 1024
"""The same for results. What is smaller arrives sooner in the data, which a journal takes."""

Buffer = bytes | bytearray | memoryview
"""What buffers may be when they arrive. Read-only ones are copied where an array
has to be writable; writable ones are used in place, so their giver gives them up."""

_FEW_OBJECTS: Final = 4096
"""Bytes of a pickle that has no more objects than a pickler forgets at little cost."""
_NO_KEYS: frozenset[Key] = frozenset()


class Call(msgspec.Struct, frozen=True):
    """A call, ready to be sent: what `CallRunner` needs."""

    shared: Shared
    """The definition of the function, by its id."""
    data: bytes
    buffers: Sequence[memoryview] = ()
    lease: Lease | None = None
    shares: tuple[Share, ...] = ()
    """Shared objects that it uses, which `CallRunner.load_share` has to know."""

    @property
    def nbytes(self) -> int:
        """How much has to be sent, without what is in a segment or known."""
        return len(self.data) + sum(view.nbytes for view in self.buffers)


class Outcome(msgspec.Struct, frozen=True):
    """What became of a call: a result if ok, else an exception."""

    ok: bool
    data: bytes
    buffers: Sequence[memoryview] = ()
    segment: Segment | None = None


class _Packed(msgspec.Struct, frozen=True):
    """A pickle and its buffers: in `segment`, if there is one."""

    data: bytes
    buffers: Sequence[memoryview] = ()
    segment: Segment | None = None


class _Arguments(msgspec.Struct, frozen=True):
    """A call's arguments: their pickle, the lease on its segment, what they refer to."""

    data: bytes
    buffers: Sequence[memoryview] = ()
    lease: Lease | None = None
    keys: frozenset[Key] = _NO_KEYS
    shares: tuple[Share, ...] = ()


_NUMBERS: Final = frozenset((int, float, complex, bool, type(None)))
_TEXT: Final = frozenset((str, bytes))
_SHORT_TEXT: Final = 10_000
"""Characters or bytes; longer text is pickled, and may travel beside the data."""
_PICKLED: Final = (b"\x80", b"")
"""How data begins that was not marshalled. The pickle may be beside it."""


def _are_plain(values: tuple[object, ...]) -> bool:
    """Whether they are marshalled: exactly of types that hold nothing else."""
    for value in values:
        kind = type(value)
        if kind not in _NUMBERS and (kind not in _TEXT or len(value) >= _SHORT_TEXT):  # type: ignore[arg-type]
            return False
    return True


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


# ---------------------------------------------------------------------- buffers


def _snapshot(view: memoryview) -> memoryview:
    owner: Any = view.obj
    while owner is not None and not isinstance(owner, bytes):
        owner = getattr(owner, "base", None)  # an array made over bytes, say
    return view if owner is not None else memoryview(bytes(view))


def _loads(data: Buffer, buffers: Sequence[Buffer]) -> Any:
    if not data and buffers:
        data, *buffers = buffers
    if not buffers:
        return pickle.loads(data)
    # Flags of read-only buffers follow the pickle, which ends where it says so.
    flags = bytes(data[-len(buffers) :])
    return pickle.loads(
        data,
        buffers=[
            memoryview(buffer).toreadonly() if readonly else _writable(buffer)
            for buffer, readonly in zip(buffers, flags, strict=True)
        ],
    )


def _writable(buffer: Buffer) -> Buffer:
    return bytearray(buffer) if memoryview(buffer).readonly else buffer


def _take_buffer(into: list[memoryview], least: int, buffer: pickle.PickleBuffer) -> bool:
    view = buffer.raw()
    if view.nbytes < least:
        return True  # keep it in the data
    into.append(view)
    return False


def _take_any_buffer(into: list[memoryview], buffer: pickle.PickleBuffer) -> bool:
    # Small ones too: what is beside the pickle is read-only for those who share it.
    view = buffer.raw()
    if not view.nbytes:
        return True
    into.append(view)
    return False


class _Pieces:
    """What a pickler writes to. A pickle of less than 64 KiB is one piece.

    Big bytes are a piece as they are: they are not copied before they go into a segment.
    """

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, piece: bytes | bytearray | pickle.PickleBuffer) -> None:
        # Of a bytearray the size is in the pickle already, and another thread may change it;
        # a smaller array comes as a PickleBuffer.
        self.pieces.append(piece if isinstance(piece, bytes) else bytes(piece))


_P = TypeVar("_P", bound=ValuePickler)


class _ReusedPickler(Generic[_P]):
    """A pickler that is made once; making one costs more than pickling (1, "a").

    After an exception it is not used again, nor once it was used for many objects: the
    table in which it notes what it has seen keeps its size, and to clear a large one
    would cost every later call more than a new pickler does. Between two uses it keeps
    nothing.
    """

    reusable = True

    def __init__(
        self,
        kind: Callable[[_Pieces, Callable[[pickle.PickleBuffer], bool]], _P],
        out_of_band: int,
        *,
        copy: bool,
    ) -> None:
        file = _Pieces()
        self._pieces = file.pieces
        self._buffers: list[memoryview] = []
        self._out_of_band = out_of_band
        self._copy = copy
        self.pickler = kind(file, functools.partial(_take_buffer, self._buffers, out_of_band))
        self._dump = self.pickler.dump
        self._clear_memo = self.pickler.clear_memo

    def dumps(self, obj: object, segments: Segments | None = None) -> _Packed:
        """Pickle an object; `take_keys` has to follow."""
        pieces = self._pieces
        self._dump(obj)
        self.reusable = len(pieces) == 1 and len(pieces[0]) <= _FEW_OBJECTS
        if self._buffers or len(pieces) > 1 or len(pieces[0]) >= self._out_of_band:
            packed = self._pack(segments)
        else:
            packed = _Packed(pieces[0])
        if self.reusable:
            self._clear_memo()
        pieces.clear()
        return packed

    def _pack(self, segments: Segments | None) -> _Packed:
        pieces, views = self._pieces, self._buffers[:]
        self._buffers.clear()
        pieces.append(bytes(view.readonly for view in views))
        size = sum(map(len, pieces))
        beside = size >= self._out_of_band
        total = sum(view.nbytes for view in views) + (size if beside else 0)
        if segments is not None and total >= IN_SEGMENT:
            segment = segments.store(views, first=pieces if beside else ())
            if segment is not None:
                return _Packed(b"" if beside else b"".join(pieces), (), segment)
        if self._copy:
            views = [_snapshot(view) for view in views]
        pickled = b"".join(pieces)
        return _Packed(b"", [memoryview(pickled), *views]) if beside else _Packed(pickled, views)

    def take_keys(self) -> frozenset[Key]:
        """Return what the last pickle refers to, and forget it."""
        pickler = self.pickler
        if not pickler.by_value:
            return _NO_KEYS
        keys = frozenset(pickler.refs | pickler.names)
        pickler.reset()
        return keys


# --------------------------------------------------------------- exceptions


def _describe(error: BaseException) -> str:
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


def _serialization_error(message: str, error: BaseException) -> SerializationError:
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


_HINT = (
    "Send what it is made from (a path, a name, settings) and make it in the task, "
    "or once for each worker in an initializer."
)

# ------------------------------------------------------------------- the parent


class CallPickler:
    """The side that submits: calls out, outcomes in. Many threads may use it at once."""

    def __init__(self, segments: Segments | None = None) -> None:
        """Start with empty caches.

        Args:
            segments: where big buffers go to and come from; None leaves them in messages.
        """
        self.packer = Packer(segments)
        self._definitions = Definitions(self.packer)
        # Not one for each thread: pickling may submit, so one thread may need two.
        self._spare: list[_ReusedPickler[ArgumentPickler]] = []

    def dump_call(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made: list[Definition] | None = None,
    ) -> Call:
        """Pickle a call.

        Args:
            fn: what is called.
            args: with these arguments,
            kwargs: and these.
            made: has the definition of the function, or takes it, for calls of which no later
                one needs to see what has changed since the first. Those that pass objects
                of the script do: what they pass may be another one under the same name.

        Raises:
            SerializationError: something of it cannot be pickled; the message
                says what, and the cause why. KeyboardInterrupt passes.
        """
        call = fn, args, kwargs
        if type(fn) is types.MethodType:
            # The function travels once; the object may have changed.
            args = (fn.__self__, *args)
            fn = fn.__func__
        try:
            if kwargs or not _are_plain(args):
                arguments = self._dump_arguments(args, kwargs)
            else:
                arguments = _Arguments(marshal.dumps(args))
            if made and not arguments.keys:
                definition = made[0]
            else:
                definition = self._definitions.define(fn, arguments.keys)
                if made is not None and not arguments.keys:
                    made.append(definition)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failure = _explain(*call, error)
        else:
            used = arguments.shares
            if used:
                self._check_pool(used)
            if definition.shares:
                used = (*used, *definition.shares)
            return Call(definition.shared, arguments.data, arguments.buffers, arguments.lease, used)
        raise failure

    def clear(self) -> None:
        """Keep nothing of what was pickled."""
        self._definitions.clear()
        self.packer.clear()

    def _dump_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        try:
            pickler = self._spare.pop()
        except IndexError:
            pickler = _ReusedPickler(ArgumentPickler, OUT_OF_BAND, copy=True)
        segments = self.packer.segments
        packed = pickler.dumps((args, kwargs), segments)
        # From here on it ends with this lease, whatever happens.
        lease = segments.lease(packed.segment) if segments and packed.segment else None
        keys = pickler.take_keys()
        used = pickler.pickler.take_shares() if pickler.pickler.shares else ()
        if pickler.reusable:
            self._spare.append(pickler)
        return _Arguments(packed.data, packed.buffers, lease, keys, used)

    def dump_share(self, obj: object) -> Share:
        """Pickle an object for many calls. Later changes of it do not count.

        Raises:
            SerializationError: it cannot be pickled, or is too large to be sent.
        """
        views: list[memoryview] = []
        try:
            file = _Pieces()
            pickler = ArgumentPickler(file, functools.partial(_take_any_buffer, views))
            pickler.dump(obj)
            keys = frozenset(pickler.refs | pickler.names)
            needs = pickler.take_shares()
            share = self.packer.share(file.pieces, views, keys, needs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            what = f"An object of type {type(obj).__qualname__} cannot be shared"
            failure = _serialization_error(f"{what}: {_describe(error)}. {_HINT}", error)
        else:
            self._check_pool(needs)
            return share
        raise failure

    def _check_pool(self, used: Iterable[Share]) -> None:
        if any(share.pool is not self.packer.pool for share in used):
            from ..worker_errors import SerializationError

            raise SerializationError(
                "A shared object belongs to the executor that made it, and is used with "
                "another one. Share the object with this executor too: executor.share(handle.value)"
            )

    def load_outcome(self, outcome: Outcome) -> Any:
        """Return a call's result, or raise its exception."""
        return self.load(outcome, outcome.buffers)

    def load(self, outcome: Outcome | Result, buffers: Sequence[Buffer]) -> Any:
        """Return the result that a worker has sent with these buffers, or raise the exception.

        Raises:
            SerializationError: it cannot be unpickled here; the cause says why.
        """
        if not outcome.ok:
            raise self._load_exception(outcome.data)
        try:
            if outcome.segment is not None and self.packer.segments is not None:
                buffers = self.packer.segments.open(outcome.segment, owned=True)
            if outcome.data[:1] not in _PICKLED:
                return marshal.loads(outcome.data)
            return _loads(outcome.data, buffers)
        except BaseException as error:
            message = f"The result cannot be unpickled: {_describe(error)}."
            failure = _serialization_error(message, error)
        raise failure

    def _load_exception(self, data: Buffer) -> BaseException:
        """Return the exception in the data of an outcome that is not ok. Never raises."""
        text, message, pickled, raised = _Failure(*pickle.loads(data))
        cause: BaseException = _remote_traceback(text)
        if pickled:
            try:
                error = pickle.loads(pickled)
                if not isinstance(error, BaseException):
                    raise TypeError(f"unpickling made {type(error)!r} of an exception")
            except BaseException as problem:
                failure = _serialization_error(
                    f"The task's exception cannot be unpickled: {_describe(problem)}. "
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


def _explain(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException
) -> SerializationError:
    """Return what to raise when this call could not be pickled."""
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    if isinstance(error, DefinitionError):
        what = f"{error.what}, which it uses," if error.what else "the function itself"
        error = error.error
    else:
        what = _culprit(args, kwargs) or "the object it is a method of"
    return _serialization_error(
        f"The call of {name}() cannot be sent to a worker: {what} cannot be pickled "
        f"({_describe(error)}). {_HINT}",
        error,
    )


def _culprit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    named = [(f"argument {position}", arg) for position, arg in enumerate(args, 1)]
    named += [(f"argument {name!r}", arg) for name, arg in kwargs.items()]
    for name, arg in named:
        try:
            ArgumentPickler(io.BytesIO()).dump(arg)
        except BaseException:
            return f"{name} (of type {type(arg).__qualname__})"
    return None


# ------------------------------------------------------------------- the worker


class _Function:
    """A function in the worker, unpickled when first called."""

    __slots__ = ("call", "classes", "definition", "entries", "root", "version")

    def __init__(self, definition: Buffer) -> None:
        self.definition: Buffer | None = definition
        self.entries: list[Entry] = []
        self.root = b""
        self.call: Callable[..., Any] | None = None
        self.classes: list[type | None] = []  # kept alive for later calls
        self.version = -1

    def refresh(self, received: Received) -> None:
        """Make its globals what they were in the parent at the time of the call.

        Other calls may have brought other values since, so this is needed
        whenever anything was bound.
        """
        if self.definition is not None:
            self.entries, self.root = pickle.loads(self.definition)
            self.definition = None
        changed, self.classes = received.apply(self.entries)
        if changed or self.call is None:
            self.call = pickle.loads(self.root)
        self.version = received.version


_UNPICKLE = "The call cannot be unpickled in the worker"
_RUN = ""
_PICKLE = "The task's result cannot be pickled"


class CallRunner:
    """The worker's side: runs calls, and pickles what comes of them.

    Make it before any code of the user runs, and use it in one thread.
    """

    def __init__(
        self,
        segments: Segments | None = None,
        note: Callable[[BaseException], str] = lambda _: "",
    ) -> None:
        """Start without any function.

        Args:
            segments: where big buffers come from and go to; None leaves them in messages.
            note: what to add, as lines, to the traceback of what a task raised.
        """
        self.segments = segments
        self._note = note
        self._functions: dict[bytes, _Function] = {}
        self._received = Received()
        self._spare: list[_ReusedPickler[ResultPickler]] = []

    def load_function(self, function_id: bytes, function: Buffer) -> None:
        """Take the definition that calls will name by this id.

        It is unpickled by the first call, whose outcome tells if that fails.
        """
        self._functions[function_id] = _Function(function)

    def holds(self, segment: Segment) -> bool:
        """Whether something still uses the buffers that a call had from this segment."""
        return self.segments is None or self.segments.holds(segment)

    def forget(self, function_id: bytes) -> None:
        """Let go of a function; the globals it came with stay."""
        function = self._functions.pop(function_id, None)
        if function is not None:
            entries = function.entries
            del function
            self._received.forget(entries)

    def load_share(self, key: bytes, data: bytes) -> None:
        """Take an object that calls will use; it is unpickled by the first of them."""
        shares.define(key, functools.partial(self._open_share, data))

    def forget_share(self, key: bytes) -> None:
        """Let go of a shared object."""
        shares.forget(key)

    def _open_share(self, data: bytes, readonly: bool) -> Sequence[bytes | memoryview]:
        contents = msgspec.msgpack.decode(data, type=Contents)
        if contents.segment is None or self.segments is None:
            return contents.parts
        views = self.segments.open(contents.segment, readonly=readonly)
        return [view.toreadonly() for view in views] if readonly else views

    def run(
        self,
        function_id: bytes,
        data: Buffer,
        buffers: Sequence[Buffer] = (),
        segment: Segment | None = None,
    ) -> Outcome:
        """Run a call. Never raises, whatever the task does."""
        stage = _UNPICKLE
        try:
            function = self._functions[function_id]
            if function.version != self._received.version:
                function.refresh(self._received)
            if segment is not None and self.segments is not None:
                buffers = self.segments.open(segment)
            if data[:1] not in _PICKLED:
                args, kwargs = marshal.loads(data), {}
            else:
                args, kwargs = _loads(data, buffers)
                buffers = ()
            stage = _RUN
            result = function.call(*args, **kwargs)  # type: ignore[misc]  # refreshed above
            stage = _PICKLE
            if _are_plain((result,)):
                return Outcome(True, marshal.dumps(result))
            dumped = self._dump_result(result)
            return Outcome(True, dumped.data, dumped.buffers, dumped.segment)
        except BaseException as error:
            return Outcome(False, _dump_failure(stage, error, self._note))

    def _dump_result(self, result: object) -> _Packed:
        try:
            pickler = self._spare.pop()
        except IndexError:
            pickler = _ReusedPickler(ResultPickler, RESULT_OUT_OF_BAND, copy=False)
        dumped = pickler.dumps(result, self.segments)
        pickler.take_keys()
        if pickler.reusable:
            self._spare.append(pickler)
        return dumped


def _dump_failure(stage: str, error: BaseException, note: Callable[[BaseException], str]) -> bytes:
    text = _format(error)
    error.__traceback__ = None  # its frames hold the arguments
    text += note(error)
    message = ""
    # sys.exit() while the result is pickled is the task's own doing, like an error in it.
    if stage == _UNPICKLE or (stage == _PICKLE and isinstance(error, Exception)):
        message = f"{stage}: {_describe(error)}."
    pickled = b""
    try:
        with io.BytesIO() as file:
            ResultPickler(file).dump(error)
            pickled = file.getvalue()
    except BaseException as problem:
        if not message:
            message = (
                f"The task raised {_describe(error)}, an exception of {type(error)!r} "
                f"that cannot be pickled ({_describe(problem)}). "
                f"The traceback in the worker was:\n\n{text}"
            )
    return pickle.dumps((text, message, pickled, stage == _RUN), 5)
