"""Starts the processes of a supervised group.

Imports little: a supervisor's first processes are under way before it has Circus.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
from collections.abc import Container
from typing import Final, TypeAlias

from ..wire.protocol import Configure
from . import prctl
from .template import Forked, Template, TemplateLostError

__all__ = ["KILL_WAIT", "NUMBER", "Launched", "Launcher", "end_now", "with_number"]

KILL_WAIT: Final = 0.5
"""Seconds in which the kernel should have ended a killed process."""
NUMBER: Final = "$(circus.wid)"
"""What Circus calls the number of a process in its command. We also know it as `$WID`."""

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
        self._adopts = template is not None

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

    def is_over(self) -> bool:
        """Whether all of the first processes have ended, and left nothing to be passed on."""
        for popen in self.first:
            if popen.returncode is None and not _has_ended(popen.pid):
                return False
            assert popen.stderr is not None
            poll = select.poll()
            poll.register(popen.stderr, select.POLLIN)
            if any(event & select.POLLIN for _, event in poll.poll(0)):
                return False
        return bool(self.first)

    def reap_others(self, known: Container[int]) -> None:
        """Wait for children that have ended and are none of these, nor of the first.

        The supervisor adopts orphans while it has the template make a process: what a
        worker has left running may be among them.
        """
        if not self._adopts:
            return
        first = [popen.pid for popen in self.first]
        while (pid := _who_has_ended()) and pid not in known and pid not in first:
            if self._template is not None and self._template.pid == pid:
                self.close()
            else:
                os.waitpid(pid, 0)

    def close(self) -> None:
        """End the template; there are other ways to start a process."""
        template, self._template = self._template, None
        if template is not None:
            template.close()


def _has_ended(pid: int) -> bool:
    """Whether a child has; it is not waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _who_has_ended() -> int:
    """The id of a child that has ended and was not waited for, or 0."""
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return ended.si_pid if ended else 0


def with_number(part: str, number: int | str) -> str:
    """Put the number of a process into an argument of its command, where that asks for it."""
    return part.replace(NUMBER, str(number)).replace("$WID", str(number))


def _execute(config: Configure, wid: int) -> subprocess.Popen[bytes]:
    supervisor = os.getpid()

    def prepare() -> None:  # in the new process, before its program is there
        prctl.die_with_parent(supervisor)
        for name, limit in (config.rlimits or {}).items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (limit, limit))

    return subprocess.Popen(
        [with_number(part, wid) for part in config.cmd],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
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
