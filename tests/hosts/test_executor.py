"""An executor with workers on other hosts, whose network is cut."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zmqexecutor import WorkerLostError, ZmqExecutor
from zmqexecutor.keys import Keys

from ..conftest import eventually
from .conftest import StartWorker
from .network import ROOT, Host, Network
from .tasks import Diary, hold_the_interpreter, note, wait_for

LOST_AFTER = 1.5

Make = Callable[..., ZmqExecutor]


@pytest.fixture
def make(endpoint: str, keys: Keys) -> Callable[..., ZmqExecutor]:
    """An executor at the endpoint, which takes a cut for one after `LOST_AFTER`."""

    def make(workers: int = 0, *arguments: Any, **options: Any) -> ZmqExecutor:
        options.setdefault("lost_after", LOST_AFTER)
        return ZmqExecutor(workers, *arguments, endpoint=endpoint, keys=keys, **options)

    return make


def hosts_of(executor: ZmqExecutor) -> list[str]:
    return sorted(worker.host for worker in executor.workers)


def by_host(diary: Diary, futures: Mapping[int, Future[int]]) -> dict[str, Future[int]]:
    """Tasks that have all started, by where they did."""
    assert eventually(lambda: {number for number, _ in diary.entries()} >= futures.keys())
    return {host: futures[number] for number, host in diary.entries() if number in futures}


def all_serve(executor: ZmqExecutor, diary: Diary, gate: Path, hosts: set[str]) -> None:
    """Have each host run a task at the same time."""
    gate.unlink(missing_ok=True)
    first = 1000
    tasks = {
        number: executor.submit(wait_for, str(diary), number, str(gate))
        for number in range(first, first + len(hosts))
    }
    assert by_host(diary, tasks).keys() == hosts
    gate.touch()
    assert [future.result(30) for future in tasks.values()] == list(tasks)


# ----------------------------------------------------------------------- all is well


def test_workers_of_three_hosts(
    alpha: Host, beta: Host, make: Make, start_worker: StartWorker, tmp_path: Path
) -> None:
    def prepare(what: str) -> None:
        os.environ["PREPARED"] = what

    def where() -> tuple[str, str]:
        time.sleep(0.01)
        return socket.gethostname(), os.environ["PREPARED"]

    def slow_where(begun: Path) -> str:
        begun.touch()
        time.sleep(0.5)
        return socket.gethostname()

    here = socket.gethostname()
    with make(1, initializer=prepare, initargs=("all",)) as executor:
        first = start_worker(alpha)
        start_worker(beta)
        executor.wait_for_workers(3, 60)
        assert hosts_of(executor) == sorted([here, "alpha", "beta"])
        found = [future.result(60) for future in [executor.submit(where) for _ in range(60)]]
        assert {host for host, _ in found} == {here, "alpha", "beta"}
        assert all(what == "all" for _, what in found)

        array = np.arange(500_000)
        shared: Any = executor.share(array)
        results = [executor.submit(np.add, array, shared) for _ in range(12)]
        assert all((result.result(60) == 2 * array).all() for result in results)
        assert list(executor.map(lambda n: n**2, range(500))) == [n**2 for n in range(500)]

        begun = [tmp_path / str(number) for number in range(3)]
        slow = [executor.submit(slow_where, path) for path in begun]
        assert eventually(lambda: all(path.exists() for path in begun))
        first.end(signal.SIGTERM)  # it finishes what it has
        assert {future.result(60) for future in slow} == {here, "alpha", "beta"}
        assert first.wait(60) == 0
        assert eventually(lambda: hosts_of(executor) == sorted([here, "beta"]))


def test_another_version_of_python_is_refused(
    alpha: Host, make: Make, start_worker: StartWorker
) -> None:
    with make(0) as executor:
        said = start_worker(alpha, python=_other_python()).communicate(timeout=60)[0]
        assert "the master refused this worker: the master runs Python 3." in said
        assert "start the worker with Python 3." in said
        assert not executor.workers


def _other_python() -> str:
    """One that has what this package needs."""
    environments = (str(path) for path in ROOT.glob(".venv*/bin/python"))
    on_path = (shutil.which(f"python3.{minor}") for minor in range(10, 20))
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import zmqexecutor.worker.calls; "
        "print(sys.version_info[:2])"
    )
    for python in (*environments, *filter(None, on_path)):
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
        if done.returncode == 0 and done.stdout.strip() != str(sys.version_info[:2]):
            return python
    pytest.skip("no other version of Python here that can import the package")


# -------------------------------------------------------------------------- cuts


@pytest.mark.parametrize("holding", [False, True], ids=["waiting", "holding the interpreter"])
def test_a_cut_while_tasks_run(
    alpha: Host,
    beta: Host,
    network: Network,
    make: Make,
    start_worker: StartWorker,
    diary: Diary,
    tmp_path: Path,
    holding: bool,
    record_property: Callable[[str, object], None],
) -> None:
    gate = tmp_path / "gate"
    here = socket.gethostname()
    for host in (alpha, beta):
        start_worker(host)
    with make(1) as executor:
        executor.wait_for_workers(3, 60)
        running = by_host(
            diary,
            {
                number: executor.submit(hold_the_interpreter, str(diary), number, 4)
                if holding
                else executor.submit(wait_for, str(diary), number, str(gate))
                for number in range(3)
            },
        )
        with network.cut(alpha):
            began = time.monotonic()
            with pytest.raises(WorkerLostError, match=r"on alpha.*network"):
                running["alpha"].result(30)
            record_property("noticed", time.monotonic() - began)
            assert hosts_of(executor) == sorted([here, "beta"])
            gate.touch()
            others = [executor.submit(note, str(diary), number) for number in range(10, 60)]
            assert [future.result(30) for future in others] == list(range(10, 60))
            assert running["beta"].result(30) in range(3)
            assert running[here].result(30) in range(3)
        executor.wait_for_workers(3, 30)
        all_serve(executor, diary, gate, {here, "alpha", "beta"})
    assert not diary.repeated()


def test_a_task_that_may_run_twice_does_so_elsewhere(
    alpha: Host,
    beta: Host,
    network: Network,
    make: Make,
    start_worker: StartWorker,
    diary: Diary,
    tmp_path: Path,
) -> None:
    """The result of the first try comes late, and is not taken."""
    gate = tmp_path / "gate"
    start_worker(alpha)
    with make(0) as executor:
        executor.wait_for_workers(1, 60)
        task = executor.options(retries=1).submit(wait_for, str(diary), 1, str(gate))
        assert eventually(lambda: diary.where(1) == "alpha")
        with network.cut(alpha):
            assert eventually(lambda: not executor.workers)
            start_worker(beta)
            assert eventually(lambda: diary.where(1) == "beta")
        gate.touch()
        assert task.result(30) == 1
        executor.wait_for_workers(2, 30)
        all_serve(executor, diary, gate, {"alpha", "beta"})
    assert [host for number, host in diary.entries() if number == 1] == ["alpha", "beta"]


def test_a_cut_before_a_worker_is_ready(
    alpha: Host,
    beta: Host,
    network: Network,
    make: Make,
    start_worker: StartWorker,
    diary: Diary,
    tmp_path: Path,
) -> None:
    """It has registered, and prepares; what it says when it is ready comes too late."""
    gate = tmp_path / "gate"
    with make(0, initializer=wait_for, initargs=(str(diary), -1, str(gate))) as executor:
        waiting = [executor.submit(note, str(diary), number) for number in range(20)]
        start_worker(alpha)
        assert eventually(lambda: diary.where(-1) == "alpha")
        with network.cut(alpha):
            assert executor._engine.master is not None
            assert eventually(lambda: not list(executor._engine.master._coordinator.roster))
            gate.touch()
            start_worker(beta)
            assert [future.result(30) for future in waiting] == list(range(20))
        executor.wait_for_workers(2, 30)
        all_serve(executor, diary, gate, {"alpha", "beta"})
    assert diary.repeated() == [-1]


def test_a_cut_while_nothing_happens(
    alpha: Host, network: Network, make: Make, start_worker: StartWorker, diary: Diary
) -> None:
    start_worker(alpha)
    with make(0) as executor:
        executor.wait_for_workers(1, 60)
        with network.cut(alpha):
            waiting = [executor.submit(note, str(diary), number) for number in range(5)]
            # The first was sent, and nobody knows whether it arrives; the others wait here.
            with pytest.raises(WorkerLostError):
                waiting[0].result(30)
            assert not executor.workers
        assert [future.result(30) for future in waiting[1:]] == [1, 2, 3, 4]
    assert not diary.repeated()
