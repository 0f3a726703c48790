"""What a worker does with jobs: the one thing in which kinds of worker differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from ..wire.protocol import Frame, Job, Segment

__all__ = ["Handler", "Outcome"]


class Outcome(msgspec.Struct, frozen=True):
    """How a job ended, for the wire."""

    ok: bool
    data: bytes
    codec: str = ""
    buffers: Sequence[Frame] = ()
    segment: Segment | None = None
    """Where its buffers are, if not there."""
    kept: bool = False
    """Whether something still uses the job's segment."""
    worn: str = ""
    """Why the worker should be replaced now, if so."""


class Handler(Protocol):
    """It knows what the data of jobs means; the worker only carries it."""

    @property
    def services(self) -> Sequence[str]:
        """What is offered."""

    def setup(self, data: bytes) -> None:
        """Prepare for the jobs of a master; an exception makes the worker give up."""

    def define(self, key: bytes, data: bytes) -> None:
        """Keep data that several jobs will name by this key."""

    def forget(self, key: bytes) -> None:
        """Drop it."""

    def run(self, job: Job, buffers: Sequence[Frame]) -> Outcome:
        """Run a job. What the job raises is an outcome, not an exception."""

    def teardown(self) -> None:
        """The worker ends; called once, if `setup` was."""
