"""What a `ZmqExecutor` can be asked for, checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .system.limits import check_rlimits
from .system.machine import usable_cpus
from .wire.liveness import LOST_AFTER

if TYPE_CHECKING:
    from .keys import Keys

__all__ = ["PoolSettings"]


class PoolSettings(NamedTuple):
    """The arguments of `ZmqExecutor`, whose docstring tells what they mean."""

    max_workers: int
    initializer: Callable[..., object] | None = None
    initargs: tuple[Any, ...] = ()
    max_tasks_per_child: int | None = None
    max_worker_memory: int | None = None
    worker_rlimits: Mapping[str, int] | None = None
    endpoint: str | None = None
    work_address: str | None = None
    lost_after: float = LOST_AFTER
    keys: Keys | str | os.PathLike[str] | None = None
    allow_plaintext_tcp_from_anyone: bool = False

    @property
    def joinable(self) -> bool:
        """Whether workers can join that something else has started."""
        return self.endpoint is not None

    @classmethod
    def checked(cls, max_workers: int | None, **others: Any) -> PoolSettings:
        """Return them, but for what is checked where an endpoint is opened.

        Raises:
            TypeError: one has the wrong type.
            ValueError: one is out of range, or cannot go with the others.
        """
        settings = cls(usable_cpus() if max_workers is None else max_workers, **others)
        if not settings.joinable:
            if settings.work_address is not None:
                raise ValueError("work_address is the second address of an endpoint: give that too")
            if settings.keys is not None or settings.allow_plaintext_tcp_from_anyone:
                raise ValueError("keys are for an endpoint on tcp://: give that too")
        _check_max_workers(settings.max_workers, joinable=settings.joinable)
        if settings.initializer is not None and not callable(settings.initializer):
            raise TypeError("initializer must be a callable")
        if settings.max_tasks_per_child is not None:
            if not isinstance(settings.max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            if settings.max_tasks_per_child <= 0:
                raise ValueError("max_tasks_per_child must be >= 1")
        if (memory := settings.max_worker_memory) is not None:
            if isinstance(memory, bool) or not isinstance(memory, int):
                raise TypeError("max_worker_memory must be an integer, in bytes")
            if memory <= 0:
                raise ValueError("max_worker_memory must be > 0 bytes")
        return settings._replace(worker_rlimits=check_rlimits(settings.worker_rlimits))


def _check_max_workers(max_workers: int, *, joinable: bool) -> None:
    if not isinstance(max_workers, int):
        raise TypeError(f"max_workers must be an integer, not {type(max_workers).__name__}")
    if max_workers == 0 and joinable:
        return
    if max_workers <= 0:
        raise ValueError("max_workers must be greater than 0")
