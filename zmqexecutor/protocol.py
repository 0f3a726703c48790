"""The wire: one typed struct per message, and nothing that touches a socket.

A message is one ZeroMQ frame of msgpack, an array whose first element is the
message's name; big binary buffers may follow as frames of their own. What a
job's data means is known only to the two ends (see `serialization`): here it
is text or bytes, carried as given.

Two channels carry messages between the master and each of its workers (the
endpoint for control, the workpoint for jobs), and a third, a plain socket pair
and not ZeroMQ, connects a `Workers` group with its supervisor process:

    control, worker to master     Hello, Recalled, Goodbye, Pong
    control, master to worker     Welcome, Refused, Recall, Drain, Ping
    work, worker to master        Ready, Results
    work, master to worker        Jobs
    group to supervisor           Configure, Scale, Quit
    supervisor to group           Spawned, Reaped, GroupFailed

docs/protocol.md describes the same for authors of workers in other languages.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import msgspec

from .errors import ProtocolError

__all__ = [
    "VERSION",
    "Configure",
    "Drain",
    "Goodbye",
    "GroupFailed",
    "Hello",
    "Job",
    "Jobs",
    "Ping",
    "Pong",
    "Quit",
    "Ready",
    "Reaped",
    "Recall",
    "Recalled",
    "Refused",
    "Result",
    "Results",
    "Scale",
    "Spawned",
    "Welcome",
    "decode_control_from_master",
    "decode_control_from_worker",
    "decode_jobs",
    "decode_work_from_worker",
    "encode",
]

VERSION: Final = 1
"""The protocol's version. A master refuses a worker that speaks another one."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """A message: an array whose first element is the name of its class."""


# ---------------------------------------------------------------- supervision


class Configure(Message):
    """The first message to a supervisor: what to run, and how many of it."""

    cmd: list[str]
    numprocesses: int
    directory: str
    """The private directory, in which Circus's own sockets are bound."""
    env: dict[str, str] | None = None
    working_dir: str | None = None
    graceful_timeout: float = 5.0
    """Seconds between SIGTERM and SIGKILL when a process is stopped."""
    capture_stderr: bool = True


class Scale(Message):
    """Keep this many processes alive from now on."""

    numprocesses: int


class Quit(Message):
    """Stop every process, then end the supervisor."""

    graceful_timeout: float | None = None


class Spawned(Message):
    """The supervisor started a process."""

    pid: int


class Reaped(Message):
    """A process of the group ended; exitcode is as `subprocess` gives it."""

    pid: int
    exitcode: int | None
    stderr: str
    """The last lines it wrote to its standard error."""


class GroupFailed(Message):
    """The supervisor cannot start processes at all."""

    reason: str


ToSupervisor: TypeAlias = Configure | Scale | Quit
FromSupervisor: TypeAlias = Spawned | Reaped | GroupFailed
