"""A drop-in ProcessPoolExecutor whose workers Circus supervises and ZeroMQ reaches.

Example:
    Squares, by a worker for each processor::

        from zmqexecutor import ZmqExecutor

        with ZmqExecutor() as executor:
            print(list(executor.map(lambda x: x * x, range(10))))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "BrokenPoolError",
    "Client",
    "ForkedExecutorError",
    "JobFailedError",
    "JobRunner",
    "Keys",
    "NoMasterError",
    "NoWorkerError",
    "PerformanceWarning",
    "ProtocolError",
    "RegistrationError",
    "SerializationError",
    "SharedObject",
    "TaskFuture",
    "TaskKilledError",
    "TaskTimeoutError",
    "Worker",
    "WorkerLostError",
    "Workers",
    "ZmqExecutor",
    "ZmqExecutorError",
    "__version__",
]

if TYPE_CHECKING:
    from .client import Client
    from .errors import (
        BrokenPoolError,
        ForkedExecutorError,
        JobFailedError,
        NoMasterError,
        NoWorkerError,
        PerformanceWarning,
        ProtocolError,
        RegistrationError,
        SerializationError,
        TaskKilledError,
        TaskTimeoutError,
        WorkerLostError,
        ZmqExecutorError,
    )
    from .executor import ZmqExecutor
    from .futures import TaskFuture
    from .jobrunner import JobRunner
    from .keys import Keys
    from .payload.shares import SharedObject
    from .supervision.workers import Workers
    from .worker.worker import Worker

# A worker imports this package too and must start fast, so each public name is
# imported when it is first asked for (PEP 562).
_HOMES = {
    "Client": "client",
    "JobRunner": "jobrunner",
    "Keys": "keys",
    "SharedObject": "payload.shares",
    "TaskFuture": "futures",
    "Worker": "worker.worker",
    "Workers": "supervision.workers",
    "ZmqExecutor": "executor",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
