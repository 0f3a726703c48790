"""Our exceptions are caught by programs written for the standard library's."""

from __future__ import annotations

import concurrent.futures
import contextvars
import copy
import dataclasses
import os
import pickle
import signal
import subprocess
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NoReturn

import pytest

import zmqexecutor
from zmqexecutor import ZmqExecutor, errors
from zmqexecutor.errors import (
    BrokenPoolError,
    SerializationError,
    WorkerLostError,
    ZmqExecutorError,
)
from zmqexecutor.payload.unavailable import Unavailable

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
    (errors.PerformanceWarning, UserWarning),
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


@pytest.mark.parametrize("kind", [kind for kind in ALL if not issubclass(kind, Warning)])
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


# ------------------------------------------------- what exceptions of the user may do


@pytest.fixture(scope="module")
def pool() -> Iterator[ZmqExecutor]:
    with ZmqExecutor(1) as made:
        yield made


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int


class GuardedError(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} is read only")


class UncausedError(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        if name == "__cause__":
            raise AttributeError("it has no cause")
        super().__setattr__(name, value)


class OwnTracebackError(Exception):
    def with_traceback(self, _: object) -> NoReturn:
        raise AttributeError("it has no traceback")


REFUSING = [FrozenError, GuardedError, UncausedError, OwnTracebackError]
refusing = pytest.mark.parametrize("kind", REFUSING)


def throw(kind: Callable[[int], BaseException], code: int = 3) -> NoReturn:
    raise kind(code)


class ThrowsWhenPickled:
    def __init__(self, kind: type[Exception]) -> None:
        self.kind = kind

    def __reduce__(self) -> NoReturn:
        throw(self.kind)


class ThrowsWhenUnpickled(ThrowsWhenPickled):
    def __reduce__(self) -> Any:
        return throw, (self.kind,)


@refusing
def test_a_task_raises_what_refuses_attributes(pool: ZmqExecutor, kind: type[Exception]) -> None:
    error = pool.submit(throw, kind).exception()
    assert type(error) is kind
    assert error.args == (3,)
    assert "in throw" in str(error.__cause__)
    with pytest.raises(kind):
        pool.submit(throw, kind).result()


def test_what_it_holds_comes_back(pool: ZmqExecutor) -> None:
    error = pool.submit(throw, FrozenError).exception()
    assert isinstance(error, FrozenError)
    assert error.code == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        error.code = 4  # type: ignore[misc]


def test_a_frozen_exception_of_the_script(
    run_script: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_script("""
        import dataclasses
        from zmqexecutor import ZmqExecutor
        @dataclasses.dataclass(frozen=True)
        class FrozenError(Exception):
            code: int
        def task(): raise FrozenError(3)
        with ZmqExecutor(1) as pool:
            try: pool.submit(task).result()
            except FrozenError as error: print(error.code, type(error.__cause__).__name__)
    """)
    assert done.stdout == "3 _RemoteTraceback\n", done.stderr


@refusing
def test_an_argument_or_a_result_raises_it(pool: ZmqExecutor, kind: type[Exception]) -> None:
    futures: list[concurrent.futures.Future[Any]] = [
        pool.submit(print, ThrowsWhenPickled(kind)),
        pool.submit(print, ThrowsWhenUnpickled(kind)),
        pool.submit(ThrowsWhenPickled, kind),
        pool.submit(ThrowsWhenUnpickled, kind),
    ]
    for future in futures:
        error = future.exception()
        assert type(error) is SerializationError
        assert type(error.__cause__) is kind


@refusing
def test_an_initializer_raises_it(kind: type[Exception]) -> None:
    with ZmqExecutor(1, initializer=throw, initargs=(kind,)) as broken:
        error = broken.submit(int).exception()
        assert type(error) is BrokenPoolError
        assert f"the initializer raised {kind.__name__}: 3" in str(error)


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError("it has no text")


def test_an_initializer_raises_what_has_no_text() -> None:
    with ZmqExecutor(1, initializer=throw, initargs=(UnspeakableError,)) as broken:
        error = broken.submit(int).exception()
        assert type(error) is BrokenPoolError
        assert "the initializer raised UnspeakableError" in str(error)


class _Selective(type):
    def __instancecheck__(cls, _: object) -> bool:
        throw(FrozenError, 7)


class UnaskableError(Exception, metaclass=_Selective):
    pass


def test_retry_on_raises_it(pool: ZmqExecutor) -> None:
    again = pool.options(retries=1, retry_on=UnaskableError)
    error = again.submit(throw, ValueError).exception(30)
    assert isinstance(error, FrozenError)
    assert type(error.__cause__) is ValueError


def read_unset_variable() -> object:
    return contextvars.ContextVar[int]("user").get()


def read_missing_key() -> object:
    return weakref.WeakKeyDictionary[object, int]()[ZmqExecutorError()]


class NumberlessError(OSError):
    """Has no number when asked for it."""

    errno = property(lambda self: self.args[7])


class _Nameless(type):
    def __repr__(cls) -> str:
        raise LookupError("no text")

    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise LookupError("no name")


class NamelessError(Exception, metaclass=_Nameless):
    """Of a class that cannot be shown, and cannot be pickled either."""

    def __reduce__(self) -> Any:
        raise TypeError("no pickle")


def raise_oddly(number: int) -> None:
    raise (OSError({1: 2}, "odd"), NumberlessError("odd"), NamelessError("odd"))[number]


def test_a_task_raises_what_cannot_be_looked_at(pool: ZmqExecutor) -> None:
    """It costs that task, not its worker."""
    pid = pool.submit(os.getpid).result(60)
    with pytest.raises(OSError, match="odd"):
        pool.submit(raise_oddly, 0).result(60)
    with pytest.raises(NumberlessError):
        pool.submit(raise_oddly, 1).result(60)
    with pytest.raises(SerializationError, match="NamelessError'> that cannot be pickled"):
        pool.submit(raise_oddly, 2).result(60)
    assert pool.submit(os.getpid).result(60) == pid


@pytest.mark.parametrize(
    ("task", "kind", "text"),
    [
        (read_unset_variable, LookupError, "<ContextVar name='user'"),
        (read_missing_key, KeyError, "<weakref"),
    ],
)
def test_python_raises_what_it_cannot_pickle(
    pool: ZmqExecutor, task: Callable[[], object], kind: type[Exception], text: str
) -> None:
    error = pool.submit(task).exception()
    assert type(error) is kind
    assert text in str(error)


# ------------------------------------------------- a global that could not be sent


USES = """
    handle == 3; handle != 3; 3 == handle; handle < 3; handle >= 3; handle in [3]; 3 in handle
    hash(handle); {handle: 1}; {handle}; bool(handle); not handle; handle or 3
    str(handle); f"{handle}"; "%s" % handle; format(handle, ">9"); bytes(handle)
    handle + 1; 1 + handle; "a" + handle; handle @ 1; 2 ** handle; {} | handle; handle += 1
    -handle; ~handle; abs(handle); divmod(handle, 2); int(handle); float(handle); round(handle)
    isinstance(3, handle); issubclass(int, handle); class Kind(handle): pass
    handle(); handle.name; handle.name = 3; del handle.name; open(handle)
    handle[0]; handle[0] = 3; del handle[0]; [1][handle]; list(handle); len(handle)
    next(handle); reversed(handle); with handle: pass
"""


def test_any_use_of_it_says_so(
    run_script: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """The method of a class names it, which might not be called."""
    uses = [use.strip() for line in USES.splitlines() for use in line.split(";") if use.strip()]
    done = run_script(f"""
        import os
        from zmqexecutor import ZmqExecutor
        from zmqexecutor.errors import SerializationError
        handle = open(os.devnull)
        class Job:
            def run(self):
                handle
                odd = []
                for use in {uses}:
                    try: odd.append((use, exec(use, globals())))
                    except SerializationError as error: assert "global 'handle'" in str(error)
                    except Exception as error: odd.append((use, error))
                return odd
        def call(job): return job.run()
        with ZmqExecutor(1) as pool: print(pool.submit(call, Job()).result())
    """)
    assert done.stdout == "[]\n", done.stderr


def test_it_is_there_for_debuggers_and_for_pickle() -> None:
    there = Unavailable("why")
    assert "Unavailable" in repr(there)
    assert vars(there) == {"reason": "why"}
    for again in (pickle.loads(pickle.dumps(there)), copy.copy(there), copy.deepcopy(there)):
        assert vars(again) == vars(there)
        with pytest.raises(SerializationError, match="why"):
            bool(again)


def test_what_workers_raise_is_caught_by_name(
    run_script: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Workers have the classes from another module than the one that users import them from."""
    done = run_script("""
        import os
        from zmqexecutor import RegistrationError, SerializationError, Worker, ZmqExecutor
        handle = open(os.devnull)
        class Job:
            def run(self): return handle.name
        def call(job): return job.run()
        def register():
            Worker("ipc:///nowhere/at/all", target=print, patience=0.1).run()
        with ZmqExecutor(1) as pool:
            for call_, expected in (
                ((call, Job()), SerializationError), ((register,), RegistrationError)
            ):
                try: pool.submit(*call_).result()
                except expected as error: print(type(error).__name__)
    """)
    assert done.stdout == "SerializationError\nRegistrationError\n", done.stderr
