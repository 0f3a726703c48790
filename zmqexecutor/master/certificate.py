"""How a worker ended, in words: what happened, the likely cause, its last words."""

from __future__ import annotations

import signal
from typing import Final

import msgspec

from ..errors import WorkerLostError
from ..wire.protocol import Reaped

__all__ = ["ending", "lost_error"]

_LIKELY_CAUSES: Final = {
    signal.SIGKILL: "the system ran out of memory, or somebody used kill -9",
    signal.SIGSEGV: "a fault in native code, such as an extension module",
    signal.SIGABRT: "native code gave up (abort), such as a failed assertion",
    signal.SIGBUS: "a fault in native code, or a memory-mapped file that was cut short",
    signal.SIGFPE: "an arithmetic fault in native code",
    signal.SIGILL: "native code built for another processor",
    signal.SIGTERM: "somebody asked the process to end",
    signal.SIGXCPU: "a limit on processor time",
}
_OUT_OF_MEMORY: Final = "the kernel killed it because memory ran out"


def lost_error(
    task: str,
    pid: int,
    end: Reaped | None,
    seconds: float | None,
    *,
    replaced: bool,
    host: str = "",
) -> WorkerLostError:
    """What to raise for a task whose worker died.

    Args:
        task: its name.
        pid: the worker's process id.
        end: how the worker ended, or None if nobody could tell.
        seconds: how long the task had been running, or None if that is not known.
        replaced: whether a new worker takes the place of the dead one.
        host: the name of its host, if that may be another one.
    """
    others = "the pool goes on with a new worker" if replaced else "other workers go on"
    cause = _cause(end)
    if host and not end:
        cause = "its process or its host has died, or the network between is cut"
    where = f" on {host}" if host else ""
    message = (
        f"the worker (pid {pid}{where}) that ran {task} {_how(end, seconds)}"
        f"{_because(cause)}. Only this task is lost; {others}{_last_words(end)}"
    )
    return WorkerLostError(
        message,
        job=task,
        pid=pid,
        exitcode=end.exitcode if end else None,
        stderr=end.stderr if end else "",
        seconds=seconds,
        peak_rss=(end.peak_rss or None) if end else None,
        cause=cause,
        stack=end.fault if end else "",
    )


def ending(end: Reaped) -> str:
    """How a process ended, and its last words, to follow its name in a sentence."""
    if end.exitcode != -signal.SIGKILL:
        end = msgspec.structs.replace(end, peak_rss=0)  # it says nothing here
    # An exit code has its reason in the last words: nothing of the user's ran yet.
    cause = "" if end.exitcode and end.exitcode > 0 and not end.fault else _cause(end)
    return f"{_how(end, None)}{_because(cause)}{_last_words(end)}"


def _how(end: Reaped | None, seconds: float | None) -> str:
    after = "" if seconds is None else f" after {_duration(seconds)}"
    if end is None or end.exitcode is None:
        return f"is gone{after}, how it ended is not known"
    if end.exitcode >= 0:
        what = f"ended by itself with exit code {end.exitcode}"
    else:
        what = f"was killed by {_signal_name(-end.exitcode)}"
    memory = f", having used up to {end.peak_rss / 2**20:.0f} MiB of memory" if end.peak_rss else ""
    return f"{what}{after}{memory}"


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def _cause(end: Reaped | None) -> str:
    if end is None or end.exitcode is None:
        return ""
    if end.oom_killed:
        return _OUT_OF_MEMORY
    if end.limit:
        return f"it reached a limit that the pool was given for its workers: {end.limit}"
    if end.exitcode < 0:
        return _LIKELY_CAUSES.get(-end.exitcode, "")  # type: ignore[call-overload,no-any-return]
    if end.fault:
        return "the interpreter gave up"
    if end.exitcode == 0:
        return "something called os._exit"
    return "something called os._exit, or the worker's own code failed"


def _because(cause: str) -> str:
    if not cause:
        return ""
    return f"; {'' if cause == _OUT_OF_MEMORY else 'likely cause: '}{cause}"


def _last_words(end: Reaped | None) -> str:
    text = ""
    if end and end.stderr.strip():
        text += f"\nThe last lines of its standard error:\n{end.stderr.rstrip()}"
    if end and end.fault:
        text += f"\nWhere it crashed:\n{end.fault.rstrip()}"
    return text


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
