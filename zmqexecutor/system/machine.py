"""Which machine is this, and what may we use of it."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from functools import lru_cache

__all__ = ["machine_id", "oom_kills", "resident_memory", "usable_cpus"]


@lru_cache(maxsize=1)
def machine_id() -> str:
    """Equal for processes that share process ids and the files of this host."""
    parts = [os.uname().nodename]
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        parts.append(file.read().strip())
    for namespace in ("pid", "mnt"):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(f"/proc/self/ns/{namespace}"))
    return " ".join(parts)


def usable_cpus() -> int:
    """How many processors this process may use: affinity and control group respected."""
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    quota = _control_group_quota()
    return max(1, cpus if quota is None else min(cpus, math.ceil(quota)))


def _control_group_quota() -> float | None:
    """Processors that the control groups (v2) of this process allow, or None.

    `cpu.max` holds microseconds of processor time and the period they are for:
    https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files
    """
    quotas = []
    for group in _control_groups("/"):
        with contextlib.suppress(OSError, ValueError):
            with open(f"{group}/cpu.max") as file:
                limit, period = file.read().split()
            if limit != "max":
                quotas.append(int(limit) / int(period))
    return min(quotas, default=None)


def oom_kills(root: str = "/") -> int:
    """How many processes the kernel has killed for want of memory.

    Counted are those in this process's control group and the groups below it, or in
    the nearest group above that has a count, or else on the whole system.

    Args:
        root: where /proc and /sys are.
    """
    counters = [f"{group}/memory.events" for group in _control_groups(root)]
    for path in (*counters, os.path.join(root, "proc/vmstat")):
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            for line in file:
                name, _, number = line.partition(" ")
                if name == "oom_kill":
                    return int(number)
    return 0


def _control_groups(root: str) -> Iterator[str]:
    """The directories of the control groups (v2) of this process, the innermost first."""
    try:
        with open(os.path.join(root, "proc/self/cgroup")) as file:
            group = next(line[3:].strip() for line in file if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    top = os.path.join(root, "sys/fs/cgroup")
    while group not in ("", "/"):
        yield top + group
        group = os.path.dirname(group)
    yield top


def resident_memory() -> int:
    """How many bytes of memory this process uses now; where nobody tells, its peak."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
