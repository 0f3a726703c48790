"""Starts one process of a supervised group.

Imports little: a supervisor's first processes are under way before it has Circus.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
from typing import Final

from .protocol import Configure

__all__ = ["KILL_WAIT", "end_now", "launch"]

KILL_WAIT: Final = 0.5
"""Seconds in which the kernel should have ended a killed process."""

_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def launch(config: Configure, wid: int) -> subprocess.Popen[bytes]:
    """Start a process of this group with this worker id, as the leader of a session of its own.

    Raises:
        OSError, ValueError, SubprocessError: it cannot be started.
    """
    supervisor = os.getpid()

    def prepare() -> None:  # in the new process, before its program is there
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != supervisor:  # it ended before that took effect
                os._exit(1)
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


def end_now(popen: subprocess.Popen[bytes]) -> int | None:
    """Kill a process that `launch` has started, with what it started.

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
