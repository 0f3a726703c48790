"""Resource limits of processes: their names, and what they do when they strike."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Mapping
from typing import Final

from .arguments import check_integer

__all__ = ["check_rlimits", "refusal", "teller"]

_LARGEST = 2**63 - 1
_MEMORY = ("as", "data")
_BY_ERRNO = {errno.EMFILE: ("nofile",), errno.EFBIG: ("fsize",), errno.ENOMEM: _MEMORY}


_errno_of: Final[Callable[[OSError], object]] = vars(OSError)["errno"].__get__
"""What the exception was made with, whatever its class makes of it."""


def check_rlimits(rlimits: Mapping[str, int] | None) -> dict[str, int] | None:
    """Return the limits as a dict, or None if there are none.

    Raises:
        TypeError: a limit is not an int.
        ValueError: the system has no limit of that name, or the number is impossible.
    """
    for name, value in (rlimits or {}).items():
        if name not in (known := _known()):
            raise ValueError(
                f"there is no resource limit {name!r} here; there are " + ", ".join(sorted(known))
            )
        check_integer(f"the resource limit {name!r}", value)
        if not 0 <= value <= _LARGEST:
            raise ValueError(f"the resource limit {name!r} must be 0 to {_LARGEST}, not {value}")
    return dict(rlimits) if rlimits else None


def _known() -> dict[str, int]:
    prefix = "RLIMIT_"
    return {
        name.removeprefix(prefix).lower(): getattr(resource, name)
        for name in dir(resource)
        if name.startswith(prefix)
    }


def refusal(rlimits: Mapping[str, int]) -> str:
    """Why the system refused to set these limits."""
    hard = {name: resource.getrlimit(_known()[name])[1] for name in rlimits}
    over = [
        f"{name}={value} (at most {hard[name]})"
        for name, value in rlimits.items()
        if hard[name] != resource.RLIM_INFINITY and value > hard[name]
    ]
    what = over or [f"{name}={value}" for name, value in rlimits.items()]
    return f"the system refuses the resource limits {', '.join(what)}; give lower ones"


def teller(rlimits: Mapping[str, int]) -> Callable[[BaseException], str]:
    """Return what says, in a line, that an exception came of one of these limits.

    It returns an empty text for other exceptions, and never raises.
    """

    def tell(error: BaseException) -> str:
        names: tuple[str, ...] = ()
        if isinstance(error, MemoryError):
            names = _MEMORY
        elif isinstance(error, OSError):
            number = _errno_of(error)
            names = _BY_ERRNO.get(number, ()) if type(number) is int else ()
        struck = [f"{name}={rlimits[name]}" for name in names if name in rlimits]
        if not struck:
            return ""
        return f"(The workers' resource limits may be the cause: {', '.join(struck)})\n"

    return tell
