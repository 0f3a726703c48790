"""Bad links: slow ones, lossy ones, short cuts, and ports that a firewall keeps closed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zmqexecutor import WorkerLostError, ZmqExecutor
from zmqexecutor.keys import Keys

from ..conftest import eventually
from .conftest import StartWorker
from .network import Cut, Host, Network, free_port
from .tasks import Diary, note, random_bytes, wait_for

SIZE = 3_000_000
"""Bytes that take two seconds on the slow link."""

Join = Callable[..., ZmqExecutor]


@pytest.fixture
def slow(alpha: Host, network: Network) -> Host:
    """A host with 14 Mbit a second."""
    try:
        network.slow_down(alpha, 14_000_000)
    except OSError as error:
        pytest.skip(str(error))
    return alpha


@pytest.fixture
def join(endpoint: str, keys: Keys, start_worker: StartWorker) -> Iterator[Join]:
    """Make an executor with one worker, on this host."""
    with ExitStack() as stack:

        def make(host: Host, lost_after: float = 1, **options: Any) -> ZmqExecutor:
            made = ZmqExecutor(0, endpoint=endpoint, keys=keys, lost_after=lost_after, **options)
            stack.enter_context(made)
            start_worker(host)
            made.wait_for_workers(1, 30)
            return made

        yield make


# ------------------------------------------------------------------------ slow ones


def test_big_data_may_take_longer_than_silence(slow: Host, join: Join) -> None:
    """While a large message is on its way, nothing else comes on its connection."""
    executor = join(slow)
    (worker,) = executor.workers
    data = random_bytes(SIZE)
    assert executor.submit(len, data).result(60) == SIZE
    assert bytes(executor.submit(random_bytes, SIZE).result(60)) == bytes(data)
    assert [w.id for w in executor.workers] == [worker.id]


@pytest.mark.parametrize("direction", ["to", "from"])
def test_a_cut_in_the_middle_of_a_large_message(
    slow: Host, network: Network, join: Join, direction: str
) -> None:
    executor = join(slow)
    before = slow.traffic()

    def begun() -> bool:
        received, sent = slow.traffic()
        return max(received - before[0], sent - before[1]) > SIZE // 5

    data = random_bytes(SIZE if direction == "to" else 10)
    once, twice = (
        (view.submit(len, data) if direction == "to" else view.submit(random_bytes, SIZE))
        for view in (executor, executor.options(retries=1))
    )
    assert eventually(begun)
    with network.cut(slow):
        with pytest.raises(WorkerLostError):
            once.result(30)
        assert not executor.workers
    result = twice.result(60)
    assert result == SIZE if isinstance(result, int) else len(result) == SIZE


# ------------------------------------------------------------ short cuts, and lossy ones


@contextmanager
def flickering(cut: Cut, off: float, on: float) -> Iterator[Callable[[], int]]:
    """Make and restore a cut again and again; how often it has been made."""
    ended = threading.Event()
    times = 0

    def flicker() -> None:
        nonlocal times
        while not ended.wait(on):
            with cut:
                ended.wait(off)
            times += 1

    thread = threading.Thread(target=flicker)
    thread.start()
    try:
        yield lambda: times
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    ("off", "on", "cuts"), [(0.03, 0.1, 20), (0.7, 2.5, 2)], ids=["lossy", "short cuts"]
)
def test_nothing_is_lost(
    alpha: Host, network: Network, join: Join, diary: Diary, off: float, on: float, cuts: int
) -> None:
    executor = join(alpha, lost_after=5)
    (worker,) = executor.workers
    data = np.arange(20_000)
    tasks = 0
    with flickering(network.cut(alpha), off, on) as times:
        while times() < cuts:
            small = [executor.submit(note, str(diary), tasks + n) for n in range(5)]
            large = executor.submit(np.negative, data)
            assert [f.result(30) for f in small] == [tasks + n for n in range(5)]
            assert (large.result(30) == -data).all()
            tasks += len(small)
    assert [w.id for w in executor.workers] == [worker.id]
    assert sorted(number for number, _ in diary.entries()) == list(range(tasks))


def test_a_delayed_and_lossy_link(alpha: Host, network: Network, join: Join) -> None:
    try:
        network.delay(alpha, "delay 50ms 10ms loss 5%")
    except OSError as error:
        pytest.skip(f"this kernel delays nothing: {error}")
    executor = join(alpha, lost_after=5)
    data = np.arange(50_000)
    assert list(executor.map(abs, range(20), timeout=60)) == list(range(20))
    assert (executor.submit(np.negative, data).result(60) == -data).all()


# ------------------------------------------------------------------------ one port only


def test_the_work_address_is_closed(
    alpha: Host,
    network: Network,
    home: Host,
    endpoint: str,
    keys: Keys,
    start_worker: StartWorker,
) -> None:
    work = free_port(home)
    with (
        network.cut(alpha, work),
        ZmqExecutor(0, endpoint=endpoint, keys=keys, work_address=home.tcp(work)) as executor,
    ):
        output = start_worker(alpha, patience=1.5).communicate(timeout=30)[0]
        assert f"answers, but its work address {home.tcp(work)} cannot be reached" in output
        assert not executor.workers


@pytest.mark.parametrize("ended", [False, True], ids=["the task goes on", "the task ends"])
def test_only_the_work_connection_is_cut(
    alpha: Host,
    network: Network,
    home: Host,
    join: Join,
    diary: Diary,
    tmp_path: Path,
    ended: bool,
) -> None:
    """It is given up while the task runs, or when its result does not come through."""
    work = free_port(home)
    executor = join(alpha, work_address=home.tcp(work))
    gate = tmp_path / "gate"
    running = executor.submit(wait_for, str(diary), 1, str(gate))
    assert eventually(lambda: diary.where(1))
    with network.cut(alpha, work):
        if ended:
            gate.touch()
        with pytest.raises(WorkerLostError):
            running.result(30)
    gate.touch()
    assert executor.submit(note, str(diary), 2).result(30) == 2
    assert not diary.repeated()
