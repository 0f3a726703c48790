"""Cut the network of hosts again and again while tasks run there, and tell what was lost.

    python -m tests.hosts.cuts CUTS [LOST_AFTER]

Two hosts with a worker each do tasks without end. At random moments one of them is cut off,
until the executor has noticed, and some time longer. The exit code is 1 if anything was lost
that is not to be lost: each cut may cost the one task that runs on that host, no other, and
no task may run twice or have a wrong result.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from zmqexecutor import WorkerLostError, ZmqExecutor
from zmqexecutor.keys import Keys, add_worker

from ..conftest import eventually
from .conftest import CALLS_WORKER
from .network import Host, Network, free_port, why_not
from .tasks import Diary, hold_the_interpreter, note, work

OUTSTANDING = 8
HANG = 60.0


def main(cuts: int, lost_after: float) -> int:
    if reason := why_not():
        print(f"no hosts here: {reason}")
        return 2
    network = Network()
    try:
        with tempfile.TemporaryDirectory() as directory:
            return _run(network, Path(directory), cuts, lost_after)
    finally:
        network.close()


def _run(network: Network, directory: Path, cuts: int, lost_after: float) -> int:
    home, hosts = network.host("home"), [network.host("alpha"), network.host("beta")]
    keys = Keys.create(directory / "keys")
    diary = Diary(directory / "diary")
    with home.inside():
        endpoint = home.tcp(free_port(home))
        executor = ZmqExecutor(0, endpoint=endpoint, keys=keys, lost_after=lost_after)
        for host in hosts:
            folder = add_worker(keys.directory, host.name)
            host.python(CALLS_WORKER, str(folder), "60", endpoint, stdout=subprocess.DEVNULL)
        with executor:
            load = _Load(executor, diary)
            times = [_cut(executor, network, random.choice(hosts), lost_after) for _ in range(cuts)]
            load.stop()
    lost = [future for future in load.futures if isinstance(future.exception(), WorkerLostError)]
    wrong = [
        future
        for number, future in enumerate(load.futures)
        if future not in lost and (future.exception() or future.result() != number)
    ]
    print(f"{len(load.futures)} tasks, {cuts} cuts, lost_after {lost_after:g} s")
    print(f"noticed after {statistics.median(times):.2f} s (median), {max(times):.2f} s (longest)")
    print(f"lost as they may be: {len(lost)} (at most {cuts})")
    print(f"lost or wrong otherwise: {len(wrong)}; run twice: {len(diary.repeated())}")
    return int(bool(len(lost) > cuts or wrong or diary.repeated()))


def _cut(executor: ZmqExecutor, network: Network, host: Host, lost_after: float) -> float:
    """Cut a host off, and connect it again; how many seconds it took to notice."""
    executor.wait_for_workers(2, HANG)
    time.sleep(random.uniform(0, 0.5))
    before = {worker.id for worker in executor.workers}
    with network.cut(host):
        began = time.monotonic()
        assert eventually(lambda: {w.id for w in executor.workers} != before, HANG)
        noticed = time.monotonic() - began
        time.sleep(random.uniform(0, 2 * lost_after))
    return noticed


class _Load:
    """Keeps an executor busy from a thread of its own."""

    def __init__(self, executor: ZmqExecutor, diary: Diary) -> None:
        self.futures: list[Future[int]] = []
        self._executor = executor
        self._diary = str(diary)
        self._stopping = False
        self._room = threading.Semaphore(OUTSTANDING)
        self._thread = threading.Thread(target=self._submit)
        self._thread.start()

    def _submit(self) -> None:
        while not self._stopping:
            assert self._room.acquire(timeout=HANG), "no task has ended for a minute"
            number, kind = len(self.futures), random.random()
            submit = self._executor.submit
            if kind < 0.02:
                future = submit(hold_the_interpreter, self._diary, number, 1)
            elif kind < 0.5:
                future = submit(work, self._diary, number, random.uniform(0, 0.2))
            else:
                future = submit(note, self._diary, number)
            future.add_done_callback(lambda _: self._room.release())
            self.futures.append(future)

    def stop(self) -> None:
        """Wait for the last task."""
        self._stopping = True
        self._thread.join()
        for future in self.futures:
            future.exception(HANG)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 2.0))
