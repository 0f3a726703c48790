"""The wire: one typed struct per message, and nothing that touches a socket.

A message is one ZeroMQ frame of msgpack, an array whose first element is the
message's name; big binary buffers may follow as frames of their own. What a
job's data means is known only to the two ends (see `serialization`): here it
is bytes, carried as given.

Two channels carry messages between the master and each of its workers (the
endpoint for control, the workpoint for jobs), and a third, a plain socket pair
and not ZeroMQ, connects a `Workers` group with its supervisor process:

    control, worker to master     Hello, Unready, Worn, Stack
    control, master to worker     Welcome, Refused, Drain, Ping, ShowStack, Expelled, Die
    control, client to master     Ask, Call
    control, master to client     Report, Answer
    work, worker to master        Ready, Results, Goodbye
    work, master to worker        Jobs
    group to supervisor           Configure, Scale, Quit
    supervisor to group           Spawned, Reaped, GroupFailed

docs/protocol.md describes the same for authors of workers in other languages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final, TypeAlias, TypeVar

import msgspec

from ..worker_errors import ProtocolError

__all__ = [
    "CALLS",
    "DEFAULT_SERVICE",
    "LARGEST_CONTROL_MESSAGE",
    "VERSION",
    "Answer",
    "Ask",
    "Call",
    "Configure",
    "ControlFromMaster",
    "ControlFromWorker",
    "Die",
    "Drain",
    "Expelled",
    "Frame",
    "FromClient",
    "FromSupervisor",
    "Goodbye",
    "GroupFailed",
    "Hello",
    "Job",
    "Jobs",
    "Ping",
    "Preloaded",
    "Quit",
    "Ready",
    "Reaped",
    "Refused",
    "Report",
    "Result",
    "Results",
    "Scale",
    "Segment",
    "ServiceReport",
    "Shared",
    "ShowStack",
    "Spawned",
    "Stack",
    "ToClient",
    "ToSupervisor",
    "Unready",
    "Welcome",
    "WorkFromWorker",
    "WorkerReport",
    "Worn",
    "check_service",
    "decode_control_from_master",
    "decode_control_to_master",
    "decode_jobs",
    "decode_result",
    "decode_to_client",
    "decode_work_from_worker",
    "encode",
    "makes_calls",
]

_T = TypeVar("_T")
Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Frame: TypeAlias = bytes | bytearray | memoryview

VERSION: Final = 1
"""The protocol's version. A master refuses a worker that speaks another one."""
LARGEST_CONTROL_MESSAGE: Final = 1024 * 1024
"""Bytes; who sends a master more is disconnected."""

DEFAULT_SERVICE: Final = "default"
"""What a worker offers, and a job asks for, where nobody names a service."""
CALLS: Final = "python"
"""What an executor's workers offer: to make calls; with `/` and a name, special ones."""


def check_service(name: object, longest: int = 255) -> str:
    """Return the name of a service.

    Raises:
        TypeError: it is not text.
        ValueError: it is too short or too long, or text that UTF-8 cannot carry.
    """
    if not isinstance(name, str):
        raise TypeError(f"a service is named by text, not {name!r}")
    if not 0 < len(name) <= longest:
        raise ValueError(f"a service's name has 1 to {longest} characters: {name!r}")
    name.encode()  # raises UnicodeEncodeError, a ValueError
    return name


def makes_calls(service: str) -> bool:
    """Whether this is a service of an executor's workers."""
    return service == CALLS or service.startswith(f"{CALLS}/")


def shown(service: str) -> str:
    """What users call this service."""
    return service.removeprefix(f"{CALLS}/")


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """A message: an array whose first element is the name of its class."""


# ---------------------------------------------------------------- supervision


class Preloaded(msgspec.Struct, frozen=True, array_like=True):
    """What the processes of a group do, if they can be forked instead of started by `cmd`.

    They call this function of this module, which has to do the same as the command.
    """

    module: str
    function: str
    arguments: list[str | int | dict[str, int]]


class Configure(Message, frozen=True):
    """The first message to a supervisor: what to run, and how many of it."""

    cmd: list[str]
    numprocesses: int
    directory: str
    """The private directory, in which Circus's own sockets are bound."""
    env: dict[str, str] | None = None
    working_dir: str | None = None
    graceful_timeout: float = 5.0
    """Seconds between SIGTERM and SIGKILL when a process is stopped."""
    rlimits: dict[str, int] | None = None
    """Resource limits of each process, by the names that Circus takes."""
    preloaded: Preloaded | None = None


class Scale(Message, frozen=True):
    """Keep this many processes alive from now on."""

    numprocesses: int
    spare: bool = False
    """Let surplus processes end by themselves instead of stopping them."""


class Quit(Message, frozen=True):
    """Stop every process, then end the supervisor."""

    graceful_timeout: float
    """Seconds between SIGTERM and SIGKILL for the processes."""
    remove_directory: bool = False
    """Nobody needs the private directory any more."""
    with_children: bool = False
    """What the processes have started is to end too: nobody needs that either."""


class Spawned(Message, frozen=True):
    """The supervisor started a process."""

    pid: int


class Reaped(Message, frozen=True):
    """A process of the group ended; exitcode is as `subprocess` gives it."""

    pid: int
    exitcode: int | None
    stderr: str
    """The last lines it wrote to its standard error."""
    peak_rss: int = 0
    """The most memory, in bytes, that it had at once, or 0 if that is not known. The
    kernel counts from the fork on: it is at least what the supervisor had, some 25 MB."""
    oom_killed: bool = False
    """Whether it was killed while the kernel was killing for want of memory."""
    fault: str = ""
    """The stack that it wrote when it crashed ("Fatal Python error: ...")."""
    limit: str = ""
    """The resource limit that ended it, such as "cpu=10", as far as that can be told."""


class GroupFailed(Message, frozen=True):
    """The supervisor cannot start processes at all."""

    reason: str


ToSupervisor: TypeAlias = Configure | Scale | Quit
FromSupervisor: TypeAlias = Spawned | Reaped | GroupFailed


# -------------------------------------------------------------------- control


class Hello(Message, frozen=True):
    """A worker asks to be registered. Sent on every new connection."""

    version: int
    worker: str
    """Unique to this worker process; also the routing id of both its sockets."""
    pid: Annotated[int, msgspec.Meta(gt=0, lt=2**31)]
    host: str
    machine: str
    """Equal for processes that share process ids and files: see docs/protocol.md."""
    workpoint: str | None
    """Where the worker has bound its work socket, or None if it connects."""
    journal: str | None
    """The file of its `journal`, which a master on the same host may map."""
    python: str = ""
    """Version of the worker's interpreter, empty for other languages."""
    services: Annotated[list[Name], msgspec.Meta(max_length=1000)] = msgspec.field(
        default_factory=lambda: [DEFAULT_SERVICE]
    )
    """What it offers, one or more."""
    mailbox: str | None = None
    """A socket of its own (see `shortcuts`) on which a pool's own master may send jobs."""


class Welcome(Message, frozen=True):
    """The worker is registered. It opens its work socket and says `Ready`."""

    version: int
    work: str
    """Where to connect the work socket (unused if the worker named a workpoint)."""
    setup: bytes = b""
    """What the worker must prepare before it is ready; known to the two ends."""
    lost_after: float = 10.0
    """Seconds without a sign of life after which the master takes a worker for lost."""
    bell: str | None = None
    """A pipe (see `shortcuts`) by which a pool's own worker may tell of results in its journal."""


class Refused(Message, frozen=True):
    """The worker is not registered and should end."""

    reason: str


class Drain(Message, frozen=True):
    """Finish the jobs at hand, say `Goodbye` and leave."""


class Unready(Message, frozen=True):
    """The worker cannot do its work (its initializer failed) and ends."""

    reason: str


class Worn(Message, frozen=True):
    """The worker should be replaced, and goes on until the master says `Drain`."""

    reason: str


class ShowStack(Message, frozen=True):
    """Where is the main thread?"""


class Stack(Message, frozen=True):
    """The answer to `ShowStack`, as a traceback shows it."""

    text: str


class Ping(Message, frozen=True):
    """Is the way to this worker open? Needs no answer."""


class Expelled(Message, frozen=True):
    """The worker is not registered any more: it was taken for lost.

    Nothing that it has is wanted. It may register again, under a new name.
    """


class Die(Message, frozen=True):
    """End this process at once, with the job that it runs. For workers on other hosts."""


# -------------------------------------------------------------------- clients


class Ask(Message, frozen=True):
    """What is going on? Answered by `Report`. Anybody who may connect may ask."""

    version: int


class WorkerReport(msgspec.Struct, frozen=True, gc=False):
    """A worker, as `WorkerInfo` shows it."""

    id: str
    host: str
    pid: int
    services: list[str]
    state: str
    jobs_done: int
    age: float


class ServiceReport(msgspec.Struct, frozen=True, gc=False):
    """A service that is offered or asked for."""

    name: str
    workers: int
    queued: int


class Report(Message, frozen=True):
    """The state of a master."""

    version: int
    host: str
    pid: int
    uptime: float
    """Seconds since it started."""
    jobs: dict[str, int]
    """How many there are or were: queued, running, done, failed (of those done), lost."""
    services: list[ServiceReport]
    workers: list[WorkerReport]
    dropped: int = 0
    """Messages that were no messages."""
    refused: int = 0
    """Peers that could not show that they may connect."""


class Call(Message, frozen=True):
    """Have a worker do a job for a client. Answered by `Answer`."""

    number: int
    """Chosen by the client, to tell its answers apart."""
    id: str
    data: bytes
    codec: str = ""
    service: Name = DEFAULT_SERVICE


class Answer(Message, frozen=True):
    """The end of a `Call`."""

    number: int
    ok: bool
    data: bytes
    """The result; if not ok, what went wrong, for people."""
    codec: str = ""
    error: str = ""
    """If not ok, the name of the exception, such as "NoWorkerError"."""


# ----------------------------------------------------------------------- work


class Ready(Message, frozen=True):
    """The first message on the work socket: jobs may come."""

    worker: str


class Segment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Buffers in a file that both ends can map: see `buffers`."""

    name: str
    sizes: list[Annotated[int, msgspec.Meta(ge=0)]]
    """Bytes of each buffer, in order."""


class Job(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One job; `buffers` frames of the message belong to it, in order."""

    seq: int
    """Counts the jobs that this worker was sent, from 1."""
    id: str
    """The caller's name for the job."""
    data: bytes
    codec: str = ""
    """What `data` is: empty for bytes, "text" for text in UTF-8, or what `codecs` has."""
    shared: bytes = b""
    """Key of the `Shared` object that this job needs, or empty."""
    buffers: int = 0
    segment: Segment | None = None
    """Where the buffers are, if not in frames. Only workers that share the master's
    private directory are sent this, and only they send it."""
    service: str = ""
    """Which of the worker's services is asked for; empty if it has only one."""


class Shared(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Data that many jobs need: sent once, kept by the worker until forgotten."""

    key: bytes
    data: bytes


class Jobs(Message, frozen=True):
    """Jobs to run in this order, and how far the worker's journal is confirmed.

    Without jobs it is a confirmation, and may say what to forget.
    """

    confirmed: int
    jobs: list[Job]
    shared: list[Shared] = []
    forget: list[bytes] = []
    """Keys of shared data that will not be needed again."""
    number: Count = 0
    """1 for the first of these messages, and so on, if they take several ways; else 0."""


class Result(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How a job ended: its result, or what it raised if not ok."""

    seq: Count
    ok: bool
    data: bytes
    codec: str = ""
    seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """How long it ran."""
    buffers: Count = 0
    segment: Segment | None = None
    """Where the buffers are, if not in frames."""
    kept: bool = False
    """Whether the worker still has the job's own segment mapped."""


class Results(Message, frozen=True):
    """Results, and the position of the worker's journal after the last of them."""

    position: Count
    results: list[Result]
    confirm: bool = False
    """The worker waits for this position to be confirmed before it goes on."""


class Goodbye(Message, frozen=True):
    """The worker leaves; what it has not answered it has not started, but for one job."""

    abandoned: Count = 0
    """Number of a job that was started and will have no result, or 0."""


# ------------------------------------------------------------ encode and decode

FromClient: TypeAlias = Ask | Call
ToClient: TypeAlias = Report | Answer
ControlFromWorker: TypeAlias = Hello | Unready | Worn | Stack
ControlFromMaster: TypeAlias = Welcome | Refused | Drain | Ping | ShowStack | Expelled | Die
WorkFromWorker: TypeAlias = Ready | Results | Goodbye

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
"""Encode any message, or a single `Result`, as bytes."""

_jobs = msgspec.msgpack.Decoder(Jobs)
_result = msgspec.msgpack.Decoder(Result)
_control_to_master = msgspec.msgpack.Decoder(ControlFromWorker | FromClient)
_control_from_master = msgspec.msgpack.Decoder(ControlFromMaster)
_to_client = msgspec.msgpack.Decoder(ToClient)
_work_from_worker = msgspec.msgpack.Decoder(WorkFromWorker)


def _decoder(decoder: msgspec.msgpack.Decoder[_T]) -> Callable[[Frame], _T]:
    def decode(frame: Frame) -> _T:
        try:
            return decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"not a message that may come here: {error}") from None

    return decode


decode_control_to_master = _decoder(_control_to_master)
"""Decode a frame from the control socket of a worker or client; ProtocolError if it is none."""
decode_to_client = _decoder(_to_client)
"""Decode a frame for a client; ProtocolError if it is none."""
decode_control_from_master = _decoder(_control_from_master)
"""Decode a frame from the master's control socket; ProtocolError if it is none."""
decode_work_from_worker = _decoder(_work_from_worker)
"""Decode a frame from a worker's work socket; ProtocolError if it is none."""
decode_jobs = _decoder(_jobs)
"""Decode a frame from the master's work socket; ProtocolError if it is none."""
decode_result = _decoder(_result)
"""Decode a single result, as a journal holds it; ProtocolError if it is none."""
