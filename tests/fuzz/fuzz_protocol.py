"""Coverage-guided fuzzing of all that a peer can send, with Atheris. Not run by pytest.

    python -m pip install atheris        (CPython 3.11 or older, at this time)
    python -m tests.fuzz.fuzz_protocol -max_total_time=300

Each input is a story for a master without sockets: it begins with a few bytes that
choose what happens, then come frames, made by mutation of real messages. The decoders
may raise ProtocolError and nothing else, a decoded message must come out of another
round the same, and no task may get lost in the master.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

with atheris.instrument_imports(include=["zmqexecutor"]):
    from zmqexecutor.errors import ProtocolError
    from zmqexecutor.system.machine import machine_id
    from zmqexecutor.wire import protocol

    from .master import BareMaster

DECODERS = (
    protocol.decode_control_to_master,
    protocol.decode_control_from_master,
    protocol.decode_work_from_worker,
    protocol.decode_jobs,
    protocol.decode_result,
)
IDENTITIES = (b"a", b"b")
SEEDS = (
    protocol.Hello(1, "a", os.getpid(), "host", machine_id(), None, None),
    protocol.Hello(1, "b", 1, "host", "elsewhere", "ipc:///x", "/etc/passwd", "3.13"),
    protocol.Worn("why"),
    protocol.Unready("why"),
    protocol.Ready("a"),
    protocol.Results(5, [protocol.Result(1, True, b"x", "", 0.1, 0)], True),
    protocol.Results(0, [protocol.Result(2, False, b"x", "text", 0.1, 1)]),
    protocol.Goodbye(1),
    protocol.Welcome(1, "ipc:///x", b"setup"),
    protocol.Jobs(1, [protocol.Job(1, "id", b"x", "text", b"key")], [protocol.Shared(b"k", b"v")]),
    protocol.Refused("why"),
    protocol.Result(1, True, b"x"),
)


def round_trip(frame: bytes) -> None:
    for decode in DECODERS:
        try:
            message = decode(frame)
        except ProtocolError:
            continue
        encoded = protocol.encode(message)
        assert protocol.encode(decode(encoded)) == encoded


def one_input(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    bare = BareMaster()
    try:
        for number in range(provider.ConsumeIntInRange(1, 12)):
            choice = provider.ConsumeIntInRange(0, 7)
            identity = IDENTITIES[choice & 1]
            if choice < 2:
                bare.submit()
                bare.step(number * 0.001)
            elif choice < 4:  # in order, so that stories get somewhere
                name = identity.decode()
                hello = protocol.Hello(1, name, os.getpid(), "h", machine_id(), None, None)
                bare.receive("control", identity, protocol.encode(hello), [])
                bare.receive("work", identity, protocol.encode(protocol.Ready(name)), [])
            else:
                frame = provider.ConsumeBytes(provider.ConsumeIntInRange(0, 120))
                round_trip(frame)
                bare.receive("control" if choice < 6 else "work", identity, frame, [frame])
            bare.check()
    finally:
        bare.close()
    round_trip(data)


def main() -> None:
    with tempfile.TemporaryDirectory() as corpus:
        for number, message in enumerate(SEEDS):
            Path(corpus, str(number)).write_bytes(protocol.encode(message))
        atheris.Setup([*sys.argv, corpus], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
