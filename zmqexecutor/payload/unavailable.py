"""What a worker has in the place of a global that could not be sent."""

from __future__ import annotations

from typing import Any, Final

from ..worker_errors import SerializationError

__all__ = ["Unavailable"]


class Unavailable:
    """Takes the place of a global that could not be sent; any use of it says so.

    Only what debuggers, pickle and copy do with every object leaves it alone.
    """

    def __init__(self, reason: str) -> None:
        self.__dict__["reason"] = reason

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # what pickle, copy and inspect ask of everything
        return self()

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """Raise SerializationError, as does every other use."""
        raise SerializationError(self.__dict__["reason"])

    def __exit__(self, *_: object) -> None:  # "with" looks for it before it enters
        pass

    __aexit__ = __exit__


_USES: Final = """
    bool str format bytes hash fspath eq ne lt le gt ge
    int float complex index round trunc floor ceil neg pos abs invert
    add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or
    radd rsub rmul rmatmul rtruediv rfloordiv rmod rdivmod rpow rlshift rrshift rand rxor ror
    len iter next reversed contains getitem setitem delitem setattr delattr
    enter aenter await aiter anext instancecheck subclasscheck mro_entries
"""
# Python looks for these on the class, and does not ask `__getattr__`.
for _use in _USES.split():
    setattr(Unavailable, f"__{_use}__", Unavailable.__call__)
