"""Callables, arguments, results and exceptions, to payloads and back.

Nothing outside of this package knows what is inside a payload. How code of the script
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
- *Data* and *buffers* are what `values` makes of arguments and results.
- Every failure ends up as the outcome of its call, in data that `failures` makes.
"""

from __future__ import annotations

import functools
import io
import marshal
import mmap
import operator
import pickle
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from ..system.interrupts import is_interrupt
from ..wire.buffers import Segments
from ..wire.leases import Lease
from ..worker_errors import SerializationError
from . import shares
from .bindings import Received
from .byvalue import unpickling
from .constancy import is_constant
from .definitions import Definition, DefinitionError, Definitions
from .failures import (
    HINT,
    HINT_FOR_CLASSES,
    PICKLING,
    RUNNING,
    UNPICKLING,
    describe,
    dump_exception,
    load_exception,
    serialization_error,
)
from .namespaces import Entry, Key, bound_to, is_class, name_of
from .packing import Packer
from .picklers import ArgumentPickler, ResultPickler
from .plain import PICKLED, are_plain, dump_arrays, load_plain
from .shares import Contents, Share
from .snapshots import Snapshots
from .values import (
    NO_KEYS,
    OUT_OF_BAND,
    Buffer,
    Packed,
    Pieces,
    ReusedPickler,
    loads,
    take_any_buffer,
)

if TYPE_CHECKING:
    from ..wire.protocol import Result, Segment, Shared

__all__ = ["Call", "CallPickler", "CallRunner", "Made", "Outcome"]


class Call(msgspec.Struct, frozen=True):
    """A call, ready to be sent: what `CallRunner` needs."""

    shared: Shared
    """The definition of the function, by its id."""
    data: bytes
    buffers: Sequence[memoryview] = ()
    lease: Lease | None = None
    shares: tuple[Share, ...] = ()
    """Shared objects that it uses, which `CallRunner.load_share` has to know."""
    proxies: tuple[object, ...] = ()
    """Arguments that must be alive until it is done: a manager forgets what none refers to."""

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


class _Arguments(msgspec.Struct, frozen=True):
    """A call's arguments: their pickle, the lease on its segment, what they refer to."""

    data: bytes
    buffers: Sequence[memoryview] = ()
    lease: Lease | None = None
    keys: frozenset[Key] = NO_KEYS
    shares: tuple[Share, ...] = ()
    proxies: tuple[object, ...] = ()


# ------------------------------------------------------------------- the parent


Made: TypeAlias = "dict[frozenset[Key], tuple[Definition, Sequence[Key], Sequence[object]]]"
"""Definitions of a function, by the classes of the script of which objects are passed to it."""


_MOST_MADE: Final = 64
"""Definitions that are kept of one function, with the classes that their arguments have."""


def _find_made(made: Made, keys: frozenset[Key]) -> Definition | None:
    found = made.get(keys)
    if found is None:
        return None
    definition, names, classes = found
    if names and not all(map(operator.is_, map(bound_to, names), classes)):
        return None  # another one has been bound to the name of one of them
    return definition


def _note_made(made: Made, keys: frozenset[Key], definition: Definition) -> None:
    names = tuple(keys)
    classes = tuple(map(bound_to, names))
    if all(map(is_class, classes)):  # what functions use may be another one at the next call
        if len(made) >= _MOST_MADE:
            made.clear()
        made[keys] = definition, names, classes


class CallPickler:
    """The side that submits: calls out, outcomes in. Many threads may use it at once."""

    def __init__(self, segments: Segments | None = None) -> None:
        """Start with empty caches.

        Args:
            segments: where big buffers go to and come from; None leaves them in messages.
        """
        self.packer = Packer(segments)
        self._definitions = Definitions(self.packer)
        self._snapshots = Snapshots()
        # Not one for each thread: pickling may submit, so one thread may need two.
        self._spare: list[ReusedPickler[ArgumentPickler]] = []

    def dump_call(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made: Made | None = None,
    ) -> Call:
        """Pickle a call.

        Args:
            fn: what is called.
            args: with these arguments,
            kwargs: and these.
            made: has definitions of the function, or takes them, for calls of which no later
                one needs to see what has changed since the first.

        Raises:
            SerializationError: something of it cannot be pickled; the message
                says what, and the cause why. What a signal handler raises passes.
            PerformanceWarning: see `Costs.warn`.
        """
        call = fn, args, kwargs
        if type(fn) is types.MethodType:
            # The function travels once; the object may have changed.
            args = (fn.__self__, *args)
            fn = fn.__func__
        try:
            if not kwargs and are_plain(args):
                arguments = _Arguments(marshal.dumps(args))
            else:
                arguments = self._dump_arguments(args, kwargs)
            definition = _find_made(made, arguments.keys) if made else None
            if definition is None:
                definition = self._definitions.define(fn, arguments.keys)
                if made is not None:
                    _note_made(made, arguments.keys, definition)
        except BaseException as error:
            if is_interrupt(error):
                raise
            failure = _explain(*call, error)
        else:
            if self._definitions.costs.due:
                self._definitions.costs.warn()
            used = arguments.shares
            if used:
                self._check_pool(used)
            if definition.shares:
                used = (*used, *definition.shares)
            return Call(
                definition.shared,
                arguments.data,
                arguments.buffers,
                arguments.lease,
                used,
                arguments.proxies + definition.proxies,
            )
        raise failure

    def clear(self) -> None:
        """Keep nothing of what was pickled."""
        self._definitions.clear()
        self.packer.clear()

    def _dump_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        if not kwargs:
            packed = dump_arrays(args, self.packer.segments, self._snapshots)
            if packed is not None:
                return _Arguments(packed.data, packed.buffers, packed.lease)
        try:
            pickler = self._spare.pop()
        except IndexError:
            pickler = ReusedPickler(ArgumentPickler, OUT_OF_BAND, self._snapshots)
        packed = pickler.dumps((args, kwargs), self.packer.segments)
        proxies = pickler.pickler.take_proxies() if pickler.pickler.proxies else ()
        keys = pickler.take_keys()
        used = pickler.pickler.take_shares() if pickler.pickler.shares else ()
        if pickler.reusable:
            self._spare.append(pickler)
        return _Arguments(packed.data, packed.buffers, packed.lease, keys, used, proxies)

    def dump_share(self, obj: object) -> Share:
        """Pickle an object for many calls. Later changes of it do not count.

        Raises:
            SerializationError: it cannot be pickled, or is too large to be sent.
        """
        views: list[memoryview] = []
        try:
            file = Pieces()
            pickler = ArgumentPickler(file, functools.partial(take_any_buffer, views))
            pickler.dump(obj)
            keys = frozenset(pickler.refs | pickler.names)
            needs = pickler.take_shares()
            share = self.packer.share(file.pieces, views, keys, needs)
        except BaseException as error:
            if is_interrupt(error):
                raise
            what = f"An object of type {type(obj).__qualname__} cannot be shared"
            failure = serialization_error(f"{what}: {describe(error)}. {HINT}", error)
        else:
            self._check_pool(needs)
            return share
        raise failure

    def _check_pool(self, used: Iterable[Share]) -> None:
        if any(share.pool is not self.packer.pool for share in used):
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
            raise load_exception(outcome.data)
        try:
            if outcome.segment is not None and self.packer.segments is not None:
                buffers = self.packer.segments.open(outcome.segment, owned=True)
            if outcome.data[:1] in PICKLED:
                return loads(outcome.data, buffers)
            result = load_plain(outcome.data, buffers)
            return result[0] if type(result) is list else result
        except BaseException as error:
            message = f"The result cannot be unpickled: {describe(error)}."
            failure = serialization_error(message, error)
        raise failure


def _explain(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException
) -> SerializationError:
    """Return what to raise when this call could not be pickled."""
    name, hint = name_of(fn), HINT
    if isinstance(error, DefinitionError):
        what = f"{error.what}, which it uses," if error.what else "the function itself"
        if error.is_class:
            hint = HINT_FOR_CLASSES
        error = error.error
    else:
        what = _culprit(args, kwargs) or "the object it is a method of"
    return serialization_error(
        f"The call of {name}() cannot be sent to a worker: {what} cannot be pickled "
        f"({describe(error)}). {hint}",
        error,
    )


def _culprit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    named = [(f"argument {position}", arg) for position, arg in enumerate(args, 1)]
    named += [(f"argument {name!r}", arg) for name, arg in kwargs.items()]
    for name, arg in named:
        try:
            ArgumentPickler(io.BytesIO()).dump(arg)
        except BaseException as error:
            if is_interrupt(error):
                raise
            return f"{name} (of type {type(arg).__qualname__})"
    return None


# ------------------------------------------------------------------- the worker


class _Function:
    """A function in the worker, unpickled when first called."""

    __slots__ = (
        *("call", "classes", "constant", "definition", "entries", "references", "root", "version"),
    )

    def __init__(self, definition: Buffer) -> None:
        self.definition: Buffer | None = definition
        self.entries: list[Entry] = []
        self.root = b""
        self.call: Callable[..., Any] | None = None
        self.references: dict[tuple[str, str, str | None], Any] = {}
        self.constant = False  # then there is a `call`, for any number of tasks
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
        if changed or self.version < 0:
            self.references, self.call, self.constant = {}, None, False
            self.call = self._load()
            self.constant = is_constant(self.call)
        self.version = received.version

    def _load(self) -> Callable[..., Any]:
        # Each copy has the same functions, though a task may have bound their names to others.
        unpickling.found = self.references
        try:
            call: Callable[..., Any] = pickle.loads(self.root)
        finally:
            unpickling.found = None
        return call

    def take(self) -> Callable[..., Any]:
        """A callable for one task, which may change what it holds."""
        call, self.call = self.call, None
        return self._load() if call is None else call


def _nothing() -> None:
    """What a reference to a mapping says that is gone, or never was."""


def _mapping_of(buffers: Sequence[memoryview]) -> Callable[[], object]:
    mapping = buffers[0].obj  # all have the same
    return weakref.ref(mapping) if isinstance(mapping, mmap.mmap) else _nothing


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
        self._spare: list[ReusedPickler[ResultPickler]] = []
        self._mapping: Callable[[], object] = _nothing

    def load_function(self, function_id: bytes, function: Buffer) -> None:
        """Take the definition that calls will name by this id.

        It is unpickled by the first call, whose outcome tells if that fails.
        """
        self._functions[function_id] = _Function(function)

    def holds(self) -> bool:
        """Whether something still uses the buffers that the last call had from a segment."""
        return self._mapping() is not None

    def forget(self, function_id: bytes) -> None:
        """Let go of a function; the globals it came with stay."""
        self._functions.pop(function_id, None)

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
        stage = UNPICKLING
        try:
            function = self._functions[function_id]
            if function.version != self._received.version:
                function.refresh(self._received)
            call = function.call if function.constant else function.take()
            if segment is not None and self.segments is not None:
                buffers = self.segments.open(segment)
                self._mapping = _mapping_of(buffers)
            if data[:1] in PICKLED:
                args, kwargs = loads(data, buffers)
            else:
                args, kwargs = load_plain(data, buffers), {}
            buffers = ()
            stage = RUNNING
            result = call(*args, **kwargs)  # type: ignore[misc]
            stage = PICKLING
            if are_plain((result,)):
                return Outcome(True, marshal.dumps(result))
            dumped = self._dump_result(result)
            return Outcome(True, dumped.data, dumped.buffers, dumped.segment)
        except BaseException as error:
            return Outcome(False, dump_exception(stage, error, self._note))

    def _dump_result(self, result: object) -> Packed:
        plain = dump_arrays((result,), self.segments)
        if plain is not None:
            return plain
        try:
            pickler = self._spare.pop()
        except IndexError:
            pickler = ReusedPickler(ResultPickler, OUT_OF_BAND)
        dumped = pickler.dumps(result, self.segments)
        pickler.take_keys()
        if pickler.reusable:
            self._spare.append(pickler)
        return dumped
