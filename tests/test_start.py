"""Workers that never get ready break the pool soon, with the reason, and are not tried for ever."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import eventually, run_in_supervisors
from zmqexecutor import BrokenPoolError, WorkerLostError, ZmqExecutor
from zmqexecutor.master.fleet import STARTS_BEFORE_BROKEN


def broken(**options: object) -> str:
    """How the pool says that it is broken: for each task, and for those that come later."""
    with ZmqExecutor(2, **options) as executor:  # type: ignore[arg-type]
        futures = []
        with contextlib.suppress(BrokenPoolError):  # so soon
            futures += [executor.submit(pow, 2, 2) for _ in range(3)]
        errors = [future.exception(60) for future in futures]
        with pytest.raises(BrokenPoolError) as later:
            executor.submit(pow, 2, 2)
    assert {(type(e), str(e)) for e in errors} <= {(BrokenPoolError, str(later.value))}
    return str(later.value)


def note_and(end: Callable[[], object], notes: str) -> None:
    Path(notes, str(os.getpid())).touch()
    print("last words", file=sys.stderr, flush=True)
    end()


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
        (lambda: os._exit(3), "exit code 3"),
        (lambda: ctypes.string_at(0), "Fatal Python error: Segmentation fault"),
    ],
    ids=["SIGKILL", "_exit", "SIGSEGV"],
)
def test_an_initializer_that_ends_its_process(
    tmp_path: Path, end: Callable[[], object], reason: str
) -> None:
    told = broken(initializer=note_and, initargs=(end, str(tmp_path)))
    assert "3 workers in a row ended before they were ready" in told
    assert reason in told
    assert "last words" in told
    # One more may have been on its way.
    assert STARTS_BEFORE_BROKEN <= len(os.listdir(tmp_path)) <= STARTS_BEFORE_BROKEN + 2


def test_an_initializer_that_raises(tmp_path: Path) -> None:
    def fail() -> None:
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401

    told = broken(initializer=note_and, initargs=(fail, str(tmp_path)))
    assert "the initializer raised ModuleNotFoundError: No module named 'no_such_module'" in told
    assert len(os.listdir(tmp_path)) <= 2


def test_an_initializer_whose_module_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "soon_gone.py"
    module.write_text("def prepare():\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import soon_gone  # type: ignore[import-not-found]

    module.unlink()
    assert "No module named 'soon_gone'" in broken(initializer=soon_gone.prepare)


def test_limits_that_leave_no_room_to_start() -> None:
    told = broken(worker_rlimits={"data": 2**20})
    assert "ended before they were ready" in told
    assert "standard error" in told


def test_an_environment_that_no_interpreter_starts_in(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/no/such/home")
    told = broken()
    assert "the supervisor" in told
    assert sys.executable in told
    capfd.readouterr()


@pytest.mark.parametrize("program", ["/bin/false", "/no/such/python"])
def test_an_interpreter_that_is_none(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(sys, "executable", program)
    told = broken()
    assert "the supervisor" in told
    assert program in told


def without_circus(monkeypatch: pytest.MonkeyPatch, gate: Path) -> None:
    """Supervisors cannot import Circus before the gate is there."""
    run_in_supervisors(
        monkeypatch,
        f"""
import os, sys, time
from importlib.abc import MetaPathFinder

class Gate(MetaPathFinder):
    def find_spec(self, name, path, target=None, os=os, time=time):
        end = time.monotonic() + 60
        while name == "circus" and not os.path.exists({str(gate)!r}) and time.monotonic() < end:
            time.sleep(0.005)

sys.meta_path.insert(0, Gate())
""",
    )


def test_the_first_worker_does_not_wait_for_circus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works, and may die, before its supervisor is ready; then nothing is missed."""
    gate = tmp_path / "gate"
    without_circus(monkeypatch, gate)
    with ZmqExecutor(1) as executor:
        first = executor.submit(os.getpid).result(30)
        lost = executor.submit(os.kill, first, signal.SIGKILL)
        after = executor.submit(os.getpid)
        assert not lost.done()  # only the supervisor can tell how it ended
        gate.touch()
        error = lost.exception(30)
        assert isinstance(error, WorkerLostError)
        assert (error.pid, error.signal) == (first, "SIGKILL")
        assert after.result(30) != first


def test_as_many_workers_as_there_is_work_for_do_not_wait_for_circus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, meeting = tmp_path / "gate", tmp_path / "meeting"
    meeting.mkdir()
    without_circus(monkeypatch, gate)
    with ZmqExecutor(3) as executor:
        futures = [executor.submit(meet, str(meeting), 3) for _ in range(3)]
        pids = {future.result(30) for future in futures}
        assert len(pids) == 3
        gate.touch()
        assert executor.submit(abs, -1).result(30) == 1
        assert {worker.pid for worker in executor.workers} == pids


def meet(place: str, number: int) -> int:
    """Wait until as many are there."""
    Path(place, str(os.getpid())).touch()
    if not eventually(lambda: len(os.listdir(place)) == number, 30):
        raise TimeoutError(place)
    return os.getpid()
