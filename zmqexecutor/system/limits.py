"""Resource limits of processes: their names, and what they do when they strike."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Mapping

__all__ = ["check_rlimits", "refusal", "teller"]

_LARGEST = 2**63 - 1
_MEMORY = ("as", "data")
_BY_ERRNO = {errno.EMFILE: ("nofile",), errno.EFBIG: ("fsize",), errno.ENOMEM: _MEMORY}


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
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"the resource limit {name!r} must be an int, not {value!r}")
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

    It returns an empty text for other exceptions.
    """

    def tell(error: BaseException) -> str:
        names: tuple[str, ...] = ()
        if isinstance(error, MemoryError):
            names = _MEMORY
        elif isinstance(error, OSError):
            names = _BY_ERRNO.get(error.errno or 0, ())
        struck = [f"{name}={rlimits[name]}" for name in names if name in rlimits]
        if not struck:
            return ""
        return f"(The workers' resource limits may be the cause: {', '.join(struck)})\n"

    return tell
