"""What a signal handler raises while a call is pickled is the program's, not the call's."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from zmqexecutor import SerializationError, ZmqExecutor
from zmqexecutor.payload import proofs
from zmqexecutor.payload.namespaces import importable
from zmqexecutor.system.interrupts import is_interrupt


class LimitError(Exception):
    """What a handler of SIGALRM raises to limit some time."""


class Interrupted:
    """An argument in the middle of whose pickle a signal comes."""

    def __init__(self, signum: int) -> None:
        self.signum = signum

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), self.signum)
        return str, ("pickled",)


class Exits:
    """An argument that exits by itself."""

    def __reduce__(self) -> Any:
        sys.exit(9)


class Handler:
    """An object that is a handler."""

    def __call__(self, *_: Any) -> None:
        limit()

    def method(self, *_: Any) -> None:
        limit()


def limit(*_: Any) -> None:
    raise LimitError("time is over")


def leave(*_: Any) -> None:
    sys.exit(7)


def disarm(signum: int, _frame: Any) -> None:
    signal.signal(signum, signal.SIG_IGN)
    raise LimitError


class Inherits(Handler):
    """Has its `__call__` from another class."""


def take(value: Any) -> Any:
    return value


HANDLERS: dict[str, tuple[Callable[..., Any], type[BaseException]]] = {
    "exits": (leave, SystemExit),
    "raises": (limit, LimitError),
    "a lambda": (lambda *_: limit(), LimitError),
    "a method": (Handler().method, LimitError),
    "an object": (Handler(), LimitError),
    "one that inherits": (Inherits(), LimitError),
    "a cached one": (functools.lru_cache(limit), LimitError),
    "a wrapped one": (functools.wraps(limit)(lambda *args: limit(*args)), LimitError),
    "a partial": (functools.partial(limit, "more"), LimitError),
    "Ctrl-C": (signal.default_int_handler, KeyboardInterrupt),
}


@pytest.fixture
def executor() -> Iterator[ZmqExecutor]:
    with ZmqExecutor(1) as executor:
        executor.submit(abs, -1).result(60)
        yield executor


@pytest.fixture(params=[*HANDLERS.values()], ids=[*HANDLERS])
def raised(request: pytest.FixtureRequest) -> Iterator[type[BaseException]]:
    """A handler of SIGUSR1 is installed, which raises this."""
    handler, kind = request.param
    before = signal.signal(signal.SIGUSR1, handler)
    yield kind
    signal.signal(signal.SIGUSR1, before)


def test_it_comes_out_of_submit(executor: ZmqExecutor, raised: type[BaseException]) -> None:
    with pytest.raises(raised):
        executor.submit(take, Interrupted(signal.SIGUSR1))
    with pytest.raises(raised):
        executor.share(Interrupted(signal.SIGUSR1))
    with pytest.raises(raised):
        executor.map(take, [1, Interrupted(signal.SIGUSR1)])
    assert executor.submit(abs, -2).result(60) == 2


def test_it_comes_out_of_a_definition(executor: ZmqExecutor, raised: type[BaseException]) -> None:
    held = Interrupted(signal.SIGUSR1)
    with pytest.raises(raised):
        executor.submit(lambda: held)


def test_it_comes_out_of_a_proof(
    monkeypatch: pytest.MonkeyPatch, raised: type[BaseException]
) -> None:
    def interrupted(*_: Any) -> bool:
        os.kill(os.getpid(), signal.SIGUSR1)
        return True

    proof = proofs.prove([[1]])
    assert proof is not None
    assert proof.holds()
    monkeypatch.setattr(proof, "_compiled", [interrupted])
    with pytest.raises(raised):
        proof.holds()
    monkeypatch.setattr(proofs, "has_constants", interrupted)
    with pytest.raises(raised):
        proofs.prove([[1]])


def test_it_comes_out_though_the_handler_has_disarmed_itself(executor: ZmqExecutor) -> None:
    before = signal.signal(signal.SIGUSR1, disarm)
    try:
        with pytest.raises(LimitError):
            executor.submit(take, Interrupted(signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, before)


class Unlucky(type):
    """A signal comes while someone looks for the name of its instances."""

    def __getattribute__(cls, name: str) -> Any:
        if name == "__module__" and type.__getattribute__(cls, "armed"):
            os.kill(os.getpid(), signal.SIGUSR1)
        return type.__getattribute__(cls, name)


def test_it_comes_out_of_the_look_for_a_name(raised: type[BaseException]) -> None:
    unlucky = Unlucky("Class", (), {"armed": True})
    with pytest.raises(raised):
        importable(unlucky)
    unlucky.armed = False  # type: ignore[attr-defined]
    assert not importable(unlucky)


def test_what_an_argument_raises_itself_is_its_future_s(executor: ZmqExecutor) -> None:
    future = executor.submit(take, Exits())
    with pytest.raises(SerializationError, match="SystemExit: 9"):
        future.result(60)


def test_a_handler_that_submits_what_cannot_be_pickled(executor: ZmqExecutor) -> None:
    """The error is that of its own call."""
    futures: list[Any] = []

    def submit(*_: Any) -> None:
        futures.append(executor.submit(take, Exits()))

    before = signal.signal(signal.SIGUSR1, submit)
    try:
        assert executor.submit(take, Interrupted(signal.SIGUSR1)).result(60) == "pickled"
    finally:
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(SerializationError, match="SystemExit: 9"):
        futures[0].result(60)


def test_a_function_that_is_called_is_no_handler() -> None:
    before = signal.signal(signal.SIGUSR1, limit)
    found: list[bool] = []

    def look() -> None:
        try:
            limit(signal.SIGUSR1, None)
        except LimitError as error:
            found.append(is_interrupt(error))

    try:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        look()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert found == [False, False]
