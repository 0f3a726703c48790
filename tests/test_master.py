"""What goes wrong in the master's thread, or while it starts and ends, loses no future."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest

from zmqexecutor import BrokenPoolError, JobRunner, ZmqExecutor
from zmqexecutor.master.inbox import Inbox
from zmqexecutor.master.lean import LeanFuture
from zmqexecutor.master.loop import Loop
from zmqexecutor.master.roster import Roster
from zmqexecutor.master.tasks import Task
from zmqexecutor.supervision.workers import Workers

from .conftest import alive, eventually


def masters() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "zmqexecutor-master"]


def make_task() -> Task:
    return Task(kind="", future=LeanFuture(), data=b"", decode=lambda *_: None, name="late")


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[ZmqExecutor, Path]]:
    """An executor whose one worker runs a task until there is such a file."""
    gate = tmp_path / "gate"

    def wait_for(path: Path) -> None:
        while not path.exists():
            time.sleep(0.005)

    with ZmqExecutor(1) as executor:
        running = executor.submit(wait_for, gate)
        assert eventually(running.running)
        yield executor, gate
        gate.touch()


def test_callbacks_that_kill_more_tasks_start_no_other_supervisor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What they leave in the inbox is not looked at after the end, and the supervisor's neither."""
    launches = []
    launch = Workers._launch

    def count(workers: Workers) -> Any:
        launches.append(workers)
        return launch(workers)

    monkeypatch.setattr(Workers, "_launch", count)
    executor = ZmqExecutor(1)
    executor.submit(abs, -1).result(60)
    futures = [executor.submit(time.sleep, 1000) for _ in range(3)]
    group = executor._engine.master._coordinator.fleet.group
    assert group
    assert group.supervisor_pid
    supervisor = group.supervisor_pid

    def kill_others(_: Future[Any]) -> None:
        for future in futures:
            future.kill()
        assert eventually(lambda: not alive(supervisor))

    for future in futures:
        future.add_done_callback(kill_others)
    executor.kill_workers()
    executor.shutdown()
    assert all(future.done() for future in futures)
    assert len(launches) == 1


def test_a_filter_of_the_users_log_that_raises(busy: tuple[ZmqExecutor, Path]) -> None:
    executor, _ = busy
    futures = [executor.submit(abs, -number) for number in range(3)]
    logger = logging.getLogger("zmqexecutor")

    def refuse(record: logging.LogRecord) -> bool:
        raise AttributeError("no request_id")

    handler = logging.NullHandler()
    handler.addFilter(refuse)
    logger.addHandler(handler)
    loop = logging.getLogger("zmqexecutor.master.loop")
    loop.addFilter(refuse)
    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        executor._engine.master._call(lambda: loop.warning("anything"))
        for future in futures:
            with pytest.raises(BrokenPoolError, match="no request_id"):
                future.result(60)
        with pytest.raises(BrokenPoolError, match="no request_id"):
            executor.submit(abs, 1)
        assert eventually(lambda: not masters(), 60)
    finally:
        threading.excepthook = hook
        loop.removeFilter(refuse)
        logger.removeHandler(handler)


def test_a_future_that_somebody_else_has_completed(
    busy: tuple[ZmqExecutor, Path], caplog: pytest.LogCaptureFixture
) -> None:
    executor, gate = busy
    futures: list[Future[Any]] = [executor.submit(abs, -number) for number in range(6)]
    futures[1].set_result("mine")
    futures[3].set_result("mine")
    gate.touch()
    assert [future.result(60) for future in futures] == [0, "mine", 2, "mine", 4, 5]
    assert executor.submit(abs, -7).result(60) == 7
    assert "a future was not completed" in caplog.text


class Hostile(type):
    def __instancecheck__(cls, _: object) -> bool:
        raise KeyError("a mistake of the user's")


class NeverError(Exception, metaclass=Hostile):
    pass


def test_a_retry_on_that_raises() -> None:
    def fail() -> None:
        raise ValueError("why it is asked")

    with ZmqExecutor(1) as executor:
        futures: list[Future[Any]] = [executor.options(retries=1, retry_on=NeverError).submit(fail)]
        futures += [executor.submit(abs, -number) for number in range(3)]
        with pytest.raises(KeyError, match="a mistake of the user's") as caught:
            futures[0].result(60)
        assert isinstance(caught.value.__cause__, ValueError)
        assert [future.result(60) for future in futures[1:]] == [0, 1, 2]


def test_a_broken_executor_is_freed_though_submit_has_told_why() -> None:
    def fail() -> None:
        raise ValueError

    def use() -> None:
        executor = ZmqExecutor(1, initializer=fail)
        assert isinstance(executor.submit(abs, 1).exception(60), BrokenPoolError)
        with pytest.raises(BrokenPoolError):
            executor.submit(abs, 1)

    use()
    assert eventually(lambda: not masters())


def test_an_interrupt_of_the_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = threading.Event()
    open_ = Loop._open

    def slow(loop: Loop) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.wait(60)
        open_(loop)

    monkeypatch.setattr(Loop, "_open", slow)
    with pytest.raises(KeyboardInterrupt):
        ZmqExecutor(1)
    assert masters()
    interrupted.set()
    assert eventually(lambda: not masters())


def test_no_room_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """That nothing is left of it is for `no_leaks` to see."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            ZmqExecutor(1)


class TestAPartThatCannotBeClosed:
    @pytest.fixture(autouse=True)
    def _roster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        close = Roster.close

        def fail(roster: Roster) -> None:
            close(roster)
            raise OSError("it cannot be closed")

        monkeypatch.setattr(Roster, "close", fail)
        monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def test_when_it_could_not_be_opened(self) -> None:
        with pytest.raises(OSError, match="No such file"):
            ZmqExecutor(1, endpoint="ipc:///nonexistent/endpoint")

    def test_at_the_end(self, tmp_path: Path) -> None:
        endpoint = f"ipc://{tmp_path}/master"
        runner = JobRunner(endpoint)
        runner.start()
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                runner.wait_for_workers(1)
            except RuntimeError as error:
                errors.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        assert runner._master
        assert eventually(lambda: runner._master._coordinator.attendance._watchers)  # type: ignore[union-attr]
        runner.stop()
        waiter.join(60)
        assert errors
        runner.start()  # the address is free
        runner.stop()


def test_a_closed_inbox_fails_what_is_there_and_what_comes() -> None:
    inbox = Inbox()
    early, late = make_task(), make_task()
    inbox.submit(early)
    inbox.call(lambda: pytest.fail("nobody makes calls any more"))
    inbox.close("")
    inbox.submit(late)
    inbox.call(lambda: pytest.fail("nobody makes calls any more"))
    for task in (early, late):
        with pytest.raises(CancelledError):
            task.future.result(0)
    assert not inbox.items


def test_an_interrupt_while_late_tasks_fail_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = Inbox()
    tasks = [make_task() for _ in range(3)]
    inbox.items.extend(tasks)
    fail = Task.fail

    def interrupted(task: Task, error: BaseException) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Task, "fail", interrupted)
        with pytest.raises(KeyboardInterrupt):
            inbox.close("no more")
    assert Task.fail is fail
    inbox.submit(make_task())
    for task in tasks:
        with pytest.raises(BrokenPoolError, match="no more"):
            task.future.result(0)
