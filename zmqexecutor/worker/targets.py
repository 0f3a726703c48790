"""Workers of the seed's kind: a target for each service, and state that it may need."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ..wire import codecs
from ..wire.protocol import Frame, Job
from .handler import Outcome

__all__ = ["Initializer", "Target", "TargetHandler"]

Target: TypeAlias = Callable[..., Any]
"""Called with `[job_id, data]`, and the state if the worker has an initializer."""
Initializer: TypeAlias = Callable[..., Any]


class TargetHandler:
    """Hands `[job_id, data]` to the target of the job's service."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        initializer: Initializer | None = None,
        initargs: tuple[Any, ...] = (),
        teardown: Callable[[Any], object] | None = None,
        *,
        allow_pickle: bool = False,
    ) -> None:
        self.services = tuple(targets)
        self._targets = dict(targets)
        self._initializer = initializer
        self._initargs = initargs
        self._teardown = teardown
        self._codecs = codecs.SAFE | ({"pickle"} if allow_pickle else set())
        self._state: tuple[Any, ...] | None = None if initializer else ()

    def setup(self, data: bytes) -> None:  # noqa: ARG002
        """Make the state that targets use, once, for the first master."""
        if self._state is None:
            assert self._initializer is not None
            self._state = (self._initializer(*self._initargs),)

    def teardown(self) -> None:
        """Give back what that state holds."""
        if self._teardown is not None and self._state is not None:
            self._teardown(*self._state)

    def define(self, key: bytes, data: bytes) -> None:
        """Not used by these jobs."""

    def forget(self, key: bytes) -> None:
        """Not used by these jobs."""

    def run(self, job: Job, buffers: Sequence[Frame]) -> Outcome:  # noqa: ARG002
        """Call the target, and make its exception the outcome."""
        try:
            target = self._targets[job.service or self.services[0]]
            if job.codec not in self._codecs:
                raise ValueError(self._refusal(job.codec))
            assert self._state is not None
            result = target([job.id, codecs.decode(job.data, job.codec)], *self._state)
            data, codec = codecs.encode(result, job.codec if job.codec in codecs.CODECS else None)
            return Outcome(True, data, codec)
        except KeyboardInterrupt:
            raise  # meant for this process
        except BaseException:  # `sys.exit()` in a target, too, is the job's own failure
            return Outcome(False, traceback.format_exc().encode(errors="replace"), codecs.TEXT)

    def _refusal(self, codec: str) -> str:
        if codec == "pickle":
            return (
                "this worker does not unpickle what it is sent; if it can trust all who may "
                "send it jobs, start it with allow_pickle=True"
            )
        return f"this worker does not know the codec {codec!r}"
