"""Steps of a master that has no thread, where it matters what comes first."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from tests.fuzz.master import BareMaster
from zmqexecutor import BrokenPoolError


@pytest.fixture
def bare() -> Iterator[BareMaster]:
    master = BareMaster()
    yield master
    master.close()


def test_a_task_that_crosses_with_the_end_fails(bare: BareMaster) -> None:
    bare.submit()
    bare.step(1.0)
    bare.coordinator.end(RuntimeError("for this test"), kill=False)
    bare.submit()
    bare.step(2.0)
    assert bare.coordinator.done()
    assert bare.futures[0].cancelled()
    with pytest.raises(CancelledError):
        bare.futures[1].result(0)


def test_a_task_that_crosses_with_a_break_fails(bare: BareMaster) -> None:
    bare.coordinator.break_off("for this test")
    bare.submit()
    bare.step(1.0)
    with pytest.raises(BrokenPoolError, match="for this test"):
        bare.futures[0].result(0)
    assert not bare.coordinator.done()  # who made it has to shut it down
    bare.coordinator.close_when_done(cancel=False)
    assert bare.coordinator.done()
