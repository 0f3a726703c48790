"""The end of a pool takes a bounded time, whatever its workers are up to."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from zmqexecutor import Workers, ZmqExecutor
from zmqexecutor.master import fleet

from ..conftest import alive, eventually
from .processes import Pool

GRACE = 0.5
"""Seconds that workers have in these tests, in the place of five."""


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = Workers.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "graceful_timeout", GRACE)
    monkeypatch.setattr(fleet, "WAIT_FOR_EXIT", GRACE)


def ignore_sigterm(flag: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(flag).touch()
    while True:
        time.sleep(1000)


def hold_the_gil(flag: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(flag).touch()
    ctypes.PyDLL(None).sleep(1000)  # unlike CDLL, it keeps the lock


def be_stopped(flag: str) -> None:
    Path(flag).touch()
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)


def interrupt(executor: ZmqExecutor) -> None:
    with pytest.raises(KeyboardInterrupt), executor:
        raise KeyboardInterrupt


WAYS: dict[str, Callable[[ZmqExecutor], None]] = {
    "terminate_workers": ZmqExecutor.terminate_workers,
    "kill_workers": ZmqExecutor.kill_workers,
    "Ctrl-C in with": interrupt,
}


@pytest.mark.parametrize(
    ("way", "task"),
    [
        ("terminate_workers", ignore_sigterm),
        ("terminate_workers", hold_the_gil),
        ("terminate_workers", be_stopped),
        ("kill_workers", hold_the_gil),
        ("kill_workers", be_stopped),
        ("Ctrl-C in with", hold_the_gil),
    ],
)
def test_with_a_running_task_that(tmp_path: Path, way: str, task: Callable[[str], None]) -> None:
    executor = ZmqExecutor(2)
    pool = Pool(executor, tmp_path)
    flag = tmp_path / "flag"
    running = executor.submit(task, str(flag))
    queued = [executor.submit(time.sleep, 1000) for _ in range(4)]
    assert eventually(flag.exists)
    supervisor, workers = pool.supervisor(), pool.workers()
    WAYS[way](executor)
    executor.shutdown()
    expected = KeyboardInterrupt if way == "Ctrl-C in with" else BrokenProcessPool
    assert isinstance(running.exception(20), expected)
    assert all(future.done() for future in queued)
    assert eventually(lambda: not any(map(alive, [supervisor, *workers])), 20)


def wait_for_a_subprocess(note: str) -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        Path(note).write_text(str(process.pid))


@pytest.mark.parametrize("way", WAYS)
def test_what_a_running_task_has_started_ends_with_it(tmp_path: Path, way: str) -> None:
    executor = ZmqExecutor(2)
    note = tmp_path / "note"
    executor.submit(wait_for_a_subprocess, str(note))
    assert eventually(lambda: note.exists() and note.read_text())
    pid = int(note.read_text())
    assert alive(pid)
    WAYS[way](executor)
    executor.shutdown()
    assert eventually(lambda: not alive(pid), 20)


def leave_a_subprocess() -> int:
    return subprocess.Popen(["sleep", "1000"]).pid


def test_what_a_task_has_left_running_goes_on() -> None:
    with ZmqExecutor(2) as executor:
        pid = executor.submit(leave_a_subprocess).result(60)
    try:
        assert alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


def hang_at_exit() -> int:
    atexit.register(time.sleep, 1000)
    return os.getpid()


def test_with_a_worker_that_hangs_at_its_exit() -> None:
    executor = ZmqExecutor(1)
    pid = executor.submit(hang_at_exit).result(60)
    executor.shutdown()
    assert eventually(lambda: not alive(pid), 20)


def test_with_an_idle_worker_that_is_stopped() -> None:
    executor = ZmqExecutor(1)
    pid = executor.submit(os.getpid).result(60)
    os.kill(pid, signal.SIGSTOP)
    executor.shutdown()
    assert eventually(lambda: not alive(pid), 20)


def test_with_a_supervisor_that_is_stopped(tmp_path: Path) -> None:
    executor = ZmqExecutor(1)
    pid = executor.submit(os.getpid).result(60)
    supervisor = Pool(executor, tmp_path).supervisor()
    os.kill(supervisor, signal.SIGSTOP)
    executor.shutdown()
    assert eventually(lambda: not alive(pid) and not alive(supervisor), 20)
