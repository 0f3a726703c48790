"""The globals that a call needs: the whole of how code travels by value, and the parent's side.

A worker cannot import the user's script, so functions and classes of `__main__`
(and of modules given to `cloudpickle.register_pickle_by_value`) travel by value.
cloudpickle gives each of them a copy of the globals it uses. Here they share one
namespace per module, as they did at home:

    parent                                        worker
    __main__.__dict__                             __main__.__dict__
      f ──── names ──► helper, LIMIT                f, helper, LIMIT, cache
      helper ─ names ► cache                        ▲
                                                    │ only what is new here
    definition of f ────────────────────────────────┘
      entries: f, helper, LIMIT, cache    each with a digest and a pickle
      root:    "the global f"

- An *entry* is one global: a module, a name, its pickled value, and a digest.
  A function is pickled without its globals; their names lead to more entries.
  What another global is bound to is pickled as a *reference* to that entry. So
  cycles through globals do no harm, and identity is kept; but not that of lists,
  dicts and sets, for which a pickler asks nobody: of those each entry has a copy.
- The worker binds an entry only if the digest differs from the one it bound for
  that name before. What a task or an initializer put there itself (a counter, a
  connection) therefore stays until the parent rebinds or changes its own value. A
  new object that can change has another digest than the equal one that it replaces.
- Classes are found by cloudpickle's tracker id, so they are the same class on
  both sides. A class that is sent again changes in place. Classes without a
  global name (local ones) are entries too, of the module "" and their id.
- What comes back from a worker refers to the parent's functions and classes. It
  never writes to them.

The parts, from below: `namespaces` says which code travels by value, and has the
dicts of globals; `byvalue` takes functions and classes apart and makes them again;
`picklers` turn the rest into references; `pieces` makes single entries; `bindings` is the
worker's side. Here, the parent gathers the entries that a callable can reach into its
*definition*, and keeps it while `proofs` says that a new one would be the same.
"""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import time
import types
import weakref
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from ..system.interrupts import is_interrupt
from ..wire.protocol import Shared
from .arrays import is_array
from .bulk import Bulk
from .constancy import is_constant
from .costs import Costs
from .digests import digest_of
from .imports import importable_as, is_only_itself, origin_of, origin_of_object
from .namespaces import (
    MISSING,
    Entry,
    Key,
    bound_to,
    class_by_id,
    is_class,
    namespace,
)
from .packing import Packer
from .picklers import bound_objects, global_of
from .pieces import (
    Piece,
    describe_key,
    describe_unavailable,
    in_groups,
    in_order,
    make_import,
    make_piece,
    make_unavailable,
    reach,
)
from .proofs import GlobalArray, Proof, holds
from .reducers import GUARDS
from .repeats import Pickled, repeat
from .shares import Share
from .unavailable import Unavailable

__all__ = ["Definition", "DefinitionError", "Definitions"]

_ROUNDS: Final = 5
"""Attempts to find the owner of each object, while other threads bind globals."""


_LONG: Final = 0.001
"""Seconds to make an entry, from which on it is asked what a comparison takes."""


class DefinitionError(Exception):
    """Part of a definition cannot be pickled: which part, and the exception."""

    def __init__(self, what: str, error: BaseException, part: object = None) -> None:
        super().__init__(what, error)
        self.what = what
        self.error = error
        self.is_class = is_class(part)


class Definition(NamedTuple):
    """A callable with all the globals it can reach, as it travels to workers."""

    shared: Shared
    """For the wire: its id and the pickle."""
    proof: Proof | None
    shares: tuple[Share, ...] = ()
    """Large parts of it."""
    bulk: Bulk | None = None
    """The callable itself, if it is one of them."""
    proxies: tuple[object, ...] = ()
    """What of the callable must be alive; see `ArgumentPickler`."""


class _Large(NamedTuple):
    """A global of which much is kept: what tells that it is gone, without a look through it."""

    ident: int
    size: int
    bulk: Bulk | None


class _Known(NamedTuple):
    """The definitions of one callable, by what its arguments referred to besides."""

    ref: weakref.ref[Any]
    by_keys: dict[frozenset[Key], Definition]


class Definitions:
    """The parent's side: makes definitions, and keeps them while they are proven.

    Threads may race here: each works on objects of its own, and puts them into
    the caches whole. The caches are bounded, since what they hold can, by a
    detour, keep alive the callable that they should only keep while it lives.

    Attributes:
        costs: what the comparisons take.
    """

    _BOUND: Final = 1024

    def __init__(self, packer: Packer) -> None:
        """Begin with nothing.

        Args:
            packer: for what is large.
        """
        self._known: dict[int, _Known] = {}
        self._pieces: dict[Key, Piece] = {}
        self._classes: dict[Key, weakref.ref[type]] = {}
        # These may be in no kept piece.
        self._large: dict[Key, _Large] = {}
        # What tells the object that a global was bound to last, and its number (see `_number`).
        self._bound: dict[Key, tuple[Callable[[object], bool], int]] = {}
        self._most_bound = self._BOUND
        self._numbers = itertools.count(1)
        # Of entries for which nothing but another pickle is a proof, what they were last.
        self._repeated: dict[Key, bytes] = {}
        # Those whose proof is slow and did not hold: there is none until they come twice.
        self._changing: set[Key] = set()
        self._packer = packer
        self.costs = Costs()

    def define(self, func: Any, keys: frozenset[Key]) -> Definition:
        """Return the definition of a callable whose arguments refer to these entries."""
        known = self._known.get(id(func))
        old = None
        if known is not None and known.ref() is func:
            old = known.by_keys.get(keys)
            if old is not None and old.proof is not None and old.proof.holds():
                return old
        # A function that is met for the first time may well be met only once (a lambda
        # in a loop): a proof is made when it comes again.
        new = self._make_definition(func, keys, old)
        if old is not None and old.shared.key == new.shared.key:
            new = new._replace(shared=old.shared)  # one copy of it is enough
        # Without a proof it is made anew next time, and what was large may be gone by then.
        self._keep(func, keys, new if new.proof else new._replace(shares=(), proxies=()))
        return new

    def clear(self) -> None:
        """Keep nothing any more."""
        for cache in (
            *(self._known, self._pieces, self._classes),
            *(self._large, self._bound, self._repeated, self._changing),
        ):
            cache.clear()

    def _keep(self, func: Any, keys: frozenset[Key], definition: Definition) -> None:
        all_known, ident = self._known, id(func)
        known = all_known.get(ident)
        if known is None or known.ref() is not func:
            try:
                ref = weakref.ref(func, lambda _: all_known.pop(ident, None))
            except TypeError:
                return
            if len(all_known) >= self._BOUND:
                all_known.clear()
            known = all_known[ident] = _Known(ref, {})
        for others in list(known.by_keys):
            if any(not module and class_by_id(name) is None for module, name in others):
                known.by_keys.pop(others, None)  # of classes that have died
        if len(known.by_keys) >= 16:
            known.by_keys.clear()
        known.by_keys[keys] = definition

    def _make_definition(
        self, func: Any, keys: frozenset[Key], old: Definition | None
    ) -> Definition:
        again = old is not None
        key = global_of(func)
        try:
            # If it is a global, the proof of that entry is enough.
            root = self._make_piece(
                func, None, proven=again and key is None, before=old.bulk if old else None
            )
        except BaseException as error:
            if is_interrupt(error):
                raise
            raise DefinitionError("", error)
        if key is not None:
            root = root._replace(proof=Proof())
        pieces = self._closure(root, keys)
        self._drop_what_is_gone()
        entries: list[Entry] = []
        for key in in_order(pieces):
            digest = pieces[key].digest
            if pieces[key].refs:
                digest = digest_of(*(pieces[other].digest for other in sorted(reach(pieces, key))))
            entries.append((*key, digest, pieces[key].payload))
        parts = [
            part
            for module, name, digest, _ in entries
            for part in (module.encode(), name.encode(), digest)
        ]
        bulks = [piece.bulk for piece in (root, *pieces.values())]
        shares = tuple(bulk.share for bulk in bulks if bulk is not None)
        # With their keys: what a worker keeps by this id must not name a share that is gone.
        function_id = digest_of(root.digest, *parts, *(share.key for share in shares))
        function = pickle.dumps((entries, *root.payload), 5)
        shared = Shared(function_id, function)
        if not again and key is None:
            return Definition(shared, None, shares, root.bulk, root.proxies)
        proofs = [piece.proof for piece in (root, *pieces.values())]
        proven = [proof for proof in proofs if proof is not None]
        proof = Proof.union(proven) if len(proven) == len(proofs) else None
        return Definition(shared, proof, shares, root.bulk, root.proxies)

    def _closure(self, root: Piece, keys: frozenset[Key]) -> dict[Key, Piece]:
        """Return all entries that can be reached."""
        for _ in range(_ROUNDS):
            pieces = self._collect(root, keys)
            # What is in a kept pickle may by now be what another global is bound to. Of two
            # copies in a worker a task would change one, and look at the other.
            kept = [key for key in pieces if pieces[key].inlined and key in self._pieces]
            owners = bound_objects() if kept else {}
            outdated = [
                key
                for key in kept
                if any(owners.get(ident, key) != key for ident in pieces[key].inlined)
            ]
            if not outdated:
                break
            for key in outdated:
                self._pieces.pop(key, None)
        return in_groups(pieces)

    def _collect(self, root: Piece, keys: frozenset[Key]) -> dict[Key, Piece]:
        pieces: dict[Key, Piece] = {}
        # What only methods of classes name is often not needed (the pool itself, say,
        # in the method that submits the others); so it may be missing.
        needed = [*root.refs, *root.names, *keys]
        optional: list[Key] = []
        while needed or optional:
            todo = needed or optional
            key = todo.pop()
            if key in pieces:
                continue
            piece = pieces[key] = self._piece(key, optional=todo is optional)
            todo.extend(piece.refs)
            (optional if piece.is_class else todo).extend(piece.names)
        return pieces

    def _piece(self, key: Key, optional: bool) -> Piece:
        old = self._pieces.get(key)
        if old is not None and (old.available or optional) and holds(old.proof):
            return old
        self._pieces.pop(key, None)  # not to be asked again
        if key[0] and old is not None and old.proof is not None and old.proof.is_slow:
            self._changing.add(key)
        start = time.perf_counter()
        try:
            piece = self._make_entry(key)
        except BaseException as error:
            if is_interrupt(error):
                raise
            value = bound_to(key)
            origin = origin_of_object(key, value)
            if origin is not None:
                why = Unavailable(describe_unavailable(key, error))
                piece = make_import(key, value, origin, why)
            elif not optional:
                raise DefinitionError(describe_key(key), error, value)
            else:
                piece = make_unavailable(key, error)
        if piece.proof is not None:
            if key[0] and time.perf_counter() - start > _LONG:
                piece.proof.measure(self.costs, describe_key(key))
            self._keep_piece(key, piece)
        return piece

    def _keep_piece(self, key: Key, piece: Piece) -> None:
        pieces, classes = self._pieces, self._classes
        if len(pieces) >= self._BOUND:
            pieces.clear()
        pieces[key] = piece
        module, name = key
        cls = None if module else class_by_id(name)
        if cls is not None:
            # With a class of no global goes what has proven that it is the same.
            classes[key] = weakref.ref(
                cls, lambda _: (pieces.pop(key, None), classes.pop(key, None))
            )

    def _make_entry(self, key: Key) -> Piece:
        module, name = key
        value = namespace(module).get(name, MISSING) if module else class_by_id(name)
        if value is MISSING:
            proof = Proof()
            proof.bind([key])
            return Piece((), b"", frozenset(), frozenset(), False, proof)
        if module and (origin := origin_of(value)) is not None:
            return make_import(key, value, origin, None)
        if module and (type(value) in GUARDS or is_only_itself(value)):
            origin = importable_as(name, value)
            if origin is not None:
                return make_import(key, value, origin, value)
        large = self._large.get(key)
        before = large.bulk if large else None
        number = self._number(key, value)
        array = GlobalArray.of(value)
        proven = array is None and key not in self._changing
        piece = self._make_piece(value, key, proven=proven, before=before)
        bulk = piece.bulk
        if large is not None and bulk is not before:
            self._drop({key: large})
        if bulk is not None or (piece.proof is not None and piece.proof.is_slow):
            self._large[key] = _Large(id(value), _size_of(value), bulk)
        if array is not None:
            packed = bulk.buffers if bulk else ()
            piece = piece._replace(proof=array.proof((key, *piece.refs), packed))
        if number:
            piece = piece._replace(digest=digest_of(piece.digest, b"%d" % number))
        if module and piece.proof is not None and piece.proof.bindings[key] != id(value):
            return piece._replace(proof=None)  # another thread has bound another object meanwhile
        if piece.proof is None and array is None and module:
            # So that what changes each time is not pickled twice, nor looked through.
            if self._repeated.get(key) != piece.digest:
                self._repeated[key] = piece.digest
            elif not proven:
                self._changing.discard(key)
            elif not piece.proxies:
                pickled = Pickled(piece.says, piece.refs, piece.names)
                piece = piece._replace(proof=repeat(key, _identity(value), pickled))
        return piece

    def _number(self, key: Key, value: object) -> int:
        """Of this object, among those that the global was bound to; 0 for the first.

        Another object is not what tasks have changed, though it may look like what the first
        was. If nothing of it can change, it is the same; so are equal arrays, to which there may
        be no reference (see `proofs`).
        """
        if is_class(value):
            return 0  # redefined it has an id of its own, and else it is changed in place
        if len(self._bound) >= self._most_bound:
            self._forget_unbound()
        known, number = self._bound.get(key, (None, 0))
        if known is not None and not known(value) and _can_change(value):
            number = next(self._numbers)
        self._bound[key] = _identity(value), number
        return number

    def _forget_unbound(self) -> None:
        """Remember nothing of globals that are gone."""
        for cache in (self._bound, self._repeated):
            for key in list(cache):
                if bound_to(key) is None:
                    cache.pop(key, None)
        self._changing.intersection_update(self._bound)
        self._most_bound = max(self._BOUND, 2 * len(self._bound))

    def _drop_what_is_gone(self) -> None:
        """Keep nothing of globals that have been deleted, emptied, or bound to something else."""
        gone = {}
        for key, large in list(self._large.items()):
            module, name = key
            value = namespace(module).get(name, MISSING) if module else class_by_id(name)
            if id(value) != large.ident or _size_of(value) != large.size:
                gone[key] = large
        if gone:
            self._drop(gone)

    def _drop(self, gone: dict[Key, _Large]) -> None:
        """Keep neither these nor what is made of them."""
        shares = {large.bulk.share for large in gone.values() if large.bulk is not None}
        for key in gone:
            self._large.pop(key, None)
            self._pieces.pop(key, None)
        for known in list(self._known.values()):
            for keys, definition in list(known.by_keys.items()):
                used = definition.proof.bindings.keys() if definition.proof else ()
                if not (shares.isdisjoint(definition.shares) and gone.keys().isdisjoint(used)):
                    known.by_keys.pop(keys, None)

    def _make_piece(
        self, value: object, key: Key | None, *, proven: bool = True, before: Bulk | None = None
    ) -> Piece:
        try:
            piece, data, views = make_piece(value, key, proven=proven)
        except RuntimeError as error:
            if "changed size during iteration" not in str(error):
                raise
            # Another thread fills it while it is pickled. A copy is made in one go.
            piece, data, views = make_piece(_copy_of(value, error), key, proven=False)
        if not data:
            return piece
        same = before if before is not None and before.says(data, views) else None
        bulk = same or self._packer.bulk(data, views)
        return piece._replace(payload=(bulk.payload,), digest=bulk.digest, bulk=bulk)


def _size_of(value: Any) -> int:
    return len(value) if type(value) in (dict, list, set) else 0


def _identity(value: object) -> Callable[[object], bool]:
    """What tells this object from others, and does not keep it alive."""
    if not is_array(value):
        try:
            ref = weakref.ref(value)
        except TypeError:
            pass
        else:
            return lambda other: ref() is other
    ident = id(value)
    return lambda other: id(other) == ident


def _can_change(value: object) -> bool:
    if is_array(value):
        return False
    if isinstance(value, functools._lru_cache_wrapper):
        return True  # its cache
    if isinstance(value, types.FunctionType) and vars(value):
        return True
    return not is_constant(value)


def _copy_of(value: object, error: Exception) -> object:
    """A shallow copy of what may change meanwhile; `error` is raised if that is not known."""
    if type(value) in (dict, set):
        return copy.copy(value)
    raise error
