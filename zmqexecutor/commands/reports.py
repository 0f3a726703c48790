"""The state of a master as text for people, or JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from ..wire.protocol import Report

__all__ = ["as_json", "as_line", "as_table", "rates"]

_COUNTED: Final = ("done", "failed", "lost")
ID_SHOWN: Final = 12
"""Characters of a worker's name; those of our own workers have 32."""


def rates(report: Report, previous: Report | None) -> dict[str, float]:
    """Jobs per second since the previous report, or since the master's start."""
    seconds = report.uptime
    before: dict[str, int] = {}
    if previous is not None and (previous.host, previous.pid) == (report.host, report.pid):
        between = report.uptime - previous.uptime
        if between > 0:  # else it is another master after all
            seconds, before = between, previous.jobs
    seconds = max(seconds, 1e-3)
    return {
        name: round((report.jobs.get(name, 0) - before.get(name, 0)) / seconds, 3)
        for name in _COUNTED
    }


def as_json(report: Report, previous: Report | None) -> str:
    """One line with one JSON object: the report's fields, and `rates`."""
    fields = {**msgspec.structs.asdict(report), "rates": rates(report, previous)}
    return msgspec.json.encode(fields).decode()


def as_line(report: Report, previous: Report | None) -> str:
    """The numbers in one line."""
    busy = sum(worker.state == "busy" for worker in report.workers)
    return f"workers {len(report.workers)} ({busy} busy)  {_jobs(report, previous)}"


def as_table(
    report: Report, previous: Report | None, endpoint: str, height: int | None = None
) -> list[str]:
    """Lines with everything.

    Args:
        report: what is shown.
        previous: the report before, for the rates.
        endpoint: where the master was asked.
        height: how many lines there is room for; None for all.
    """
    lines = [
        f"master   {_clean(endpoint)}, process {report.pid} on {_clean(report.host)}, "
        f"up {_duration(report.uptime)}",
        f"jobs     {_jobs(report, previous)}",
    ]
    if report.dropped or report.refused:
        lines.append(f"dropped  {report.dropped} messages, refused {report.refused} peers")
    lines += ["", *_columns(["service", "workers", "queued"], _services(report), "<>>")]
    workers = _columns(
        ["worker", "host", "pid", "state", "jobs", "age", "services"], _workers(report), "<<><>><"
    )
    lines += ["", *workers]
    if height is not None and len(lines) > height:
        hidden = len(lines) - height + 1
        lines[height - 1 :] = [f"... {hidden} more"]
    return lines


def _jobs(report: Report, previous: Report | None) -> str:
    jobs = report.jobs
    rate = rates(report, previous)["done"]
    return (
        f"queued {jobs.get('queued', 0)}  running {jobs.get('running', 0)}  "
        f"done {jobs.get('done', 0)} ({rate:.1f}/s)  "
        f"failed {jobs.get('failed', 0)}  lost {jobs.get('lost', 0)}"
    )


def _services(report: Report) -> list[list[str]]:
    return [[s.name, str(s.workers), str(s.queued)] for s in report.services]


def _workers(report: Report) -> list[list[str]]:
    return [
        [
            worker.id[:ID_SHOWN],
            worker.host,
            str(worker.pid),
            worker.state,
            str(worker.jobs_done),
            _duration(worker.age),
            ", ".join(worker.services),
        ]
        for worker in report.workers
    ]


def _columns(head: list[str], rows: list[list[str]], alignments: str) -> list[str]:
    table = [head, *([_clean(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(_cells(row, widths, alignments)).rstrip() for row in table]


def _cells(row: Sequence[str], widths: Sequence[int], alignments: str) -> list[str]:
    return [
        cell.ljust(width) if alignment == "<" else cell.rjust(width)
        for cell, width, alignment in zip(row, widths, alignments, strict=True)
    ]


def _clean(text: str) -> str:
    """Without what could command a terminal: workers name themselves."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _duration(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole // 60 % 60} min"
    return f"{whole // 86400} d {whole // 3600 % 24} h"
