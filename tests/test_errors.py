"""Our exceptions are caught by programs written for the standard library's."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest

import zmqexecutor
from zmqexecutor import errors
from zmqexecutor.errors import WorkerLostError, ZmqExecutorError

CAUGHT_AS: list[tuple[type[BaseException], type[BaseException]]] = [
    (errors.BrokenPoolError, BrokenProcessPool),
    (errors.BrokenPoolError, concurrent.futures.BrokenExecutor),
    (errors.BrokenPoolError, RuntimeError),
    (errors.WorkerLostError, BrokenProcessPool),
    (errors.WorkerLostError, concurrent.futures.BrokenExecutor),
    (errors.TaskTimeoutError, TimeoutError),
    (errors.TaskTimeoutError, concurrent.futures.TimeoutError),
    (errors.TaskTimeoutError, OSError),
    (errors.JobFailedError, RuntimeError),
    (errors.NoWorkerError, RuntimeError),
    (errors.RegistrationError, ConnectionError),
    (errors.SerializationError, pickle.PicklingError),
    (errors.ProtocolError, ValueError),
    (errors.ForkedExecutorError, RuntimeError),
]
ALL = [getattr(errors, name) for name in errors.__all__]
LOST = WorkerLostError("it died", job="f", pid=7, exitcode=-signal.SIGKILL, stderr="last words")


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """In the place of conftest's: nothing here opens anything, and looking takes time."""


@pytest.mark.parametrize(("ours", "standard"), CAUGHT_AS)
def test_it_is_caught_as_its_counterpart(
    ours: type[BaseException], standard: type[BaseException]
) -> None:
    assert issubclass(ours, standard)


@pytest.mark.parametrize("kind", ALL)
def test_the_base_class_catches_it(kind: type[BaseException]) -> None:
    assert issubclass(kind, ZmqExecutorError)
    assert issubclass(kind, Exception)


def test_a_broken_pool_and_a_lost_worker_are_told_apart() -> None:
    assert not issubclass(errors.WorkerLostError, errors.BrokenPoolError)
    assert not issubclass(errors.BrokenPoolError, errors.WorkerLostError)


def test_every_exception_of_the_module_is_public() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__)
    assert defined <= set(zmqexecutor.__all__)
    assert {kind for _, kind in ((n, getattr(zmqexecutor, n)) for n in defined)} == set(ALL)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ALL)
def test_it_comes_through_a_pickle(kind: type[BaseException], protocol: int) -> None:
    error = kind("what happened, and what to do")
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind
    assert str(again) == str(error) == "what happened, and what to do"
    assert again.args == error.args


@pytest.mark.parametrize("again", [pickle.loads(pickle.dumps(LOST)), copy.copy(LOST)])
def test_a_lost_worker_is_described_after_a_pickle_too(again: WorkerLostError) -> None:
    assert again.args == ("it died",)
    assert (again.job, again.pid, again.exitcode, again.stderr) == ("f", 7, -9, "last words")
    assert again.signal == "SIGKILL"


def test_what_is_not_known_of_a_lost_worker_is_none_or_empty() -> None:
    error = WorkerLostError("it died")
    assert (error.job, error.pid, error.exitcode, error.stderr) == ("", None, None, "")
    assert error.signal is None


@pytest.mark.parametrize(
    ("exitcode", "name"),
    [
        (None, None),
        (0, None),
        (1, None),
        (137, None),  # a shell's way to say it, not ours
        (-signal.SIGKILL, "SIGKILL"),
        (-signal.SIGSEGV, "SIGSEGV"),
        (-signal.SIGTERM, "SIGTERM"),
        (-1000, "signal 1000"),
    ],
)
def test_the_signal_has_a_name(exitcode: int | None, name: str | None) -> None:
    assert WorkerLostError("it died", exitcode=exitcode).signal == name


def test_a_real_time_signal_has_a_number_at_least() -> None:
    number = signal.SIGRTMIN + 1
    assert WorkerLostError("it died", exitcode=-number).signal == f"signal {number}"


def test_a_cause_and_notes_can_be_added() -> None:
    cause = ValueError("why")
    with pytest.raises(WorkerLostError) as caught:
        raise WorkerLostError("it died") from cause
    assert caught.value.__cause__ is cause
