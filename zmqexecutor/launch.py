"""Starts the processes of a supervised group.

Imports little: a supervisor's first processes are under way before it has Circus.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
from typing import Final, TypeAlias

from . import prctl
from .protocol import Configure
from .template import Forked, Template, TemplateLostError

__all__ = ["KILL_WAIT", "PIPE_BYTES", "Launched", "Launcher", "end_now"]

PIPE_BYTES: Final = 64 * 1024
"""What a pipe holds."""
KILL_WAIT: Final = 0.5
"""Seconds in which the kernel should have ended a killed process."""

Launched: TypeAlias = "subprocess.Popen[bytes] | Forked"


class Launcher:
    """Starts processes by a template, if there is one, else by the group's command.

    Attributes:
        config: what the group is.
        first: processes that were started before there was a group.
    """

    def __init__(self, config: Configure, template: Template | None = None) -> None:
        self.config = config
        self.first: list[Launched] = []
        self._template = template

    def start(self, wid: int) -> Launched:
        """Start a process with this worker id, as the leader of a session of its own.

        Raises:
            OSError, ValueError, SubprocessError: it cannot be started.
        """
        if self._template is not None:
            try:
                return self._template.start()
            except TemplateLostError:
                self.close()
        return _execute(self.config, wid)

    def ended(self) -> bool:
        """Whether all of the first processes have ended; then what they wrote is passed on."""
        if not self.first or any(popen.poll() is None for popen in self.first):
            return False
        for popen in self.first:
            if popen.stderr is not None:
                os.set_blocking(popen.stderr.fileno(), False)
                with contextlib.suppress(OSError):
                    while chunk := os.read(popen.stderr.fileno(), PIPE_BYTES):
                        os.write(2, chunk)
        return True

    def close(self) -> None:
        """End the template; there are other ways to start a process."""
        template, self._template = self._template, None
        if template is not None:
            template.close()


def _execute(config: Configure, wid: int) -> subprocess.Popen[bytes]:
    supervisor = os.getpid()

    def prepare() -> None:  # in the new process, before its program is there
        prctl.die_with_parent(supervisor)
        for name, limit in (config.rlimits or {}).items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (limit, limit))

    words = {"$(circus.wid)": str(wid), "$WID": str(wid)}
    return subprocess.Popen(
        [_replace(part, words) for part in config.cmd],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE if config.capture_stderr else None,
        cwd=config.working_dir,
        env={**os.environ, **(config.env or {})},
        start_new_session=True,
        preexec_fn=prepare,
    )


def end_now(popen: Launched) -> int | None:
    """Kill a process that a `Launcher` has started, with what it started.

    Returns:
        Its exit status, or None if it does not end (it may have become another user's).
    """
    if popen.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(popen.pid, signal.SIGKILL)
    try:
        return popen.wait(KILL_WAIT)
    except subprocess.TimeoutExpired:
        return None


def _replace(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(word, value)
    return text
