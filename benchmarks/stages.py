"""What one of our tasks costs, stage by stage.

Two views. *Alone*: each piece of code that a task goes through, called many times in one
process without the others; the processor time that a task in a long queue costs, less what
messages share. *On the way*: one task at a time through a real pool, with time stamps of
the monotonic clock in both processes; it shows what is waited for, too. The stamps are
taken by wrappers around methods of the master and of the worker, a microsecond in all.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from benchmarks import tasks
from benchmarks.report import Table, value
from zmqexecutor import ZmqExecutor
from zmqexecutor.master.lean import LeanFuture
from zmqexecutor.master.offers import Offer
from zmqexecutor.payload.serialization import CallPickler, CallRunner
from zmqexecutor.wire import protocol
from zmqexecutor.wire.journal import JournalWriter

clock = time.monotonic
_stamps: dict[str, float] = {}


def table(part: float) -> Table:
    """All stages; more rounds for a larger part."""
    count = max(200, int(20_000 * part))
    rows = [["alone", name, value(s, "µs"), ""] for name, s in alone(count).items()]
    for name, times in on_the_way(max(100, count // 5)).items():
        hundredths = statistics.quantiles(times, n=100, method="inclusive")
        rows.append(["on the way", name, value(hundredths[49], "µs"), value(hundredths[98], "µs")])
    return Table("Stages of a no-op", ["view", "stage", "median [µs]", "p99 [µs]"], rows)


# ---------------------------------------------------------------- alone


def alone(count: int) -> dict[str, float]:
    """Seconds of processor time for each piece."""
    pickler, runner = CallPickler(), CallRunner()
    call = pickler.dump_call(tasks.nothing, (), {})
    runner.load_function(call.shared.key, call.shared.data)
    job = protocol.Job(1, "", call.data, "", call.shared.key, 0)
    jobs = protocol.encode(protocol.Jobs(0, [job]))
    outcome = runner.run(call.shared.key, call.data)
    result = protocol.Result(1, True, outcome.data, "", 1e-6, 0)
    results = protocol.encode(protocol.Results(1, [result]))
    encoded = protocol.encode(result)
    inbox: deque[object] = deque()

    def queue() -> None:
        inbox.append(job)
        inbox.popleft()

    def complete() -> None:
        future: LeanFuture[Any] = LeanFuture()
        future.set_running_or_notify_cancel()
        future.set_result(None)

    with tempfile.TemporaryDirectory(prefix="benchmarks-") as directory:
        journal = JournalWriter(directory)

        def write_down() -> None:
            journal.start(1, clock())
            journal.append(encoded)
            journal.confirm(journal.position)

        pieces: dict[str, Callable[[], object]] = {
            "serialise the call": lambda: pickler.dump_call(tasks.nothing, (), {}),
            "queue in the inbox, and take it out": queue,
            "encode a message of one job": lambda: protocol.encode(protocol.Jobs(0, [job])),
            "decode it": lambda: protocol.decode_jobs(jobs),
            "unpickle, run, pickle the result": lambda: runner.run(call.shared.key, call.data),
            "write it into the journal": write_down,
            "encode a message of one result": lambda: protocol.encode(
                protocol.Results(1, [result])
            ),
            "decode it ": lambda: protocol.decode_work_from_worker(results),
            "unpickle the result": lambda: pickler.load_outcome(outcome),
            "make and complete a future": complete,
        }
        found = {name: _processor_time(piece, count) for name, piece in pieces.items()}
        journal.unlink()
        journal.close()
    return found


def _processor_time(piece: Callable[[], object], count: int) -> float:
    """The median of five runs."""
    times = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(count):
            piece()
        times.append((time.process_time() - start) / count)
    return statistics.median(times)


# ---------------------------------------------------------------- on the way


def _stamp(name: str, method: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
    def stamped(*args: Any, **kwargs: Any) -> Any:
        if before:
            _stamps[name] = clock()
        result = method(*args, **kwargs)
        if not before:
            _stamps[name] = clock()
        return result

    return stamped


def watch_worker() -> None:
    """In the worker, as its initializer: have its methods take stamps."""
    from zmqexecutor.worker.calls import CallHandler
    from zmqexecutor.worker.worker import Worker

    Worker._take = _stamp("received", Worker._take, before=False)  # type: ignore[method-assign]
    run = _stamp("run", CallHandler.run, before=True)
    CallHandler.run = _stamp("done", run, before=False)  # type: ignore[method-assign]
    Worker._flush = _stamp("returned", Worker._flush, before=False)  # type: ignore[method-assign]


def stamps() -> dict[str, float]:
    """In the worker: those of the task before; its own have overwritten the first two."""
    return {**_previous, "returned": _stamps["returned"], "done": _stamps["done"]}


_previous: dict[str, float] = {}


def marked_nothing() -> None:
    """A no-op that keeps the stamps of how it came."""
    _previous.update(received=_stamps["received"], run=_stamps["run"])


ORDER = {
    "start": "",
    "sent": "submit: serialise, encode, send",
    "received": "on the way to the worker, its wake-up, decode",
    "run": "worker: note it in the journal",
    "done": "worker: unpickle, run, pickle the result",
    "returned": "worker: journal, ring the bell",
    "back": "on the way to the master, its wake-up, decode",
    "completed": "master: unpickle, complete the future",
    "end": "wake-up of the thread that waits",
}


def on_the_way(count: int) -> dict[str, list[float]]:
    """Seconds from each stamp to the next, for each of so many tasks."""
    found: dict[str, list[float]] = {title: [] for title in ORDER.values() if title}
    found["all"] = []
    unwatched = Offer.send
    Offer.send = _stamp("sent", unwatched, before=False)  # type: ignore[method-assign]
    try:
        with ZmqExecutor(1, initializer=watch_worker) as executor:
            coordinator: Any = executor._engine.master._coordinator
            coordinator._on_results = _stamp("back", coordinator._on_results, before=True)
            coordinator.finish = _stamp("completed", coordinator.finish, before=False)
            executor.submit(marked_nothing).result()
            for _ in range(count):
                times = _one(executor)
                names = sorted(ORDER, key=lambda name: times[name])
                # The threads run at once: one may be ahead of what is listed before it.
                for earlier, later in itertools.pairwise(names):
                    found[ORDER[later] or "all"].append(times[later] - times[earlier])
                found["all"].append(times["end"] - times["start"])
    finally:
        Offer.send = unwatched  # type: ignore[method-assign]
    return {title: times for title, times in found.items() if len(times) > 1}


def _one(executor: ZmqExecutor) -> dict[str, float]:
    start = clock()
    executor.submit(marked_nothing).result()
    end = clock()
    time.sleep(0.0002)  # until the master has taken its last stamp
    times = {**_stamps, "start": start, "end": end}
    return {**times, **executor.submit(stamps).result()}
