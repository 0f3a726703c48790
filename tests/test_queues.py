"""`JobQueue` against a list that is sorted anew at each step."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from zmqexecutor.master.queues import JobQueue


class Waiting:
    def __init__(self, priority: int) -> None:
        self.priority = priority


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(-2, 2)),
        st.tuples(st.just("put back"), st.lists(st.integers(-2, 2), max_size=4)),
        st.tuples(st.sampled_from(["first", "last"]), st.none()),
    ),
    max_size=60,
)


@given(STEPS)
def test_the_order_is_that_of_a_stable_sort(steps: list[tuple[str, Any]]) -> None:
    queue: JobQueue[Waiting] = JobQueue()
    model: list[Waiting] = []
    for what, argument in steps:
        if what == "append":
            job = Waiting(argument)
            queue.append(job)
            model.append(job)
        elif what == "put back":
            jobs = [Waiting(priority) for priority in argument]
            queue.put_back(jobs)
            model[:0] = jobs
        elif model:
            taken = queue.front[0] if what == "first" else None
            job = queue.take_first() if what == "first" else queue.take_last()
            assert taken in (job, None)
            assert job is model.pop(0 if what == "first" else -1)
        model.sort(key=lambda job: -job.priority)
        assert list(queue) == model
        assert len(queue) == len(model)
        assert bool(queue) == bool(model)
        assert set(queue.oldest()) == {
            next(job for job in model if job.priority == priority)
            for priority in {job.priority for job in model}
        }


def test_each_job_may_have_a_priority_of_its_own() -> None:
    compared = 0

    class Number(int):
        def __lt__(self, other: int) -> bool:
            nonlocal compared
            compared += 1
            return int(self) < int(other)

        def __gt__(self, other: int) -> bool:
            return other < self

        __hash__ = int.__hash__

    queue: JobQueue[Waiting] = JobQueue()
    for number in range(1000):
        queue.append(Waiting(Number(number * 7919 % 1000)))
    taken = [int(queue.take_first().priority) for _ in range(1000)]
    assert taken == sorted(taken, reverse=True)
    assert compared < 1000 * 20
