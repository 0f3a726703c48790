"""The commands `status` and `call`."""

from __future__ import annotations

import os
import shutil
import sys
import time
import uuid
from argparse import Namespace
from typing import Any, Final

import msgspec

from .. import errors
from ..client import Client
from ..errors import NoMasterError, ProtocolError
from ..wire.protocol import Report
from . import reports
from .exits import CommandError, Exit

__all__ = ["call", "status"]


def status(arguments: Namespace) -> int:
    """Print what a master reports, once or again and again."""
    watching = arguments.watch is not None
    with _connect(arguments) as client:
        view = _View(arguments)
        try:
            view.show(client.status())
        except (NoMasterError, ProtocolError) as error:
            raise CommandError(error, Exit.NO_MASTER) from None
        while watching:
            try:
                time.sleep(arguments.watch)
                view.show(client.status())
            except (NoMasterError, ProtocolError) as error:
                view.miss(error)
            except KeyboardInterrupt:
                break
    return 0


_TOP_LEFT_AND_CLEAR: Final = "\x1b[H\x1b[J"


class _View:
    """Reports on standard output: a redrawn screen, lines, or JSON."""

    def __init__(self, arguments: Namespace) -> None:
        self._endpoint: str = arguments.endpoint
        self._json: bool = arguments.json
        self._watching = arguments.watch is not None
        self._redraws = self._watching and not self._json and sys.stdout.isatty()
        self._previous: Report | None = None

    def show(self, report: Report) -> None:
        previous, self._previous = self._previous, report
        if self._json:
            text = reports.as_json(report, previous)
        elif self._redraws:
            lines = shutil.get_terminal_size().lines  # 0 if the terminal does not know
            height = lines - 1 if lines > 1 else None
            text = "\n".join(reports.as_table(report, previous, self._endpoint, height))
            text = _TOP_LEFT_AND_CLEAR + text
        elif self._watching:
            text = f"{time.strftime('%H:%M:%S')}  {reports.as_line(report, previous)}"
        else:
            text = "\n".join(reports.as_table(report, previous, self._endpoint))
        print(text, flush=True)

    def miss(self, error: Exception) -> None:
        """There is no report; the next master will give some."""
        self._previous = None
        text = f"{time.strftime('%H:%M:%S')}  {error}"
        if self._redraws:
            print(_TOP_LEFT_AND_CLEAR + text, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


_CODES: Final[list[tuple[type[Exception], Exit]]] = [
    (errors.NoMasterError, Exit.NO_MASTER),
    (errors.NoWorkerError, Exit.NO_WORKER),
    (errors.TaskTimeoutError, Exit.TIMEOUT),
    (errors.WorkerLostError, Exit.WORKER_LOST),
    (errors.ZmqExecutorError, Exit.FAILED),
    (ValueError, Exit.USAGE),
]


def call(arguments: Namespace) -> int:
    """Have a job done, and write its result to standard output."""
    data = _job_data(arguments)
    job_id = arguments.id if arguments.id is not None else uuid.uuid4().hex[:8]
    codec = "json" if arguments.codec == "json" else None
    with _connect(arguments) as client:
        try:
            result = client.call(
                job_id, data, arguments.timeout, service=arguments.service, codec=codec
            )
        except (errors.ZmqExecutorError, ValueError) as error:
            code = next(code for kind, code in _CODES if isinstance(error, kind))
            raise CommandError(error, code) from None
    _print_result(result, codec)
    return 0


def _job_data(arguments: Namespace) -> Any:
    data: str = arguments.data
    raw = sys.stdin.buffer.read() if data == "-" else os.fsencode(data)
    try:
        if arguments.codec == "bytes":
            return raw
        text = raw.decode()
        if arguments.codec == "text":
            return text
        return msgspec.json.decode(text)
    except ValueError as error:  # of both decoders
        raise CommandError(f"DATA is not {arguments.codec}: {error}", Exit.USAGE) from None


def _print_result(result: Any, codec: str | None) -> None:
    if codec == "json":
        result = msgspec.json.encode(result).decode()
    if isinstance(result, str):
        result = (result if result.endswith("\n") else result + "\n").encode()
    sys.stdout.buffer.write(result)
    sys.stdout.buffer.flush()


def _connect(arguments: Namespace) -> Client:
    try:
        return Client(
            arguments.endpoint,
            patience=arguments.patience,
            keys=arguments.keys,
            allow_plaintext_tcp_from_anyone=arguments.allow_plaintext_tcp_from_anyone,
        )
    except ValueError as error:
        raise CommandError(error, Exit.USAGE) from None
    except OSError as error:
        raise CommandError(error, Exit.FAILED) from None
