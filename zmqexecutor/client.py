"""`Client`: asks a master what is going on, and has jobs done, from another process."""

from __future__ import annotations

import os
import time
import uuid
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import zmq

from . import errors
from .errors import JobFailedError, NoMasterError, TaskTimeoutError
from .system.arguments import check_timeout
from .system.descriptors import check_descriptors, check_threads
from .wire import codecs, handshakes, protocol, security
from .wire.liveness import CLIENT_PATIENCE
from .wire.protocol import (
    DEFAULT_SERVICE,
    LARGEST_CONTROL_MESSAGE,
    Answer,
    Report,
    check_service,
)

if TYPE_CHECKING:
    from .keys import Keys

__all__ = ["Client"]

_ERRORS: Final = {
    name: getattr(errors, name)
    for name in ("NoWorkerError", "WorkerLostError", "BrokenPoolError", "ProtocolError")
}
"""What a master raises for a call, by the name in its answer; the rest is JobFailedError."""


class Client:
    """A connection with a master, from a program that is no worker.

    For one thread. A master that goes away and comes back is found again.

    Example:
        What `zmqexecutor status` and `zmqexecutor call` do::

            with Client("ipc:///tmp/master.ipc") as client:
                print(len(client.status().workers), "workers")
                print(client.call("1", "12"))  # 144
    """

    def __init__(
        self,
        endpoint: str,
        *,
        patience: float | None = CLIENT_PATIENCE,
        keys: Keys | str | os.PathLike[str] | None = None,
        allow_plaintext_tcp_from_anyone: bool = False,
    ) -> None:
        """Begin to connect; does not wait.

        Args:
            endpoint: where the master listens, such as `ipc:///tmp/master.ipc`.
            patience: seconds to wait for the connection, when it is needed, or None to wait
                for as long as it takes.
            keys: for tcp://, as for `Worker`; a client's are those of a worker.
            allow_plaintext_tcp_from_anyone: as for `Worker`.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: the endpoint cannot be used, or not without keys.
            OSError: keys are missing, or other users could read them; or there are too few
                file descriptors left.
        """
        access = security.Access.decide(
            endpoint,
            "worker",
            keys,
            allow_plaintext_tcp_from_anyone=allow_plaintext_tcp_from_anyone,
        )
        self._endpoint = endpoint
        self._keys = access.keys
        self._failure = ""  # why the last handshake failed
        self._patience = check_timeout("patience", patience)
        self._connected = False
        self._number = 0
        check_descriptors()
        check_threads()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = security.socket(self._context, zmq.DEALER, endpoint, keys=self._keys)
        self._socket.routing_id = uuid.uuid4().hex.encode()
        # Nothing is kept for a master that is not there: it would come too late.
        self._socket.immediate = True
        self._monitor = self._socket.get_monitor_socket(
            zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED | handshakes.FAILED
        )
        self._socket.connect(endpoint)

    def status(self, timeout: float | None = CLIENT_PATIENCE) -> Report:
        """Ask the master for its workers, its queue, and what has become of its jobs.

        Args:
            timeout: seconds to wait for the answer, or None to wait for as long as it takes.

        Raises:
            NoMasterError: no master is there, or it does not answer.
        """
        deadline = _deadline(check_timeout("timeout", timeout))
        self._send(protocol.Ask(protocol.VERSION), deadline)
        while (answer := self._receive(deadline)) is not None:
            if isinstance(answer, Report):
                return answer
        raise NoMasterError(f"the master at {self._endpoint} did not answer within {timeout:g} s")

    def call(
        self,
        job_id: str,
        data: Any,
        timeout: float | None = None,
        *,
        service: str = DEFAULT_SERVICE,
        codec: str | None = None,
    ) -> Any:
        """Have a worker of the master do a job, and return its result.

        The arguments are those of `JobRunner.execute`.

        Args:
            job_id: a name for the job.
            data: `str` or `bytes`, or what the codec can carry; less than 1 MiB.
            timeout: seconds to wait for the result, or None to wait for as long as it
                takes. A job that has begun goes on when the time is over.
            service: what is asked for.
            codec: "json", "msgpack" or "pickle".

        Raises:
            NoMasterError: no master is there, or it went away before it answered.
            NoWorkerError: no worker for this service registered in time.
            TaskTimeoutError: the result did not come in time.
            JobFailedError: the target raised; the message has its traceback.
            WorkerLostError: the worker died while it ran the job.
            ProtocolError: the master takes no jobs from clients.
            TypeError: an argument has the wrong type.
            ValueError: an argument has an impossible value, or the data are too large.
        """
        if not isinstance(job_id, str):
            raise TypeError(f"job_id must be str, not {type(job_id).__name__}")
        check_service(service)
        encoded, encoding = codecs.encode(data, codec)
        deadline = _deadline(check_timeout("timeout", timeout))
        self._number += 1
        call = protocol.Call(self._number, job_id, encoded, encoding, service)
        self._send(call, deadline)
        while (answer := self._receive(deadline)) is not None:
            if isinstance(answer, Answer) and answer.number == call.number:
                return _result(answer, job_id, codec)
        raise TaskTimeoutError(f"job {job_id!r} had no result after {timeout:g} s", job=job_id)

    def close(self) -> None:
        """Close the connection."""
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close()
            self._socket.close()
            self._context.term()

    # ---------------------------------------------------------- the connection

    def _send(self, message: protocol.FromClient, deadline: float | None) -> None:
        """Send on a connection that is known to be open, so that its loss will be seen."""
        frame = protocol.encode(message)
        if len(frame) > LARGEST_CONTROL_MESSAGE:
            raise ValueError(
                f"a master takes calls of up to {LARGEST_CONTROL_MESSAGE} bytes, not "
                f"{len(frame)}; pass the name of a file instead"
            )
        begun = time.monotonic()
        limits = [limit for limit in (_deadline(self._patience), deadline) if limit is not None]
        limit = min(limits, default=None)
        while True:
            self._connected = self._follow_connection()
            if self._connected:
                try:
                    self._socket.send(frame, zmq.DONTWAIT)
                    return
                except zmq.Again:
                    pass  # lost just now; the monitor is about to say so
            if not self._poll(limit, self._monitor):
                reason = self._failure or f"no master at {self._endpoint}; is one running there?"
                raise NoMasterError(f"{reason} (tried for {time.monotonic() - begun:.3g} s)")

    def _receive(self, deadline: float | None) -> protocol.ToClient | None:
        """The next message of the master; None if the time is over."""
        while True:
            # What has come is read first, even if the connection is lost by now.
            try:
                frame = self._socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                pass
            else:
                message: protocol.ToClient = protocol.decode_to_client(frame)
                return message
            if not self._follow_connection():
                raise NoMasterError(
                    f"the connection with the master at {self._endpoint} was lost before it "
                    "answered"
                )
            if not self._poll(deadline, self._socket, self._monitor):
                return None

    def _follow_connection(self) -> bool:
        """Whether there is a connection, as far as has been told.

        Raises:
            NoMasterError: it is of no use to try again.
        """
        while True:
            try:
                parts = self._monitor.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return self._connected
            event, value = handshakes.read_event(parts)
            self._connected = event == zmq.Event.HANDSHAKE_SUCCEEDED
            if self._connected:
                self._failure = ""
            elif event & handshakes.FAILED:
                failure = handshakes.explain(event, value, self._endpoint, self._keys)
                if failure.final:
                    raise NoMasterError(failure.reason)
                self._failure = failure.reason

    @staticmethod
    def _poll(deadline: float | None, *sockets: zmq.Socket[bytes]) -> bool:
        """Wait for one of the sockets; False if the time is over."""
        timeout = -1
        if deadline is not None:
            timeout = max(0, int((deadline - time.monotonic()) * 1000) + 1)
            if deadline <= time.monotonic():
                return False
        zmq.zmq_poll([(socket, zmq.POLLIN) for socket in sockets], timeout)
        return True

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _result(answer: Answer, job_id: str, codec: str | None) -> Any:
    if not answer.ok:
        text = answer.data.decode(errors="replace").rstrip()
        if answer.error in _ERRORS:
            raise _ERRORS[answer.error](text)
        raise JobFailedError(f"job {job_id!r} failed:\n{text}")
    try:
        return codecs.decode_as_asked(answer.data, answer.codec, codec)
    except Exception as error:
        raise JobFailedError(f"job {job_id!r} has an answer that is no use: {error}") from error
