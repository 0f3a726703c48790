"""Tasks leave nothing behind in the memory of the parent or of the workers.

`python -m benchmarks.soak --memory 1000000` is the longer version.
"""

from __future__ import annotations

import gc
from pathlib import Path

import psutil

from zmqexecutor import ZmqExecutor

from .processes import PATIENCE, Pool

ROOM = 20 * 2**20


def test_many_tasks(tmp_path: Path) -> None:
    with ZmqExecutor(2) as executor:
        pool = Pool(executor, tmp_path)

        def run(number: int) -> None:
            for _ in range(0, number, 5_000):
                for future in [executor.submit(abs, -i) for i in range(5_000)]:
                    future.result(PATIENCE)

        def sizes() -> dict[int, int]:
            gc.collect()
            pids = [psutil.Process().pid, pool.supervisor(), *pool.workers()]
            return {pid: int(psutil.Process(pid).memory_info().rss) for pid in pids}

        run(10_000)
        before = sizes()
        run(60_000)
        after = sizes()
    assert {
        pid: size - before[pid] for pid, size in after.items() if size - before[pid] > ROOM
    } == {}
