"""Queues, locks and shared values of multiprocessing, in the initializer's arguments."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from multiprocessing import context, resource_tracker
from typing import Any, TypeAlias

import pytest

from zmqexecutor import SerializationError, WorkerLostError, ZmqExecutor
from zmqexecutor.payload.inheritance import Descriptor, inheritable

from .conftest import eventually

SPAWN = multiprocessing.get_context("spawn")

RunScript: TypeAlias = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module", autouse=True)
def multiprocessing_is_ready() -> None:
    """What it makes once and keeps, a process and a file, is no leak of a test's."""
    resource_tracker.ensure_running()
    SPAWN.Value("i", 0)


@pytest.fixture
def queue() -> Iterator[Any]:
    made: Any = SPAWN.Queue()
    yield made
    # What close() leaves open if nothing was put into it here.
    made._reader.close()
    made._writer.close()


shared: dict[str, Any] = {}
"""What the initializer was given, in a worker."""


def keep(**objects: Any) -> None:
    shared.update(objects)
    if "queue" in objects:
        shared["queue"].put(("started", os.getpid()))


def keep_all(queue: Any, lock: Any, value: Any, event: Any) -> None:
    keep(queue=queue, lock=lock, value=value, event=event)


def count(times: int) -> None:
    assert shared["event"].wait(30)
    for _ in range(times):
        with shared["lock"]:
            shared["value"].value += 1
    shared["queue"].put(("counted", os.getpid()))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_queue_a_lock_a_value_and_an_event_are_shared(queue: Any) -> None:
    lock, value, event = SPAWN.Lock(), SPAWN.Value("i", 0, lock=False), SPAWN.Event()
    with ZmqExecutor(2, initializer=keep_all, initargs=(queue, lock, value, event)) as executor:
        futures = [executor.submit(count, 500) for _ in range(4)]
        assert not wait(futures, timeout=0.2).done
        event.set()
        for future in futures:
            future.result(30)
        said = [queue.get(timeout=10) for _ in range(6)]
    assert value.value == 2000
    assert sorted(what for what, _ in said) == ["counted"] * 4 + ["started"] * 2


def test_a_worker_that_takes_the_place_of_another_has_them_too(queue: Any) -> None:
    lock, value, event = SPAWN.RLock(), SPAWN.Value("i", 0), SPAWN.Event()
    event.set()
    arguments = (queue, lock, value, event)
    with ZmqExecutor(1, initializer=keep_all, initargs=arguments) as executor:
        del arguments, lock
        gc.collect()
        executor.submit(count, 1).result(30)
        said = [queue.get(timeout=10) for _ in range(2)]  # a thread of the worker sends them
        with pytest.raises(WorkerLostError):
            executor.submit(die).result(30)
        executor.submit(count, 1).result(30)
        said += [queue.get(timeout=10) for _ in range(2)]
    assert value.value == 2
    assert [what for what, _ in said] == ["started", "counted"] * 2
    assert said[0][1] == said[1][1] != said[2][1] == said[3][1]


def test_semaphores_survive_the_workers() -> None:
    semaphore = SPAWN.BoundedSemaphore(1)
    for _ in range(2):  # the second could not open it if the first one's end had removed it
        with ZmqExecutor(1, initializer=keep_semaphore, initargs=(semaphore,)) as executor:
            assert executor.submit(try_semaphore).result(30)
        assert semaphore.acquire(timeout=0.01)
        semaphore.release()


def keep_semaphore(semaphore: Any) -> None:
    shared["semaphore"] = semaphore


def try_semaphore() -> bool:
    taken: bool = shared["semaphore"].acquire(timeout=0.01)
    shared["semaphore"].release()
    return taken


def test_a_pipe_of_one_direction() -> None:
    reader, writer = SPAWN.Pipe(duplex=False)
    with reader, writer:
        with ZmqExecutor(1, initializer=keep_writer, initargs=(writer,)) as executor:
            executor.submit(write, "hello").result(30)
        assert reader.recv() == "hello"


def keep_writer(writer: Any) -> None:
    shared["writer"] = writer


def write(text: str) -> None:
    shared["writer"].send(text)


@pytest.mark.parametrize("make", ["Lock", "RLock", "Semaphore", "Event", "Queue", "Condition"])
def test_a_lock_of_the_fork_context_is_refused(make: str) -> None:
    made: Any = getattr(multiprocessing.get_context("fork"), make)()
    with pytest.raises(SerializationError, match=r'get_context\("spawn"\).*Manager') as caught:
        ZmqExecutor(1, initializer=print, initargs=(made,))
    assert f"argument 1 (of type {make}) cannot be pickled" in str(caught.value)
    if make == "Queue":
        made._reader.close()
        made._writer.close()


def test_a_socket_is_refused() -> None:
    ends = SPAWN.Pipe()
    with ends[0], ends[1], pytest.raises(SerializationError, match=r"Pipe\(duplex=False\)"):
        ZmqExecutor(1, initializer=print, initargs=(ends[0],))


def test_in_the_arguments_of_a_task_they_are_refused_as_ever() -> None:
    with ZmqExecutor(1, initializer=print) as executor:
        future = executor.submit(print, SPAWN.Lock())
        with pytest.raises(SerializationError, match="through inheritance"):
            future.result(30)


def test_pickling_is_as_before_when_the_initializer_is_pickled() -> None:
    with inheritable():
        assert context.get_spawning_popen() is not None
    with pytest.raises(RuntimeError, match="boom"), inheritable():
        raise RuntimeError("boom")
    assert context.get_spawning_popen() is None


# ------------------------------------------------------------------- descriptors


def test_a_descriptor_is_opened_as_it_was() -> None:
    reader, writer = os.pipe()
    try:
        with os.fdopen(Descriptor.of(writer).detach(), "wb") as copy:
            assert os.get_blocking(copy.fileno())
            copy.write(b"abc")
        assert os.read(reader, 10) == b"abc"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(reader, b"x")
    finally:
        os.close(reader)
        os.close(writer)


def test_the_reading_end_is_opened_though_nobody_writes() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    copy = Descriptor.of(reader).detach()
    assert os.read(copy, 1) == b""
    os.close(copy)
    os.close(reader)


def test_a_descriptor_that_has_become_another_file_is_not_opened() -> None:
    reader, writer = os.pipe()
    described = Descriptor.of(reader)
    with open(os.devnull, "rb") as other:
        os.dup2(other.fileno(), reader)
    with pytest.raises(FileNotFoundError, match="was closed in the process"):
        described.detach()
    os.close(reader)
    with pytest.raises(FileNotFoundError):
        described.detach()
    os.close(writer)


# ----------------------------------------------------------------- shared memory

ATTACH = """
    import os, subprocess, sys, time
    from multiprocessing import shared_memory
    from zmqexecutor import ZmqExecutor

    def double(name):
        memory = shared_memory.SharedMemory(name)
        memory.buf[0] *= 2
        memory.close()
        return os.getpid()

    def create():
        memory = shared_memory.SharedMemory(create=True, size=8)
        memory.buf[0] = 7
        memory.close()
        return memory.name

    executor = ZmqExecutor(1, max_tasks_per_child=1)
    memory = shared_memory.SharedMemory(create=True, size=8)
    memory.buf[0] = 1
    pids = {executor.submit(double, memory.name).result() for _ in range(3)}
    made = executor.submit(create).result()
    executor.shutdown()
    time.sleep(0.5)  # as long as a tracker of the workers would take to remove it
    again = shared_memory.SharedMemory(memory.name)
    print(len(pids), again.buf[0])
    again.close()
    memory.close()
    memory.unlink()
    theirs = shared_memory.SharedMemory(made)
    print(theirs.buf[0])
    theirs.close()
    theirs.unlink()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_shared_memory_survives_the_worker_that_attached_to_it(run_script: RunScript) -> None:
    done = run_script(ATTACH)
    assert (done.stdout, done.stderr) == ("3 8\n7\n", "")


def test_a_program_without_shared_memory_has_no_resource_tracker(run_script: RunScript) -> None:
    done = run_script("""
        from zmqexecutor import ZmqExecutor
        from multiprocessing import resource_tracker
        with ZmqExecutor(1, initializer=print) as executor:
            executor.submit(abs, 1).result()
        print(resource_tracker._resource_tracker._fd)
    """)
    assert done.stdout.strip().endswith("None")


def put(queue: Any, number: int) -> int:
    queue.put(number)
    size: int = queue.qsize()
    return size


def test_proxies_of_a_manager_live_until_their_task_is_done() -> None:
    def start(number: int) -> Future[int]:
        queue = manager.Queue()
        if number % 2:
            return executor.submit(lambda: put(queue, number))
        return executor.submit(put, queue, number)

    with SPAWN.Manager() as manager, ZmqExecutor(1) as executor:
        futures = [start(number) for number in range(6)]
        assert [future.result(60) for future in futures] == [1] * 6
        assert list(executor.map(put, [manager.Queue(), manager.Queue()], [1, 2])) == [1, 1]
        gc.collect()
        assert eventually(lambda: manager._number_of_objects() == 0)  # type: ignore[attr-defined]
