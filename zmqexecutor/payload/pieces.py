"""An entry of a definition in the making: its pickle, its proof, and its place among the others.

What they hold tells in which order a worker binds them, whose digest depends on whose, and
which have to be in one pickle.
"""

from __future__ import annotations

import functools
import pickle
import types
from collections.abc import Collection, Sequence
from typing import NamedTuple

from .bulk import BULK, Bulk
from .checks import CONTAINERS, is_imported
from .digests import digest_of
from .imports import Import
from .namespaces import MISSING, Key, Payload, class_by_id, importable, is_class, namespace
from .picklers import DefinitionPickler
from .proofs import Proof, prove
from .unavailable import Unavailable

__all__ = [
    "Piece",
    "describe_key",
    "describe_unavailable",
    "in_groups",
    "in_order",
    "make_import",
    "make_piece",
    "make_unavailable",
    "reach",
]


class Piece(NamedTuple):
    """An entry, or the root of a definition, in the making."""

    payload: Payload
    digest: bytes
    refs: frozenset[Key]
    names: frozenset[Key]
    is_class: bool
    proof: Proof | None
    available: bool = True
    bulk: Bulk | None = None
    """What the payload names, if it is too large to be there itself."""
    inlined: frozenset[int] = frozenset()
    """See `DefinitionPickler`."""
    proxies: tuple[object, ...] = ()
    """See `ArgumentPickler`."""

    def says(self, payload: Payload, views: Sequence[memoryview]) -> bool:
        """Whether this is its pickle, with these large buffers."""
        if self.bulk is None:
            return payload == self.payload and not views
        return len(payload) == 1 and self.bulk.says(payload[0], views)


def describe_key(key: Key) -> str:
    """What it is the key of, in words."""
    module, name = key
    if module:
        return f"the global {name!r} of {module}"
    return f"the class {getattr(class_by_id(name), '__qualname__', name)}"


def make_import(key: Key, value: object, origin: Key, otherwise: object) -> Piece:
    """Of a global that has been imported, and that a copy cannot stand for."""
    reference = Import(origin, value, otherwise)
    piece = make_piece(reference, key, proven=False)[0]
    proof = Proof()
    proof.bind((key, *piece.refs))
    proof.checks[origin] = functools.partial(is_imported, *origin, id(value))
    return piece._replace(proof=proof)


def describe_unavailable(key: Key, error: BaseException) -> str:
    """What a task is told that uses it."""
    try:
        why = str(error)[:2000]
    except Exception:
        why = type(error).__name__
    return f"{describe_key(key)} cannot be used in a worker, as it cannot be pickled: {why}"


def make_unavailable(key: Key, error: BaseException) -> Piece:
    """What stands for a global that cannot be pickled."""
    value = namespace(key[0]).get(key[1], MISSING) if key[0] else MISSING
    reason = describe_unavailable(key, error)
    piece = make_piece(Unavailable(reason), None)[0]._replace(available=False)
    # A lock or a pool stays what it is. What else holds something may come to hold another thing.
    kind = type(value)
    replaceable = (
        kind in CONTAINERS
        or issubclass(kind, (type, types.FunctionType, Collection))
        or (kind.__module__ != "builtins" and not importable(kind))
    )
    if piece.proof is None or replaceable:
        return piece._replace(proof=None)
    piece.proof.bind([key])
    return piece


def make_piece(
    value: object, key: Key | None, *, proven: bool = True
) -> tuple[Piece, bytes, list[memoryview]]:
    """A piece, without its payload if that is bulk: then it follows, with its buffers."""
    # The proof comes first: what changes after it is seen at the next call.
    proof = prove(value, weakly=key is None) if proven else None
    pickler = DefinitionPickler(key)
    payload = pickler.dumps(value)
    refs = frozenset(pickler.refs)
    if proof is not None:
        proof.bind(refs if key is None else (*refs, key))
        if not proof.holds():
            proof = None  # another thread has changed it meanwhile, and may change it back
    names = frozenset(pickler.names)
    views, data = pickler.outside.views, b""
    if len(payload) == 1 and (views or len(payload[0]) >= BULK):
        data, payload = payload[0], ()
    inlined = frozenset(pickler.inlined)
    digest = digest_of(*payload)
    piece = Piece(payload, digest, refs, names, is_class(value), proof, inlined=inlined)
    if pickler.proxies:
        piece = piece._replace(proxies=pickler.take_proxies())
    return piece, data, views


def in_order(pieces: dict[Key, Piece]) -> list[Key]:
    """The order in which a worker binds entries: first what others hold, or their code names.

    That code may run when an object is unpickled: a `__setstate__`, say, or a `__hash__`.
    """
    ordered: dict[Key, None] = {}
    begun: set[Key] = set()
    todo = sorted(pieces, reverse=True)
    while todo:
        key = todo[-1]
        if key in begun:
            todo.pop()
            ordered[key] = None
        else:
            begun.add(key)
            piece = pieces[key]
            needed = (piece.refs | piece.names) & pieces.keys()
            todo += sorted(needed - begun, reverse=True)
    return list(ordered)


def reach(pieces: dict[Key, Piece], start: Key) -> set[Key]:
    """Return the entries whose objects this one holds, and itself.

    Classes do not count. One that is sent again changes in place, so who holds it
    need not be sent again.
    """
    reached = {start}
    todo = list(pieces[start].refs)
    while todo:
        key = todo.pop()
        if key not in reached and not pieces[key].is_class:
            reached.add(key)
            todo.extend(pieces[key].refs)
    return reached


def in_groups(pieces: dict[Key, Piece]) -> dict[Key, Piece]:
    """Put objects that hold each other into one pickle.

    References between entries are resolved one entry at a time. A class is there
    to be referred to before its contents are, nothing else is.
    """
    holders = {key: reach(pieces, key) for key, piece in pieces.items() if piece.refs}
    grouped = dict(pieces)
    for key, held in holders.items():
        group = sorted(other for other in held if key in holders.get(other, ()))
        if grouped[key] is not pieces[key] or not _is_cycle(pieces, key, group):
            continue
        pickler = DefinitionPickler(key, frozenset(group))
        values = tuple(namespace(module).get(name) for module, name in group)
        payload = (*pickler.dumps(values), pickle.dumps(group, 5), b"")
        digest = digest_of(*payload, *(pieces[member].digest for member in group))
        for member in group:
            grouped[member] = pieces[member]._replace(
                payload=payload, digest=digest, refs=frozenset(pickler.refs), bulk=None
            )
    return grouped


def _is_cycle(pieces: dict[Key, Piece], key: Key, group: list[Key]) -> bool:
    return not pieces[key].is_class and (len(group) > 1 or key in pieces[key].refs)
