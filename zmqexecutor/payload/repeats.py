"""The proof that a pickle is what it was, where there is no other: another one, compared.

It spares all the rest of a definition, and does not keep alive what the global is bound to.
If others can import all that is in it, a plain pickle does, which takes half of the time.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from ..wire.comparison import same
from .bulk import Outside
from .namespaces import Key, Payload, namespace
from .picklers import DefinitionPickler
from .proofs import Proof

__all__ = ["Pickled", "repeat"]

_LARGEST_PLAIN: Final = 64 * 1024
"""Bytes of a plain pickle, without large buffers, that is kept beside the other."""


class Pickled(NamedTuple):
    """What is known of an entry's pickle.

    Attributes:
        says: whether another pickle, with its large buffers, is the same.
        buffers: the large buffers, as they were packed.
        refs: entries that it refers to.
        names: globals that code in it uses.
        importable: whether others can import all functions and classes that are in it.
    """

    says: Callable[[Payload, Sequence[memoryview]], bool]
    buffers: Sequence[memoryview]
    refs: frozenset[Key]
    names: frozenset[Key]
    importable: bool


def repeat(key: Key, is_it: Callable[[object], bool], pickled: Pickled) -> Proof:
    """The proof that the pickle of a global would be this one.

    Args:
        key: the global.
        is_it: tells the object that it is bound to from others.
        pickled: its pickle.
    """
    module, name = key
    plain = _plain_pickle(namespace(module)[name], pickled)

    def is_same() -> bool:
        value = namespace(module)[name]
        if not is_it(value):
            return False
        if plain is not None:
            data, views = _dump_plainly(value)
            return data == plain and _are_same(views, pickled.buffers)
        pickler = DefinitionPickler(key)
        payload = pickler.dumps(value)
        return (
            pickled.says(payload, pickler.outside.views)
            and pickled.refs == frozenset(pickler.refs)
            and pickled.names == frozenset(pickler.names)
        )

    proof = Proof()
    proof.bind(pickled.refs)
    proof.checks[repeat, key] = is_same
    return proof


def _plain_pickle(value: object, pickled: Pickled) -> bytes | None:
    if pickled.refs or not pickled.importable:
        return None
    try:
        data, views = _dump_plainly(value)
    except Exception:
        return None
    small = len(data) <= _LARGEST_PLAIN
    return data if small and _are_same(views, pickled.buffers) else None


def _dump_plainly(value: object) -> tuple[bytes, list[memoryview]]:
    outside = Outside()
    return pickle.dumps(value, 5, buffer_callback=outside), outside.views


def _are_same(views: Sequence[memoryview], others: Sequence[memoryview]) -> bool:
    return len(views) == len(others) and all(map(same, views, others))
