"""Tables of what was measured, as text, Markdown and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.base import Figure, Workload
from benchmarks.measure import Samples

SCALE = {"ms": 1e3, "µs": 1e6}
"""What figures in seconds are multiplied with."""

GROWING = {
    "pending tasks": "Cost over pending tasks",
    "workers": "Cost over workers",
    "simulated workers": "Cost over simulated workers",
}
"""What tables of which the titles begin with a number become, under each other."""


class Table(NamedTuple):
    title: str
    head: list[str]
    rows: list[list[str]]


def value(number: float, unit: str) -> str:
    """A number with three digits or more."""
    number *= SCALE.get(unit, 1)
    digits = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:,.{digits}f}"


def cell(values: Sequence[float], unit: str) -> str:
    """The median, and half of the range around it in percent."""
    middle = statistics.median(values)
    text = value(middle, unit)
    if len(values) < 2 or not middle:
        return text
    return f"{text} ±{50 * (max(values) - min(values)) / middle:.0f}%"


def _cell(samples: Samples, peer: str, workload: Workload, figure: Figure) -> str:
    if values := samples.values.get(peer, {}).get(f"{workload.name}:{figure.key}"):
        return cell(values, figure.unit)
    return samples.notes.get(peer, {}).get(workload.name, "")


def tables(samples: Samples, peers: Sequence[str], workloads: Sequence[Workload]) -> list[Table]:
    """One table for each group: a row for each peer, a column for each figure."""
    groups: dict[str, list[Workload]] = {}
    for workload in workloads:
        groups.setdefault(workload.group, []).append(workload)
    found = []
    for group, members in groups.items():
        columns = [(w, f) for w in members for f in w.figures if f.title]
        head = [""] + [f"{f.title} [{f.unit}]" if f.unit else f.title for _, f in columns]
        rows = []
        for peer in peers:
            cells = [_cell(samples, peer, workload, figure) for workload, figure in columns]
            if any(text not in ("", "-") for text in cells):
                rows.append([peer, *cells])
        if rows:
            found.append(Table(group, head, rows))
    return [*_merged(found)]


def _merged(found: list[Table]) -> list[Table]:
    """Put tables that differ in one number only under each other."""
    merged: dict[str, Table] = {}
    for table in found:
        number, _, rest = table.title.partition(" ")
        if rest in GROWING and number[0].isdigit():
            title = GROWING[rest]
            into = merged.setdefault(title, Table(title, [rest, *table.head], []))
            into.rows.extend([number, *row] for row in table.rows)
        else:
            merged[table.title] = table
    return list(merged.values())


def text(table: Table) -> str:
    lines = [table.head, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.head))]
    shown = [
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([table.title, "-" * len(table.title), *shown, ""])


def markdown(table: Table) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in [table.head, *table.rows]]
    lines.insert(1, "|---|" + "---:|" * (len(table.head) - 1))
    return "\n".join([f"## {table.title}", "", *lines, ""])


def troubles(samples: Samples) -> list[str]:
    """Why cells say "error" or "too long"."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for peer, reasons in samples.reasons.items():
        for workload, reason in reasons.items():
            grouped.setdefault((peer, reason), []).append(workload)
    return [f"{peer}: {', '.join(names)}: {reason}" for (peer, reason), names in grouped.items()]


def write(
    folder: Path, about: dict[str, str], samples: Samples, found: Sequence[Table]
) -> list[Path]:
    """Write the files; which ones."""
    folder.mkdir(parents=True, exist_ok=True)
    notes = [f"{key}: {content}" for key, content in about.items()]
    trouble = troubles(samples)
    document: dict[str, Any] = {
        "about": about,
        "values": samples.values,
        "notes": samples.notes,
        "reasons": samples.reasons,
        "seconds": samples.seconds,
        "tables": [table._asdict() for table in found],
    }
    contents = {
        "results.txt": "\n".join([*notes, "", *map(text, found), *trouble, ""]),
        "results.md": "\n".join(
            ["# Benchmarks", "", *(f"- {note}" for note in notes), "", *map(markdown, found)]
            + [f"- {line}" for line in trouble]
            + [""]
        ),
        "results.json": json.dumps(document, indent=1) + "\n",
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in contents]
