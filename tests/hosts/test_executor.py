"""An executor with workers on other hosts, whose network is cut."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from zmqexecutor import WorkerLostError, ZmqExecutor
from zmqexecutor.keys import Keys

from ..conftest import eventually
from .conftest import StartWorker
from .network import Host, Network
from .tasks import Diary, hold_the_interpreter, note, wait_for

LOST_AFTER = 1.5


def one_on_each(
    executor: ZmqExecutor, diary: Diary, gate: Path, hosts: int
) -> dict[str, Future[int]]:
    """Tasks that run until the gate is there, by host."""
    futures = [executor.submit(wait_for, str(diary), n, str(gate)) for n in range(hosts)]
    assert eventually(lambda: len(diary.entries()) == hosts)
    return {host: futures[number] for number, host in diary.entries()}


@pytest.mark.parametrize("holding", [False, True], ids=["waiting", "holding the interpreter"])
def test_a_cut_while_tasks_run(
    alpha: Host,
    beta: Host,
    network: Network,
    endpoint: str,
    keys: Keys,
    start_worker: StartWorker,
    diary: Diary,
    tmp_path: Path,
    holding: bool,
    record_property: Any,
) -> None:
    gate = tmp_path / "gate"
    start_worker(alpha)
    start_worker(beta)
    with ZmqExecutor(0, endpoint=endpoint, keys=keys, lost_after=LOST_AFTER) as executor:
        executor.wait_for_workers(2, 30)
        if holding:
            futures = {n: executor.submit(hold_the_interpreter, str(diary), n, 4) for n in (0, 1)}
            assert eventually(lambda: len(diary.entries()) == 2)
            running = {host: futures[n] for n, host in diary.entries()}
        else:
            running = one_on_each(executor, diary, gate, 2)
        cut_at = time.monotonic()
        with network.cut(alpha):
            with pytest.raises(WorkerLostError, match="on alpha.*network"):
                running["alpha"].result(30)
            noticed = time.monotonic() - cut_at
            record_property("noticed", noticed)
            print("noticed", noticed)
            gate.touch()
            running["beta"].result(30)
            assert [w.host for w in executor.workers] == ["beta"]
            later = [executor.submit(note, str(diary), n) for n in range(10, 60)]
            assert [f.result(30) for f in later] == list(range(10, 60))
        restored_at = time.monotonic()
        executor.wait_for_workers(2, 30)
        print("back", time.monotonic() - restored_at)
        gate.unlink(missing_ok=True)
        t = [executor.submit(wait_for, str(diary), n, str(gate)) for n in (100, 101)]
        assert eventually(lambda: {diary.where(100), diary.where(101)} == {"alpha", "beta"})
        gate.touch()
        assert [f.result(30) for f in t] == [100, 101]
    assert not diary.repeated()
