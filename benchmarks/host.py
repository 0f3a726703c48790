"""The program in which one peer is measured: `python -m benchmarks.host`, started by `measure`.

It reads one line of JSON for each thing to do from a socket, and answers with one. Whatever
the peer prints goes elsewhere, and when the peer hangs, this process can be killed with all
that it has started.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
import warnings
from typing import Any, NamedTuple

from benchmarks.base import SCALES, Bench, Workload
from benchmarks.peers import NotOfferedError
from benchmarks.workloads import WORKLOADS


def nothing(*_: object) -> None:
    """A task that is a function of the script."""


table: Any = None
"""A global of the script that a task uses; a workload binds it."""


def look_up(index: int) -> int:
    """A task that uses it."""
    found = table[index]
    if isinstance(found, Point):
        found = found.x
    return int(found["id"] if isinstance(found, dict) else found)


class Pair(NamedTuple):
    """A class of the script."""

    left: float
    right: float


@dataclasses.dataclass
class Point:
    """Another one."""

    x: float
    y: float


def answer(bench: Bench, workload: Workload) -> dict[str, object]:
    try:
        if workload.own_pool:
            bench.close()
        return {"figures": workload.run(bench)}
    except NotOfferedError as reason:
        return {"no": str(reason)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def main() -> None:
    name, workers, scale, descriptor = sys.argv[1:]
    # numpy has threads of its own, so Python 3.12 and newer warn at every fork.
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork")
    bench = Bench(name, int(workers), SCALES[scale])
    workloads = {workload.name: workload for workload in WORKLOADS}
    with socket.socket(fileno=int(descriptor)) as connection, connection.makefile("rw") as lines:
        for line in lines:
            request = json.loads(line)
            if request == "open":
                try:
                    reply: dict[str, object] = {"figures": {"pool": bool(bench.pool)}}
                except Exception as error:
                    reply = {"error": f"{type(error).__name__}: {error}"[:300]}
            elif request == "close":
                bench.close()
                reply = {"figures": {}}
            else:
                reply = answer(bench, workloads[request])
            lines.write(json.dumps(reply) + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
