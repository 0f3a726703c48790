"""What an executor has its workers prepare: its own settings, and the initializer."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from multiprocessing import process
from multiprocessing.process import current_process

import msgspec

from ..system import interpreter
from ..wire.protocol import CALLS, Preloaded, check_service
from .inheritance import Descriptor, share_tracker, tracker

__all__ = ["Initializer", "Setup", "boot_code", "call_service", "main_of_workers"]


def call_service(name: str | None) -> str:
    """The service of an executor's calls for which some workers are special.

    Raises:
        TypeError: the name is not text.
        ValueError: it is too short or too long.
    """
    if name is None:
        return CALLS
    return f"{CALLS}/{check_service(name, 200)}"


class Initializer(msgspec.Struct, frozen=True):
    """The call that each worker makes before its first task."""

    function_id: bytes
    function: bytes
    data: bytes
    buffers: list[bytes]
    shares: list[tuple[bytes, bytes]] = []
    """Keys and contents of what it uses."""


class Setup(msgspec.Struct, frozen=True):
    """What a worker takes over from the process of the executor, at its first submit.

    Text is encoded by `os.fsencode`, since it may hold names that are not UTF-8.
    """

    argv: list[bytes]
    path: list[bytes]
    """The module search path, in its order; as in the parent."""
    directory: bytes | None
    """The working directory, unless it has been removed."""
    environment: dict[bytes, bytes]
    pid: int
    authkey: bytes
    """multiprocessing's, so that a Manager's proxies work in tasks."""
    umask: int
    initializer: Initializer | None
    tracker: Descriptor | None = None
    """multiprocessing's resource tracker, to be shared."""
    segments: bool = False
    """Whether big buffers go through segments."""
    kept_mappings: int = 0
    """Bytes of segments that a worker may keep mapped."""
    max_memory: int = 0
    """Bytes of memory with which a worker wants to be replaced; 0 for no limit."""
    elsewhere: bool = False
    """Whether it is for workers that are not of the executor's own group."""

    @classmethod
    def of_this_process(
        cls,
        initializer: Initializer | None,
        *,
        segments: bool,
        kept_mappings: int,
        max_memory: int,
    ) -> Setup:
        """What there is to be taken over now."""
        umask = os.umask(0o077)
        os.umask(umask)
        try:
            directory = os.getcwdb()
        except FileNotFoundError:
            directory = None
        return cls(
            argv=[os.fsencode(argument) for argument in sys.argv],
            path=[os.fsencode(entry) for entry in interpreter.search_path()],
            directory=directory,
            environment=dict(os.environb),
            pid=os.getpid(),
            authkey=bytes(current_process().authkey),
            umask=umask,
            initializer=initializer,
            tracker=tracker(),
            segments=segments,
            kept_mappings=kept_mappings,
            max_memory=max_memory,
        )

    @classmethod
    def for_others(cls, initializer: Initializer | None, *, max_memory: int) -> Setup:
        """What workers get that somebody else has started, on other hosts for example.

        Nothing that may be secret, such as the environment, or that means something on
        this host only.
        """
        return cls(
            argv=[],
            path=[os.fsencode(entry) for entry in interpreter.search_path()],
            directory=None,
            environment={},
            pid=0,
            authkey=b"",
            umask=0,
            initializer=initializer,
            max_memory=max_memory,
            elsewhere=True,
        )

    def take_over(self) -> None:
        """Make this process a likeness of that one, as far as it is to be."""
        if self.elsewhere:
            # Its own modules first; then the parent's, where the folders are the same.
            known = set(interpreter.search_path())
            path = [os.fsdecode(entry) for entry in self.path]
            sys.path += [entry for entry in path if entry not in known and os.path.exists(entry)]
            return
        sys.argv[:] = [os.fsdecode(argument) for argument in self.argv]
        sys.path[:] = [os.fsdecode(entry) for entry in self.path]
        if self.directory is not None:
            os.chdir(self.directory)
        if os.environb != self.environment:
            os.environb.clear()
            os.environb.update(self.environment)
        os.umask(self.umask)
        current_process().authkey = self.authkey
        self._become_a_child()
        if self.tracker is not None:
            share_tracker(self.tracker)

    def _become_a_child(self) -> None:
        """Have multiprocessing, and records of logging, know this process for a worker."""
        current_process().name = f"ZmqExecutorWorker-{os.getpid()}"
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                sentinel = os.pidfd_open(self.pid)  # readable when that process has ended
                process._parent_process = process._ParentProcess(  # type: ignore[attr-defined]
                    "MainProcess", self.pid, sentinel
                )


def main_of_workers(endpoint: str, journals: str, rlimits: dict[str, int]) -> Preloaded:
    """What this process's own workers do.

    The resource limits are set by the supervisor; the worker names them in errors.
    """
    return Preloaded(
        interpreter.WORKER, "main", [endpoint, journals, rlimits, interpreter.depth + 1]
    )


def boot_code(path: Sequence[str], main: Preloaded) -> str:
    """Source for `python -c` that does this with this module search path."""
    return (
        f"import sys; sys.path[:] = {list(path)!r}; "
        f"from {main.module} import {main.function} as main; main(*{main.arguments!r})"
    )
