"""The roster finds out, a few workers at a time, who has left without a word."""

from __future__ import annotations

import pytest

from tests.fuzz.master import PING_INTERVAL, BareMaster
from zmqexecutor.master import roster
from zmqexecutor.wire import protocol


def hello(name: str) -> protocol.Hello:
    return protocol.Hello(protocol.VERSION, name, 1, "elsewhere", "", None, None)


def test_many_workers_are_pinged_within_an_interval_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bare = BareMaster()
    workers = bare.coordinator.roster
    for number in range(1000):
        workers.register(bare.coordinator.channels[0], str(number).encode(), hello(str(number)))
    bare.channels.gone = {b"7", b"999"}
    pinged: list[bytes] = []
    tell = bare.channels.tell

    def count(identity: bytes, message: object) -> bool:
        pinged.append(identity)
        return tell(identity, message)

    monkeypatch.setattr(bare.channels, "tell", count)
    assert workers.next_ping is not None
    now = workers.next_ping
    end = now + PING_INTERVAL * 0.999
    while now < end:
        before = len(pinged)
        workers.ping(now)
        assert len(pinged) - before <= roster.PINGS_PER_STEP
        now = workers.next_ping
    assert len(set(pinged)) == 1000
    assert len(pinged) < 1000 + roster.PINGS_PER_STEP
    assert len(list(workers)) == 998

    for peer in workers:
        bare.coordinator.lose(peer, 0)
    workers.ping(now)
    assert bare.coordinator.roster.next_ping is None
    bare.close()
