"""The wire: what is sent is received, what is not a message is refused, bytes are pinned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zmqexecutor.errors import ProtocolError
from zmqexecutor.wire import protocol
from zmqexecutor.wire.protocol import (
    Answer,
    Ask,
    Call,
    Configure,
    Die,
    Drain,
    Expelled,
    FromSupervisor,
    Goodbye,
    GroupFailed,
    Hello,
    Job,
    Jobs,
    Ping,
    Preloaded,
    Quit,
    Ready,
    Reaped,
    Refused,
    Report,
    Result,
    Results,
    Scale,
    Segment,
    ServiceReport,
    Shared,
    ShowStack,
    Spawned,
    Stack,
    ToSupervisor,
    Unready,
    Welcome,
    WorkerReport,
    Worn,
    encode,
)


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """In the place of conftest's: nothing here opens anything, and looking takes time."""


Decode = Callable[[bytes], object]

CONTROL_TO_MASTER = "control to master"
CONTROL_TO_WORKER = "control to worker"
WORK_TO_MASTER = "work to master"
WORK_TO_WORKER = "work to worker"
TO_CLIENT = "control to client"
IN_JOURNAL = "in the journal"

DECODERS: dict[str, Decode] = {
    CONTROL_TO_MASTER: protocol.decode_control_to_master,
    CONTROL_TO_WORKER: protocol.decode_control_from_master,
    WORK_TO_MASTER: protocol.decode_work_from_worker,
    WORK_TO_WORKER: protocol.decode_jobs,
    TO_CLIENT: protocol.decode_to_client,
    IN_JOURNAL: protocol.decode_result,
}
HELLO = Hello(1, "w1", 42, "host", "machine", None, "/dev/shm/j", "3.13.1", ["a"], "/m")
JOB = Job(1, "id", b"data", "text", b"key", 2, Segment("s", [7]), "a")
RESULT = Result(1, True, b"data", "text", 0.5, 1, Segment("s", []), True)

# Each message with its bytes, as written in docs/protocol.md: array, name, fields.
WIRE: list[tuple[str, object, bytes]] = [
    (
        CONTROL_TO_MASTER,
        HELLO,
        b"\x9b\xa5Hello\x01\xa2w1\x2a\xa4host\xa7machine\xc0\xaa/dev/shm/j\xa63.13.1\x91\xa1a"
        b"\xa2/m",
    ),
    (CONTROL_TO_MASTER, Unready("why"), b"\x92\xa7Unready\xa3why"),
    (
        CONTROL_TO_WORKER,
        Welcome(1, "ipc://w", b"s", 2.5, "/b"),
        b"\x96\xa7Welcome\x01\xa7ipc://w\xc4\x01s\xcb\x40\x04\x00\x00\x00\x00\x00\x00\xa2/b",
    ),
    (CONTROL_TO_WORKER, Refused("why"), b"\x92\xa7Refused\xa3why"),
    (CONTROL_TO_WORKER, Drain(), b"\x91\xa5Drain"),
    (CONTROL_TO_WORKER, Ping(), b"\x91\xa4Ping"),
    (CONTROL_TO_WORKER, ShowStack(), b"\x91\xa9ShowStack"),
    (CONTROL_TO_WORKER, Expelled(), b"\x91\xa8Expelled"),
    (CONTROL_TO_WORKER, Die(), b"\x91\xa3Die"),
    (CONTROL_TO_MASTER, Ask(1), b"\x92\xa3Ask\x01"),
    (
        CONTROL_TO_MASTER,
        Call(5, "id", b"data", "text", "a"),
        b"\x96\xa4Call\x05\xa2id\xc4\x04data\xa4text\xa1a",
    ),
    (
        TO_CLIENT,
        Answer(5, False, b"why", "text", "Error"),
        b"\x96\xa6Answer\x05\xc2\xc4\x03why\xa4text\xa5Error",
    ),
    (
        TO_CLIENT,
        Report(
            1,
            "h",
            7,
            0.5,
            {"queued": 2},
            [ServiceReport("a", 1, 2)],
            [WorkerReport("w1", "h", 8, ["a"], "idle", 3, 0.5)],
            1,
            2,
        ),
        b"\x9a\xa6Report\x01\xa1h\x07\xcb\x3f\xe0\0\0\0\0\0\0\x81\xa6queued\x02\x91"
        b"\x83\xa4name\xa1a\xa7workers\x01\xa6queued\x02\x91\x87\xa2id\xa2w1\xa4host\xa1h"
        b"\xa3pid\x08\xa8services\x91\xa1a\xa5state\xa4idle\xa9jobs_done\x03\xa3age"
        b"\xcb\x3f\xe0\0\0\0\0\0\0\x01\x02",
    ),
    (CONTROL_TO_MASTER, Stack("text"), b"\x92\xa5Stack\xa4text"),
    (CONTROL_TO_MASTER, Worn("why"), b"\x92\xa4Worn\xa3why"),
    (WORK_TO_MASTER, Ready("w1"), b"\x92\xa5Ready\xa2w1"),
    (
        WORK_TO_MASTER,
        Results(7, [RESULT], True),
        b"\x94\xa7Results\x07\x91\x98\x01\xc3\xc4\x04data\xa4text\xcb\x3f\xe0\0\0\0\0\0\0\x01"
        b"\x92\xa1s\x90\xc3\xc3",
    ),
    (WORK_TO_MASTER, Goodbye(), b"\x92\xa7Goodbye\x00"),
    (
        WORK_TO_WORKER,
        Jobs(9, [JOB], [Shared(b"key", b"function")], [b"old"], 3),
        b"\x96\xa4Jobs\x09\x91\x98\x01\xa2id\xc4\x04data\xa4text\xc4\x03key\x02\x92\xa1s\x91\x07\xa1a"
        b"\x91\x92\xc4\x03key\xc4\x08function\x91\xc4\x03old\x03",
    ),
    (WORK_TO_WORKER, Jobs(9, []), b"\x96\xa4Jobs\x09\x90\x90\x90\x00"),
    (
        IN_JOURNAL,
        Result(1, False, b"", "", 0.0, 0),
        b"\x98\x01\xc2\xc4\x00\xa0\xcb\0\0\0\0\0\0\0\0\x00\xc0\xc2",
    ),
]
IDS = [type(message).__name__ for _, message, _ in WIRE]

# The supervisor is a Python program of ours, and its lines are JSON, for people to read.
SUPERVISION: list[tuple[object, object, bytes]] = [
    (
        ToSupervisor,
        Configure(
            ["python"],
            2,
            "/d",
            {"A": "b"},
            "/w",
            1.0,
            {"cpu": 9},
            Preloaded("m", "f", ["a"]),
        ),
        b'["Configure",["python"],2,"/d",{"A":"b"},"/w",1.0,{"cpu":9},["m","f",["a"]]]',
    ),
    (ToSupervisor, Scale(3, True), b'["Scale",3,true]'),
    (ToSupervisor, Quit(1.0), b'["Quit",1.0,false,false]'),
    (FromSupervisor, Spawned(7), b'["Spawned",7]'),
    (
        FromSupervisor,
        Reaped(7, -9, "last\nwords", 5, True, "a\nstack", "cpu=9"),
        b'["Reaped",7,-9,"last\\nwords",5,true,"a\\nstack","cpu=9"]',
    ),
    (FromSupervisor, GroupFailed("why"), b'["GroupFailed","why"]'),
]

# What an author of a worker in another language may leave out at the end.
SHORT: list[tuple[str, bytes, object]] = [
    (
        CONTROL_TO_MASTER,
        b"\x98\xa5Hello\x01\xa2w1\x2a\xa4host\xa7machine\xc0\xc0",
        Hello(1, "w1", 42, "host", "machine", None, None),
    ),
    (CONTROL_TO_WORKER, b"\x93\xa7Welcome\x01\xa7ipc://w", Welcome(1, "ipc://w")),
    (
        WORK_TO_MASTER,
        b"\x93\xa7Results\x00\x91\x93\x01\xc3\xc4\x01x",
        Results(0, [Result(1, True, b"x")]),
    ),
    (
        WORK_TO_WORKER,
        b"\x93\xa4Jobs\x00\x91\x93\x01\xa2id\xc4\x01x",
        Jobs(0, [Job(1, "id", b"x")]),
    ),
]


def refuses(where: str, frame: bytes) -> bool:
    """Whether the decoder raises ProtocolError; anything else that it raises escapes."""
    try:
        DECODERS[where](frame)
    except ProtocolError:
        return True
    return False


# ------------------------------------------------------------------ what is sent


@pytest.mark.parametrize(("where", "message", "frame"), WIRE, ids=IDS)
def test_a_message_has_the_bytes_that_other_languages_rely_on(
    where: str, message: object, frame: bytes
) -> None:
    assert encode(message) == frame


@pytest.mark.parametrize(("where", "message", "frame"), WIRE, ids=IDS)
def test_a_message_arrives_as_it_was_sent(where: str, message: object, frame: bytes) -> None:
    arrived = DECODERS[where](frame)
    assert type(arrived) is type(message)
    assert arrived == message


@pytest.mark.parametrize(("where", "frame", "message"), SHORT)
def test_fields_with_defaults_may_be_left_out(where: str, frame: bytes, message: object) -> None:
    assert DECODERS[where](frame) == message


@pytest.mark.parametrize(("where", "message", "frame"), WIRE, ids=IDS)
def test_a_later_version_may_append_fields(where: str, message: object, frame: bytes) -> None:
    longer = bytes([frame[0] + 1]) + frame[1:] + b"\xa3new"
    assert DECODERS[where](longer) == message


def test_every_message_is_pinned_here() -> None:
    pinned = [message for _, message, _ in [*WIRE, *SUPERVISION]]
    assert set(protocol.Message.__subclasses__()) == {type(message) for message in pinned} - {
        Result
    }


@pytest.mark.parametrize(("kinds", "message", "line"), SUPERVISION)
def test_a_message_of_the_supervision_is_one_line(kinds: Any, message: object, line: bytes) -> None:
    assert msgspec.json.encode(message) == line
    assert b"\n" not in line
    arrived: object = msgspec.json.decode(line, type=kinds)
    assert type(arrived) is type(message)
    assert arrived == message


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_frame_may_be_any_kind_of_buffer(kind: Callable[[bytes], Any]) -> None:
    assert protocol.decode_jobs(kind(encode(Jobs(1, [JOB])))) == Jobs(1, [JOB])


def test_data_stays_bytes_when_the_frame_is_gone() -> None:
    frame = bytearray(encode(Jobs(1, [JOB])))
    (job,) = protocol.decode_jobs(frame).jobs
    frame[:] = bytes(len(frame))
    assert type(job.data) is bytes
    assert job.data == b"data"


@pytest.mark.parametrize("number", [0, 127, 128, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_numbers_have_64_bits(number: int) -> None:
    assert protocol.decode_jobs(encode(Jobs(number, []))) == Jobs(number, [])
    goodbye = Goodbye(number)
    assert protocol.decode_work_from_worker(encode(goodbye)) == goodbye


@pytest.mark.parametrize("size", [0, 255, 256, 65535, 65536, 2**20])
def test_data_of_any_size_stays_the_same(size: int) -> None:
    result = Result(1, True, bytes(size))
    assert protocol.decode_result(encode(result)) == result


@given(
    st.builds(
        Job,
        seq=st.integers(0, 2**64 - 1),
        id=st.text(st.characters(exclude_categories=["Cs"])),
        data=st.binary(),
        codec=st.sampled_from(["", "text"]),
        shared=st.binary(max_size=16),
        buffers=st.integers(0, 10),
    )
)
def test_any_job_arrives_as_it_was_sent(job: Job) -> None:
    assert protocol.decode_jobs(encode(Jobs(0, [job, job]))).jobs == [job, job]


# --------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("where", "message", "frame"), WIRE, ids=IDS)
def test_a_message_is_refused_where_it_does_not_belong(
    where: str, message: object, frame: bytes
) -> None:
    assert [place for place in DECODERS if not refuses(place, frame)] == [where]


@pytest.mark.parametrize(("where", "message", "frame"), WIRE, ids=IDS)
def test_a_message_cut_short_is_refused(where: str, message: object, frame: bytes) -> None:
    assert all(refuses(where, frame[:length]) for length in range(len(frame)))


@pytest.mark.parametrize(("where", "message", "frame"), WIRE, ids=IDS)
def test_bytes_after_a_message_are_refused(where: str, message: object, frame: bytes) -> None:
    assert refuses(where, frame + b"\xc0")
    assert refuses(where, frame + frame)


@pytest.mark.parametrize(
    ("where", "content"),
    [
        (CONTROL_TO_MASTER, ["Ask", "1"]),
        (CONTROL_TO_MASTER, ["Ask", 1.5]),
        (CONTROL_TO_MASTER, ["Ask", None]),
        (CONTROL_TO_MASTER, ["Ask"]),
        (CONTROL_TO_MASTER, ["Recalled", [1]]),
        (CONTROL_TO_MASTER, ["Unready", b"bytes"]),
        (CONTROL_TO_MASTER, ["Hello", "1", "w", 1, "h", "m", None, None]),
        (CONTROL_TO_MASTER, ["Hello", 1, "w", None, "h", "m", None, None]),
        (CONTROL_TO_MASTER, ["hello", 1, "w", 1, "h", "m", None, None]),
        (CONTROL_TO_MASTER, {"Worn": ["why"]}),
        (CONTROL_TO_MASTER, "Worn"),
        (CONTROL_TO_MASTER, []),
        (CONTROL_TO_MASTER, None),
        (CONTROL_TO_WORKER, ["Welcome", 1, "w", "text"]),
        (CONTROL_TO_WORKER, ["Refused", 7]),
        (WORK_TO_MASTER, ["Ready", 7]),
        (WORK_TO_MASTER, ["Results", 0, [["1", True, b""]]]),
        (WORK_TO_MASTER, ["Results", 0, [[1, 1, b""]]]),
        (WORK_TO_MASTER, ["Results", 0, [[1, True, "text"]]]),
        (WORK_TO_MASTER, ["Results", 0, [[1, True]]]),
        (WORK_TO_MASTER, ["Results", 0, [None]]),
        (WORK_TO_WORKER, ["Jobs", 0, [[1, b"id", b"x"]]]),
        (WORK_TO_WORKER, ["Jobs", 0, [[1, "id", "x"]]]),
        (WORK_TO_WORKER, ["Jobs", 0, {}]),
        (WORK_TO_WORKER, ["Jobs", 0, [], [], ["text"]]),
    ],
)
def test_fields_of_a_wrong_type_are_refused(where: str, content: object) -> None:
    assert refuses(where, msgspec.msgpack.encode(content))


@pytest.mark.parametrize(
    "content",
    [
        ["Results", -1, []],
        ["Results", 0, [[-1, True, b""]]],
        ["Results", 0, [[1, True, b"", "", -1.0]]],
        ["Results", 0, [[1, True, b"", "", float("nan")]]],
        ["Results", 0, [[1, True, b"", "", 0.0, -1]]],
    ],
)
def test_numbers_that_cannot_be_are_refused(content: object) -> None:
    assert refuses(WORK_TO_MASTER, msgspec.msgpack.encode(content))


def test_text_that_is_not_utf8_is_refused() -> None:
    assert refuses(CONTROL_TO_MASTER, b"\x92\xa7Unready\xa2\xff\xfe")
    assert refuses(CONTROL_TO_MASTER, b"\x92\xa2\xff\xfe\xa3why")
    assert refuses(WORK_TO_WORKER, b"\x93\xa4Jobs\x00\x91\x93\x01\xa2\xff\xfe\xc4\x01x")


def test_a_length_without_its_elements_is_refused_without_making_room_for_them() -> None:
    assert refuses(WORK_TO_MASTER, b"\x93\xa7Results\x00\xdd\xff\xff\xff\xff")
    assert refuses(CONTROL_TO_MASTER, b"\x92\xa7Unready\xdb\xff\xff\xff\xff")
    assert refuses(WORK_TO_WORKER, b"\x93\xa4Jobs\x00\xdd\x7f\xff\xff\xff\x90")


@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xc0", b"\xdd\0\0\0\x01"])
def test_deep_nesting_is_refused(opener: bytes) -> None:
    for where in DECODERS:
        assert refuses(where, opener * 100_000)
    assert refuses(CONTROL_TO_MASTER, b"\x93\xa7Unready\xa3why" + opener * 100_000)


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
@example(b"\xa1\xff")
def test_garbage_raises_nothing_but_protocol_errors(frame: bytes) -> None:
    for where in DECODERS:
        refuses(where, frame)


@st.composite
def damaged_messages(draw: st.DrawFn) -> tuple[str, bytes]:
    where, _, frame = draw(st.sampled_from(WIRE))
    damaged = bytearray(frame)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(damaged)))
        removed = draw(st.integers(0, 3))
        damaged[at : at + removed] = draw(st.binary(max_size=4))
    return where, bytes(damaged)


@given(damaged_messages())
@example((CONTROL_TO_MASTER, b"\x92\xa7Unready\xa3wh\xff"))
def test_damaged_messages_raise_nothing_but_protocol_errors(damaged: tuple[str, bytes]) -> None:
    refuses(*damaged)


def test_the_error_says_what_is_wrong() -> None:
    with pytest.raises(ProtocolError, match=r"not a message that may come here: .*Drain"):
        protocol.decode_control_to_master(encode(Drain()))
