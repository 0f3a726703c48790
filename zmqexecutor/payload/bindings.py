"""The worker's side: entries that arrive are bound to their names.

An entry is bound only if its digest differs from what was bound last. So what a
task or an initializer put there itself (a counter, a connection) stays until the
parent rebinds or changes its own value. Entries may refer to each other: when the
pickle of one asks for another (`byvalue.lookup`), that one is bound first.
"""

from __future__ import annotations

import functools
import pickle
import types
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

from .byvalue import (
    InProgressError,
    arrived,
    contents_of,
    make_class,
    set_class_state,
    unpickling,
)
from .namespaces import MAIN, MISSING, Entry, Key, Payload, class_by_id, make_namespace, namespace

__all__ = ["Received"]


class _Skeleton(NamedTuple):
    """A class that has been made, and its contents to be."""

    cls: type
    digest: bytes
    contents: bytes


class _Binder:
    """Binds entries in turn, or when another refers to them.

    A class is made before its contents are unpickled, and is there to be referred
    to from then on. So classes may refer to each other in any way, and to objects
    that refer to them; what else refers to itself the parent did not send as
    references.
    """

    def __init__(self, received: Received, entries: list[Entry]) -> None:
        self.busy: set[Key] = set()
        self._needed: set[Key] = set()
        """What the entry in hand refers to."""
        # What no global keeps alive; first, lest one dies before it is asked for.
        self.classes = [class_by_id(name) for module, name, _, _ in entries if not module]
        self._received = received
        self._waiting = {
            (module, name): (digest, payload)
            for module, name, digest, payload in entries
            if not received.has(module, name, digest)
        }
        self._skeletons: dict[Key, _Skeleton] = {}
        self._bases_only = False

    def run(self) -> bool:
        """Bind all; say whether there were any."""
        if not self._waiting:
            return False
        outer = unpickling.binder
        unpickling.binder = self
        try:
            while self._waiting:
                self.prepare(next(iter(self._waiting)))
                if not self._waiting:
                    for key in list(self._skeletons):
                        self._finish(key)
        finally:
            unpickling.binder = outer
        return True

    def prepare(self, key: Key) -> None:
        """Bind this entry, if it waits for it and can be bound."""
        self._needed.add(key)
        # What this one refers to is no concern of who refers to it.
        outer, self._needed = self._needed, set()
        try:
            if key in self._waiting:
                digest, payload = self._waiting[key]
                if len(payload) == 2:
                    self._make(key, digest, payload)
                else:
                    self._bind(key, digest, payload)
            if key in self._skeletons and not self._bases_only:
                self._finish(key)
        finally:
            self._needed = outer

    def _bind(self, key: Key, digest: bytes, payload: Payload) -> None:
        keys: list[Key] = pickle.loads(payload[1]) if len(payload) == 3 else [key]
        entries = {key: self._waiting.pop(key) for key in keys if key in self._waiting}
        self.busy.update(keys)
        outer, self._bases_only = self._bases_only, False
        try:
            value = pickle.loads(payload[0]) if payload else MISSING
        except InProgressError:
            self._waiting.update(entries)
            raise
        finally:
            self._bases_only = outer
            self.busy.difference_update(keys)
        values: Any = value if len(payload) == 3 else (value,)
        for bound, part in zip(keys, values, strict=True):
            self.classes += [] if bound[0] else [part]
            self._received.bind(bound, digest, part, self._needed.difference(keys))

    def _make(self, key: Key, digest: bytes, payload: Payload) -> None:
        del self._waiting[key]
        outer, self._bases_only = self._bases_only, True
        try:
            cls = make_class(*pickle.loads(payload[0]))
            self.classes.append(cls)
        finally:
            self._bases_only = outer
        self._skeletons[key] = _Skeleton(cls, digest, payload[1])

    def _finish(self, key: Key) -> None:
        skeleton = self._skeletons.pop(key, None)
        if skeleton is None:
            return
        try:
            contents = pickle.loads(skeleton.contents)
        except InProgressError:  # an object that holds the class; when that is there
            self._skeletons[key] = skeleton
            return
        set_class_state(skeleton.cls, contents)
        self._received.bind(key, skeleton.digest, skeleton.cls)


class _Bound(NamedTuple):
    """An entry as it was bound last."""

    digest: bytes
    cls: weakref.ref[type] | None
    """What it was bound to, if that is a class."""
    contents: object
    """The contents that the class had then: by another name it may have got others."""
    needed: dict[Key, int]
    """The entries that it refers to, by their numbers then."""


class Received:
    """The worker's side: binds entries, and knows what it bound last."""

    def __init__(self) -> None:
        self.version = 0
        """Grows whenever something is bound."""
        self._bound: dict[Key, _Bound] = {}
        self._numbers: dict[Key, int] = {}
        """How often an entry was bound, unless it is a class: those stay the same objects."""
        # What was there before any code of the user is ours, and may be overwritten.
        self._bootstrap = frozenset(namespace(MAIN))

    def has(self, module: str, name: str, digest: bytes) -> bool:
        """Say whether this is what was bound last (a class has to be alive, too)."""
        last = self._bound.get((module, name))
        if last is None or last.digest != digest:
            return False
        if last.cls is not None:
            cls = last.cls()
            if cls is not None and contents_of(cls) is not last.contents:
                return False
        if any(self._numbers.get(key) != number for key, number in last.needed.items()):
            return False
        return bool(module) or class_by_id(name) is not None

    def apply(self, entries: list[Entry]) -> tuple[bool, list[type | None]]:
        """Bind the entries that are new or changed.

        Return whether there were any, and the classes that no global keeps alive.
        """
        binder = _Binder(self, entries)
        return binder.run(), binder.classes

    def bind(self, key: Key, digest: bytes, value: object, needed: Iterable[Key] = ()) -> None:
        """Bind one entry to its value, which refers to these others."""
        module, name = key
        if module:
            self._bind_global(module, name, value)
        cls = contents = None
        if isinstance(value, type):
            cls, contents = weakref.ref(value, partial(self._forget, key)), contents_of(value)
        elif not module:
            return  # in the place of a class, which is gone
        else:
            self._numbers[key] = self._numbers.get(key, 0) + 1
        numbers = {other: self._numbers[other] for other in needed if other in self._numbers}
        self._bound[key] = _Bound(digest, cls, contents, numbers)
        self.version += 1

    def _bind_global(self, module: str, name: str, value: object) -> None:
        globals_ = make_namespace(module)
        ours = module == MAIN and name in self._bootstrap
        if (module, name) not in self._bound and name in globals_ and not ours:
            return  # set by a task or an initializer before the parent's value was needed
        if value is MISSING:
            globals_.pop(name, None)
            return
        globals_[name] = value
        if name == "__package__":
            globals_["__spec__"] = None  # ours, which would contradict it
        if isinstance(value, (types.FunctionType, functools._lru_cache_wrapper)):
            arrived.add(value)

    def _forget(self, key: Key, cls: weakref.ref[type]) -> None:
        """A class has died: remember nothing of it, if no global had it."""
        last = self._bound.get(key)
        if not key[0] and last is not None and last.cls is cls:
            del self._bound[key]
