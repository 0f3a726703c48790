"""All workloads, in the order in which they are run and shown."""

from __future__ import annotations

from benchmarks import big_data, life, real_work, script_data, small_tasks
from benchmarks.base import Workload

WORKLOADS: list[Workload] = [
    *small_tasks.WORKLOADS,
    *big_data.WORKLOADS,
    *script_data.WORKLOADS,
    *real_work.WORKLOADS,
    *life.WORKLOADS,
]
