"""Workers that are forked from a template are like fresh ones, and there is another way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from zmqexecutor import BrokenPoolError, ZmqExecutor
from zmqexecutor.master.fleet import WAIT_FOR_EXIT
from zmqexecutor.supervision import template

from .conftest import alive, eventually, run_in_supervisors, start_without_template

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there are templates on Linux only")

Run = Callable[..., subprocess.CompletedProcess[str]]


def templates(worker: int) -> list[int]:
    """The templates of the supervisor of this worker."""
    return templates_of(psutil.Process(worker).ppid())


def templates_of(supervisor: int) -> list[int]:
    children = psutil.Process(supervisor).children()
    return [p.pid for p in children if p.name() == template.NAME.decode()]


def portrait() -> dict[str, Any]:
    """What a task can find out about the process that it is in."""
    import gc
    import random
    import re
    import threading
    import warnings

    def kind(entry: str) -> str:
        try:
            return re.split(r"[:/]", os.readlink(f"/proc/self/fd/{entry}").lstrip("/"))[0]
        except FileNotFoundError:  # the descriptor of the listing
            return ""

    def field(name: str) -> str:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(line for line in lines if line.startswith(name))

    return {
        "name": Path("/proc/self/comm").read_text(),
        "descriptors": sorted(map(kind, os.listdir("/proc/self/fd"))),
        "signals": {
            name: str(signal.getsignal(name)) for name in signal.Signals if name.name != "SIGKILL"
        },
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "ignored": field("SigIgn"),
        "caught": field("SigCgt"),
        "leads its session": os.getsid(0) == os.getpid() == os.getpgid(0),
        "limits": Path("/proc/self/limits").read_text(),
        "nice": os.nice(0),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "in the main thread": threading.current_thread() is threading.main_thread(),
        "its number": threading.main_thread().native_id == os.getpid(),
        "arguments": sys.argv,
        "path": sys.path,
        "flags": repr(sys.flags),
        "warnings": [str(each) for each in warnings.filters],
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "streams": [(s.fileno(), s.encoding, s.errors) for s in (sys.stdout, sys.stderr)],
        "main": sorted(vars(sys.modules["__main__"])),
        "gc": (gc.get_threshold(), gc.isenabled()),
        "state of random": len({random.random() for _ in range(3)}),
    }


def test_a_forked_worker_is_like_a_fresh_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for forked in (True, False):
        if not forked:
            start_without_template(monkeypatch)
        with ZmqExecutor(1) as executor:
            assert bool(templates(executor.submit(os.getpid).result(60))) == forked
            found.append(executor.submit(portrait).result(60))
    assert found[0] == found[1]
    assert all(name.startswith("__") for name in found[0]["main"]), "the script's alone"


def test_random_numbers_of_workers_differ() -> None:
    def draw() -> tuple[int, float]:
        import random
        import time

        time.sleep(0.05)
        return os.getpid(), random.random()

    with ZmqExecutor(2) as executor:
        executor.wait_for_workers(2, 60)
        drawn = set(executor.map(lambda _: draw(), range(8)))
    assert len({pid for pid, _ in drawn}) == 2
    assert len({number for _, number in drawn}) == len(drawn)


def test_workers_and_their_template_end_with_the_supervisor() -> None:
    with ZmqExecutor(1) as executor:
        pid = executor.submit(os.getpid).result(60)
        [forked_from] = templates(pid)
        supervisor = psutil.Process(pid).ppid()
        os.kill(supervisor, signal.SIGKILL)
        assert eventually(lambda: not alive(pid) and not alive(forked_from))
        assert executor.submit(os.getpid).result(60) != pid


def test_without_its_template_a_pool_goes_on() -> None:
    with ZmqExecutor(1) as executor:
        pid = executor.submit(os.getpid).result(60)
        [forked_from] = templates(pid)
        os.kill(forked_from, signal.SIGKILL)
        executor.submit(os.kill, pid, signal.SIGKILL).exception(60)
        after = executor.submit(os.getpid).result(60)
        assert after != pid
        assert not templates(after)


def test_a_template_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_supervisors(
        monkeypatch, "import zmqexecutor.supervision.template as t; t.PATIENCE = 0.5"
    )
    with ZmqExecutor(1) as executor:
        pid = executor.submit(os.getpid).result(60)
        [forked_from] = templates(pid)
        os.kill(forked_from, signal.SIGSTOP)
        executor.submit(os.kill, pid, signal.SIGKILL).exception(60)
        after = executor.submit(os.getpid).result(60)
        assert after != pid
        assert not templates(after)
        assert not alive(forked_from)


@pytest.mark.parametrize(
    "code",
    [
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "import sys; sys.stderr = None",
        "import sys; sys.modules['zmqexecutor.worker.calls'] = None",
    ],
    ids=["a second thread", "no standard error", "an import that fails"],
)
def test_what_cannot_be_forked_is_not(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    run_in_supervisors(monkeypatch, code)
    with ZmqExecutor(1) as executor:
        assert not templates(executor.submit(os.getpid).result(60))


def test_limits_are_those_of_a_programs_start() -> None:
    with ZmqExecutor(1, worker_rlimits={"nofile": 512}) as executor:
        assert not templates(executor.submit(os.getpid).result(60))


@pytest.mark.parametrize("number", [2, 3], ids=["the first fork", "the second fork"])
def test_a_system_that_has_no_room_for_a_process(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run_in_supervisors(
        monkeypatch,
        f"""
import errno, os
fork, made = os.fork, 0
def limited():
    global made
    made += 1
    if made >= {number}:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return fork()
os.fork = limited
""",
    )
    with ZmqExecutor(1) as executor:
        try:
            error = executor.submit(pow, 2, 3).exception(60)
        except BrokenPoolError as broken:
            error = broken
    assert isinstance(error, BrokenPoolError)
    assert "no room for another process" in str(error)


def test_what_tasks_leave_running_leaves_no_zombies() -> None:
    """A supervisor that adopts a worker may adopt what another one has left."""

    def leave() -> int:
        subprocess.Popen(["sleep", "0.2"], start_new_session=True)
        return os.getppid()

    with ZmqExecutor(2, max_tasks_per_child=1) as executor:
        [supervisor] = {future.result(60) for future in [executor.submit(leave) for _ in range(60)]}

        def zombies() -> list[int]:
            children = psutil.Process(supervisor).children()
            return [p.pid for p in children if p.status() == psutil.STATUS_ZOMBIE]

        assert eventually(lambda: not zombies()), zombies()
        [forked_from] = templates_of(supervisor)
        os.kill(forked_from, signal.SIGKILL)
        assert eventually(lambda: not psutil.pid_exists(forked_from))
        assert executor.submit(pow, 2, 3).result(60) == 8


def test_a_supervisor_that_may_not_adopt(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = "import zmqexecutor.supervision.prctl as p; p.adopt_orphans = lambda yes: "
    for code in ("False", "True"):  # asked before, and not noticed before
        run_in_supervisors(monkeypatch, refuse + code)
        with ZmqExecutor(1) as executor:
            assert not templates(executor.submit(os.getpid).result(60))


def test_a_shutdown_where_only_the_supervisor_hears_of_deaths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zmqexecutor.master.peers.DeathWatch.add", lambda *_: True)
    executor = ZmqExecutor(1)
    assert executor.submit(pow, 2, 3).result(60) == 8
    began = time.monotonic()
    executor.shutdown()
    assert time.monotonic() - began < WAIT_FOR_EXIT


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_what_a_worker_writes_at_its_end_is_seen(run_script: Run, seconds: float) -> None:
    """Also if its supervisor ends before it has come to read it."""
    done = run_script(
        f"""
        import atexit, sys, time
        from zmqexecutor import ZmqExecutor

        def task():
            atexit.register(print, "last words", file=sys.stderr)
            print("words", file=sys.stderr)

        with ZmqExecutor(1) as executor:
            executor.submit(task).result()
            time.sleep({seconds})
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "words\nlast words\n")


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_what_a_worker_writes_at_its_end_reaches_a_slow_reader(seconds: float) -> None:
    program = f"""
import atexit, os, time
from zmqexecutor import ZmqExecutor

with ZmqExecutor(1) as executor:
    executor.submit(lambda: atexit.register(os.write, 2, b"x" * 60000) and None).result()
    time.sleep({seconds})
"""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(reader, "rb", buffering=0) as stderr:
        with subprocess.Popen([sys.executable, "-c", program], stderr=writer) as process:
            os.close(writer)
            arrived = 0
            while chunk := stderr.read(2048):
                arrived += len(chunk)
                time.sleep(0.0005)
        assert (process.returncode, arrived) == (0, 60000)
