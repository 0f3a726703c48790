"""Whatever valid, absurd or broken messages come, in whatever order, no task gets lost."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zmqexecutor.system.machine import machine_id
from zmqexecutor.wire import protocol

from .master import BareMaster

NAMES = st.sampled_from(["a", "b", "c"])
COUNTS = st.one_of(st.integers(0, 6), st.just(2**63 - 1), st.just(2**64 - 1))

hellos = st.builds(
    protocol.Hello,
    version=st.sampled_from([protocol.VERSION] * 9 + [0, 2**63]),
    worker=NAMES,
    pid=st.sampled_from([os.getpid(), os.getppid(), 1, 0, -1, 2**22, 2**31, 2**40, -(2**63)]),
    host=st.just("h"),
    machine=st.sampled_from([machine_id(), machine_id(), "elsewhere", ""]),
    workpoint=st.sampled_from([None, None, "ipc:///x", "ipc://", "nowhere", "tcp://[::1]:1", "\0"]),
    journal=st.sampled_from([None, None, "/etc/passwd", "/dev/zero", "\0", "/", ""]),
)
results = st.builds(
    protocol.Result,
    seq=COUNTS,
    ok=st.booleans(),
    data=st.binary(max_size=4),
    codec=st.sampled_from(["", "text", "?"]),
    seconds=st.floats(min_value=0, allow_nan=False),
    buffers=COUNTS,
)
control = st.one_of(
    hellos,
    st.builds(protocol.Worn, st.text(max_size=5)),
    st.builds(protocol.Unready, st.text(max_size=5)),
)
work = st.one_of(
    st.builds(protocol.Ready, NAMES),
    st.builds(protocol.Ready, NAMES),
    st.builds(protocol.Results, COUNTS, st.lists(results, max_size=4), st.booleans()),
    st.builds(protocol.Goodbye, COUNTS),
)
buffers = st.lists(st.binary(max_size=3), max_size=3)
messages = st.one_of(
    st.tuples(st.just("control"), NAMES, control.map(protocol.encode), buffers),
    st.tuples(st.just("work"), NAMES, work.map(protocol.encode), buffers),
    st.tuples(st.sampled_from(["control", "work"]), NAMES, st.binary(max_size=9), buffers),
)


def said(message: protocol.Hello | protocol.Ready) -> tuple[str, str, bytes, list[bytes]]:
    """By the worker itself."""
    channel = "control" if isinstance(message, protocol.Hello) else "work"
    return channel, message.worker, protocol.encode(message), []


def registration(name: str) -> list[Any]:
    hello = protocol.Hello(1, name, os.getpid(), "h", machine_id(), None, None)
    return [said(hello), said(protocol.Ready(name))]


steps = st.one_of(
    messages.map(lambda message: [message]),
    hellos.map(lambda hello: [said(hello)]),
    NAMES.map(registration),
    st.sampled_from([["submit"], ["submit", "submit"], ["step"], ["step"]]),
    NAMES.map(lambda name: [("gone", name)]),
    NAMES.map(lambda name: [("back", name)]),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, max_size=60))
def test_no_order_of_messages_loses_a_task(story: list[list[Any]]) -> None:
    bare = BareMaster()
    now = 0.0
    try:
        for event in (event for part in story for event in part):
            if event == "submit":
                bare.submit()
            elif event == "step":
                now += 0.001
                bare.step(now)
            elif event[0] == "gone":
                bare.channels.gone.add(event[1].encode())
            elif event[0] == "back":
                bare.channels.gone.discard(event[1].encode())
            else:
                channel, name, frame, frames = event
                bare.receive(channel, name.encode(), frame, frames)
            bare.check()
    finally:
        bare.close()
