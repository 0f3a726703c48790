"""Deaths at moments of their own: in the initializer, while a big result leaves, by chance."""

from __future__ import annotations

import atexit
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from zmqexecutor import WorkerLostError, ZmqExecutor
from zmqexecutor.master import roster
from zmqexecutor.system import directories

from ..conftest import alive, eventually
from .processes import PATIENCE, Diary, Pool

LONG = bool(os.environ.get("ZMQEXECUTOR_TEST_LONG"))
"""Whether to take minutes for what is proved in seconds otherwise."""


DELAYS = [0.0, 0.02, 0.05, 0.1, 0.2] if LONG else [0.0, 0.03, 0.1]
"""Seconds from a task's start to the death of its worker."""


def die_once(flag: str) -> None:
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_once_in_the_initializer(tmp_path: Path) -> None:
    """No task was there to be lost."""
    with ZmqExecutor(2, initializer=die_once, initargs=(str(tmp_path / "flag"),)) as executor:
        pool = Pool(executor, tmp_path)
        pool.tiny(50)
        assert pool.settle() == {}
    assert (tmp_path / "flag").exists()


def test_killed_always_in_the_initializer() -> None:
    """The pool breaks, and says why; it does not try for ever."""
    with ZmqExecutor(2, initializer=os.abort) as executor:
        futures = [executor.submit(pow, 2, 2) for _ in range(10)]
        for future in futures:
            with pytest.raises(BrokenProcessPool, match=r"before they were ready.*SIGABRT"):
                future.result(PATIENCE)


def big_result_and_death(diary: Diary, number: int, seconds: float, size: int) -> bytes:
    diary.note(number)
    killer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    killer.daemon = True
    killer.start()
    return bytes(size)


@pytest.mark.parametrize("way", ["segments", "frames"])
def test_killed_while_it_sends_a_big_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The result is there as a whole, or the task is lost; others are not."""
    if way == "frames":
        monkeypatch.setattr(directories, "_bases", lambda: iter(["/tmp"]))
    size = 100_000_000
    diary = Diary(tmp_path / "diary")
    outcomes = Counter[str]()
    with ZmqExecutor(1) as executor:
        for number, delay in enumerate(DELAYS):
            future = executor.submit(big_result_and_death, diary, number, delay, size)
            error = future.exception(PATIENCE)
            assert error is None or isinstance(error, WorkerLostError)
            assert error is not None or len(future.result()) == size
            outcomes["lost" if error else "came"] += 1
            after = executor.submit(os.getpid)  # it may die of the same timer
            assert isinstance(after.exception(PATIENCE), (WorkerLostError, type(None)))
    assert diary.runs() == Counter(range(len(DELAYS)))
    assert outcomes["lost"] >= 1


def by_chance(diary: Diary, number: int, dies: bool) -> int:
    diary.note(number)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


@pytest.mark.timeout(600)
def test_many_deaths_by_chance(tmp_path: Path) -> None:
    tasks, deaths = (10_000, 500) if LONG else (1_000, 20)
    chosen = set(random.Random(27).sample(range(tasks), deaths))
    diary = Diary(tmp_path / "diary")
    with ZmqExecutor(2) as executor:
        futures = [executor.submit(by_chance, diary, i, i in chosen) for i in range(tasks)]
        errors = [future.exception(300) for future in futures]
    assert {i for i, error in enumerate(errors) if error} == chosen
    assert {type(errors[i]) for i in chosen} == {WorkerLostError}
    assert [f.result() for i, f in enumerate(futures) if i not in chosen] == [
        i * i for i in range(tasks) if i not in chosen
    ]
    assert diary.runs() == Counter(range(tasks))


def leave_a_thread() -> int:
    threading.Thread(target=time.sleep, args=(1000,), daemon=False).start()
    return os.getpid()


def hang_at_exit() -> int:
    atexit.register(time.sleep, 1000)
    return os.getpid()


@pytest.mark.parametrize("task", [leave_a_thread, hang_at_exit])
@pytest.mark.parametrize("limit", [{"max_tasks_per_child": 1}, {"max_worker_memory": 1}], ids=str)
def test_a_worker_that_retires_and_does_not_end(
    monkeypatch: pytest.MonkeyPatch, task: Callable[[], int], limit: dict[str, Any]
) -> None:
    """It is killed, and its successor has its place."""
    monkeypatch.setattr(roster, "WAIT_FOR_EXIT", 0.2)
    with ZmqExecutor(1, **limit) as executor:
        pids: set[int] = set()

        def replaced() -> bool:
            pids.add(executor.submit(task).result(PATIENCE))
            return len(pids) == 4

        assert eventually(replaced, PATIENCE)
        executor.kill_workers()
    assert eventually(lambda: not any(map(alive, pids)))


@pytest.mark.skipif(not LONG, reason="takes half a minute; see test_security for the cause")
@pytest.mark.timeout(200)
def test_a_program_that_is_stopped_for_a_while(tmp_path: Path) -> None:
    """As by Ctrl-Z and `fg`: its tasks go on meanwhile, and are not lost."""
    script = tmp_path / "program.py"
    script.write_text(
        "import time\n"
        "from zmqexecutor import ZmqExecutor\n"
        "if __name__ == '__main__':\n"
        "    with ZmqExecutor(1) as executor:\n"
        "        executor.submit(pow, 2, 2).result()\n"
        "        future = executor.submit(time.sleep, 25)\n"
        "        print('running', flush=True)\n"
        "        print(future.result())\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "running\n"
        one.send_signal(signal.SIGSTOP)
        time.sleep(18)  # longer than any heartbeat that there once was
        one.send_signal(signal.SIGCONT)
        assert one.communicate(timeout=60)[0] == "None\n"
