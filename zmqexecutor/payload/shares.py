"""Objects that many tasks use: pickled once, sent to each worker once, kept there.

    SharedObject ──► Share ◄── every pending task that uses it
                       │
                       └── key, data, and the lease on the segment with its buffers

The handle is what the caller has. In the pickle of a call it is replaced by a call of
`take`, which gives the object of that key: the worker has been told of it before, with
the first job that needs it, and unpickles it at its first use. When nobody in the parent
refers to the `Share` any more, its segment is removed, and the workers are told to forget.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, TypeAlias, TypeVar

import msgspec

from ..wire.protocol import Segment

if TYPE_CHECKING:
    from ..wire.leases import Lease
    from .namespaces import Key

__all__ = [
    "Contents",
    "Share",
    "SharedObject",
    "define",
    "forget",
    "is_share",
    "new_key",
    "open_share",
    "take",
]

T = TypeVar("T")
_Open: TypeAlias = "Callable[[bool], Sequence[bytes | memoryview]]"
"""Gives a share's pickle and buffers, all of them read-only if that is asked for."""

_PREFIX: Final = b"share:"


def new_key() -> bytes:
    """A key that no function and no other share has, in any process."""
    return _PREFIX + os.urandom(16)


def is_share(key: bytes) -> bool:
    """Whether this key of a `protocol.Shared` is a share's. Functions have 16 bytes."""
    return len(key) > 16 and key.startswith(_PREFIX)


class Contents(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a worker is sent of a share: its pickle, followed by its buffers."""

    parts: list[bytes]
    segment: Segment | None = None
    """Where they are, if not in `parts`."""


class Share:
    """What the parent keeps of a shared object, for as long as a handle or a task needs it."""

    __slots__ = ("__weakref__", "_data", "_lease", "key", "keys", "needs", "pool")

    def __init__(
        self,
        data: bytes,
        lease: Lease | None,
        pool: object,
        keys: frozenset[Key],
        needs: tuple[Share, ...],
    ) -> None:
        """Give it a key.

        Args:
            data: encoded `Contents`.
            lease: on the segment that they are in, if they are.
            pool: told apart by identity; only its calls may use the share.
            keys: entries of the script that have to be in a worker before it is loaded.
            needs: the shares that it refers to.
        """
        self.key = new_key()
        self._data = data
        self.pool = pool
        self.keys = keys
        self.needs = needs
        self._lease = lease
        if lease is not None:
            lease.lend()  # to workers that may keep it: it is removed, and not used again

    def contents(self, mapped: bool) -> bytes:
        """Encoded `Contents` for a worker: a segment if it can map one, else all that is in it."""
        if mapped or self._lease is None:
            return self._data
        return msgspec.msgpack.encode(Contents([bytes(view) for view in self._lease.views()]))


class SharedObject(Generic[T]):
    """The handle of an object that `ZmqExecutor.share` has made known.

    Attributes:
        value: the object itself, in this process.
    """

    __slots__ = ("__weakref__", "_share", "value")

    def __init__(self, share: Share, value: T) -> None:
        self._share = share
        self.value = value

    def __repr__(self) -> str:
        return f"<SharedObject of {type(self.value).__qualname__} at {id(self):#x}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "the handle of a shared object can only be sent among the arguments of a task, "
            "not in a result, in a global or in a variable that the function closes over; "
            "pass it as an argument, or send its value"
        )


# ------------------------------------------------------------------- the worker


class _Held:
    """A share in a worker, loaded when first used."""

    __slots__ = ("loaded", "open", "value")

    def __init__(self, open_: _Open) -> None:
        self.open = open_
        self.loaded = False
        self.value: Any = None


# Of the process, since `take` is called by a pickle, which knows no more than a key.
_held: dict[bytes, _Held] = {}


def define(key: bytes, open_: _Open) -> None:
    """Note how the pickle of a share and its buffers are come by."""
    _held[key] = _Held(open_)


def forget(key: bytes) -> None:
    """Let go of a share."""
    _held.pop(key, None)


def take(key: bytes) -> Any:
    """Return the shared object, in a worker that has been told of it."""
    held = _held[key]
    if not held.loaded:
        data, *buffers = held.open(True)
        held.value = pickle.loads(data, buffers=buffers)
        held.loaded = True  # not before: if it fails, the next task tries again
    return held.value


def open_share(key: bytes) -> Sequence[bytes | memoryview]:
    """The pickle and the buffers of a share; buffers that can be written to are ours alone."""
    return _held[key].open(False)
