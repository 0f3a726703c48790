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

__all__ = ["Pickled", "PlainPickle", "repeat"]

_LARGEST_PLAIN: Final = 64 * 1024
"""Bytes of a plain pickle, without large buffers, that is kept beside the other."""


class PlainPickle(NamedTuple):
    """A pickle as `pickle` makes it, and its large buffers."""

    data: bytes
    views: Sequence[memoryview]

    @classmethod
    def of(cls, value: object) -> PlainPickle | None:
        """None if there is none, or a large one."""
        try:
            plain = cls(*_dump_plainly(value))
        except Exception:
            return None
        return plain if len(plain.data) <= _LARGEST_PLAIN else None


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


def repeat(
    key: Key, is_it: Callable[[object], bool], before: PlainPickle | None, pickled: Pickled
) -> Proof:
    """The proof that the pickle of a global would be this one.

    Args:
        key: the global.
        is_it: tells the object that it is bound to from others.
        before: a plain pickle that was made before: what changes in between is seen later.
        pickled: its pickle.
    """
    module, name = key
    plain = before.data if before is not None and _will_do(before, pickled) else None

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


def _will_do(plain: PlainPickle, pickled: Pickled) -> bool:
    importable = pickled.importable and not pickled.refs
    return importable and _are_same(plain.views, pickled.buffers)


def _dump_plainly(value: object) -> tuple[bytes, list[memoryview]]:
    outside = Outside()
    return pickle.dumps(value, 5, buffer_callback=outside), outside.views


def _are_same(views: Sequence[memoryview], others: Sequence[memoryview]) -> bool:
    return len(views) == len(others) and all(map(same, views, others))
