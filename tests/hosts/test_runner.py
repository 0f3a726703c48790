"""A JobRunner and its workers on other hosts."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from zmqexecutor import JobRunner, WorkerLostError
from zmqexecutor.keys import Keys

from ..conftest import eventually
from .network import ROOT, Host, Network, Program, free_port
from .tasks import Diary

LOST_AFTER = 1.5

WORKER = """
    import sys
    from zmqexecutor import Worker
    from tests.hosts.tasks import note, wait_for

    keys, diary, endpoint, *workpoint = sys.argv[1:]

    def run(job):
        number, *gate = job[1].split()
        return str(wait_for(diary, int(number), *gate) if gate else note(diary, int(number)))

    Worker(endpoint, *workpoint, target=run, keys=keys).run()
"""
PLAIN_WORKER = """
    import sys
    from zmqexecutor import Worker
    from tests.hosts.tasks import note

    diary, endpoint, workpoint = sys.argv[1:]
    worker = Worker(
        endpoint,
        workpoint,
        target=lambda job: str(note(diary, int(job[1]))),
        allow_plaintext_tcp_from_anyone=True,
    )
    worker.run()
"""
MASTER = """
    import sys
    from zmqexecutor import JobRunner

    with JobRunner(sys.argv[2], keys=sys.argv[1], lost_after=1.5) as runner:
        print(runner.execute("job", sys.argv[3]))
"""

Start = Callable[..., Program]


@pytest.fixture
def start_worker(endpoint: str, keys: Keys, diary: Diary) -> Start:
    """Start a worker on a host, with a workpoint there if wanted."""

    def start(host: Host, workpoint: bool = False) -> Program:
        folder = keys.directory / "workers" / host.name
        at = [host.tcp(free_port(host))] if workpoint else []
        return host.python(WORKER, str(folder), str(diary), endpoint, *at)

    return start


@pytest.mark.parametrize("workpoint", [False, True], ids=["connects", "binds"])
def test_a_cut_while_jobs_run(
    alpha: Host,
    beta: Host,
    network: Network,
    endpoint: str,
    keys: Keys,
    start_worker: Start,
    diary: Diary,
    tmp_path: Path,
    workpoint: bool,
) -> None:
    gate = tmp_path / "gate"
    for host in (alpha, beta):
        start_worker(host, workpoint)
    with JobRunner(endpoint, keys=keys, lost_after=LOST_AFTER) as runner:
        runner.wait_for_workers(2, 30)
        futures = [runner.submit("job", f"{number} {gate}") for number in (0, 1)]
        assert eventually(lambda: len(diary.entries()) == 2)
        running = {host: futures[number] for number, host in diary.entries()}
        with network.cut(alpha):
            with pytest.raises(WorkerLostError, match="on alpha"):
                running["alpha"].result(30)
            later = [runner.submit("job", str(number)) for number in range(10, 30)]
            gate.touch()
            assert running["beta"].result(30) in "01"
            assert [f.result(30) for f in later] == [str(n) for n in range(10, 30)]
        runner.wait_for_workers(2, 30)
        gate.unlink()
        both = [runner.submit("job", f"{number} {gate}") for number in (100, 101)]
        assert eventually(lambda: {diary.where(100), diary.where(101)} == {"alpha", "beta"})
        gate.touch()
        assert [f.result(30) for f in both] == ["100", "101"]
    assert not diary.repeated()


@pytest.mark.parametrize("workpoint", [False, True], ids=["connects", "binds"])
def test_the_master_dies_behind_a_cut(
    home: Host,
    alpha: Host,
    network: Network,
    endpoint: str,
    keys: Keys,
    start_worker: Start,
    diary: Diary,
    tmp_path: Path,
    workpoint: bool,
) -> None:
    """Nobody tells the worker that there is a new master; the old result is not for that one."""
    gate = tmp_path / "gate"
    start_worker(alpha, workpoint)
    old = home.python(MASTER, str(keys.directory), endpoint, f"1 {gate}")
    assert eventually(lambda: diary.where(1))
    cut = network.cut(alpha)
    cut.make()
    old.end()
    assert old.wait(30) == -signal.SIGKILL
    with JobRunner(endpoint, keys=keys, lost_after=LOST_AFTER, patience=30) as runner:
        gate.touch()
        waiting = runner.submit("job", "2")
        cut.restore()
        assert waiting.result(30) == "2"
        assert [runner.execute("job", str(n), 30) for n in range(3, 13)] == [
            str(n) for n in range(3, 13)
        ]
    assert not diary.repeated()


@pytest.mark.parametrize("workpoint", [False, True], ids=["connects", "binds"])
def test_all_processes_of_a_host_die(
    alpha: Host,
    beta: Host,
    endpoint: str,
    keys: Keys,
    start_worker: Start,
    diary: Diary,
    tmp_path: Path,
    workpoint: bool,
) -> None:
    """Its kernel tells; that is noticed at once, long before the time for silence."""
    start_worker(alpha, workpoint)
    with JobRunner(endpoint, keys=keys, lost_after=200) as runner:
        runner.wait_for_workers(1, 30)
        running = runner.submit("job", f"1 {tmp_path}/gate")
        assert eventually(lambda: diary.where(1))
        waiting = runner.submit("job", "2")
        alpha.kill_all()
        with pytest.raises(WorkerLostError):
            running.result(10)  # the next regular look is in 50 s
        assert not runner.workers
        start_worker(beta)
        assert waiting.result(30) == "2"
    assert diary.on("beta") == [2]


@pytest.mark.parametrize("program", ["square_worker.py", "square_workers.py"])
def test_the_three_programs_on_two_hosts(
    home: Host, alpha: Host, endpoint: str, keys: Keys, program: str
) -> None:
    """With keys in the default directory; the workpoints are ports of the worker's host."""
    port = "5600" if program == "square_worker.py" else "560$WID"
    workpoint = f"tcp://{alpha.address}:{port}"
    examples = ROOT / "examples"
    folder = keys.directory / "workers" / "alpha"
    worker = alpha.start(
        *(sys.executable, str(examples / program), endpoint, workpoint),
        env={"ZMQEXECUTOR_KEYS": str(folder)},
    )
    master = home.start(
        *(sys.executable, "-u", str(examples / "square_master.py"), endpoint),
        env={"ZMQEXECUTOR_KEYS": str(keys.directory)},
        stdout=subprocess.PIPE,
    )
    squares = 0

    def count() -> None:
        nonlocal squares
        assert master.stdout
        for line in master.stdout:
            squares += line.strip().isdigit() and int(line) ** 0.5 == int(int(line) ** 0.5)

    reader = threading.Thread(target=count)
    reader.start()
    assert eventually(lambda: squares > 100, 30)
    for started in (master, worker):
        started.end(signal.SIGINT)
        assert started.wait(30) == 0
    reader.join()


@pytest.mark.parametrize("workpoint", [False, True], ids=["connects", "binds"])
def test_a_worker_that_is_still_busy_for_a_master_that_is_gone(
    home: Host,
    alpha: Host,
    endpoint: str,
    keys: Keys,
    start_worker: Start,
    diary: Diary,
    tmp_path: Path,
    workpoint: bool,
) -> None:
    """It comes when it is free; at its workpoint nobody may find the old socket before that."""
    gate = tmp_path / "gate"
    start_worker(alpha, workpoint)
    old = home.python(MASTER, str(keys.directory), endpoint, f"1 {gate}")
    assert eventually(lambda: diary.where(1))
    old.end()
    assert old.wait(30) == -signal.SIGKILL
    with JobRunner(endpoint, keys=keys, lost_after=LOST_AFTER, patience=30) as runner:
        with pytest.raises(TimeoutError):
            runner.wait_for_workers(1, 1)
        gate.touch()
        assert runner.execute("job", "2", 30) == "2"
    assert not diary.repeated()


def test_a_worker_is_started_again_at_its_workpoint(
    alpha: Host, endpoint: str, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before its end is noticed: without keys nobody tells the master at once."""
    monkeypatch.setenv("ZMQEXECUTOR_KEYS", "")
    at = alpha.tcp(free_port(alpha))
    with JobRunner(endpoint, lost_after=200, allow_plaintext_tcp_from_anyone=True) as runner:
        for number in range(4):
            known = {worker.id for worker in runner.workers}
            program = alpha.python(PLAIN_WORKER, str(diary), endpoint, at)
            assert eventually(lambda: {w.id for w in runner.workers} - known)  # noqa: B023
            assert runner.execute("job", str(number), 20) == str(number)
            program.end()
            program.wait(30)
