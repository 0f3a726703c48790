"""The proof that a pickle is what it was, where there is no other: another one, compared.

It spares all the rest of a definition, and keeps nothing alive. A plain pickle would take half of
the time, but would not tell that some object in it is by now one that a global is bound to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .namespaces import Key, Payload, namespace
from .picklers import DefinitionPickler
from .proofs import Proof

__all__ = ["Pickled", "repeat"]


class Pickled(NamedTuple):
    """What is known of an entry's pickle.

    Attributes:
        says: whether another pickle, with its large buffers, is the same.
        refs: entries that it refers to.
        names: globals that code in it uses.
    """

    says: Callable[[Payload, Sequence[memoryview]], bool]
    refs: frozenset[Key]
    names: frozenset[Key]


def repeat(key: Key, is_it: Callable[[object], bool], pickled: Pickled) -> Proof:
    """The proof that the pickle of a global would be this one.

    Args:
        key: the global.
        is_it: tells the object that it is bound to from others.
        pickled: its pickle.
    """
    module, name = key

    def is_same() -> bool:
        value = namespace(module)[name]
        if not is_it(value):
            return False
        pickler = DefinitionPickler(key)
        payload = pickler.dumps(value)
        return (
            pickled.says(payload, pickler.outside.views)
            and pickled.refs == frozenset(pickler.refs)
            and pickled.names == frozenset(pickler.names)
        )

    proof = Proof()
    proof.checks[repeat, key] = is_same
    return proof
