"""Which machine is this, and what may we use of it."""

from __future__ import annotations

import contextlib
import math
import os
from functools import lru_cache

__all__ = ["machine_id", "usable_cpus"]


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
    try:
        with open("/proc/self/cgroup") as file:
            group = next(line[3:].strip() for line in file if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    while True:
        with contextlib.suppress(OSError, ValueError):
            with open(f"/sys/fs/cgroup{group.rstrip('/')}/cpu.max") as file:
                limit, period = file.read().split()
            if limit != "max":
                quotas.append(int(limit) / int(period))
        if group in ("", "/"):
            return min(quotas, default=None)
        group = os.path.dirname(group)
