"""Plots of what was measured, if matplotlib is installed."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.big_data import DIRECTIONS, SIZES
from benchmarks.life import MANY, PENDING, SIMULATED
from benchmarks.measure import Samples
from benchmarks.peers import OURS, PEERS
from benchmarks.small_tasks import WORKLOADS as SMALL_TASKS

Values = dict[str, list[Any]]


def draw(folder: Path, samples: Samples, peers: Sequence[str]) -> list[Path]:
    """Write PNG and SVG files; which ones. Without matplotlib there are none."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    colours = {peer: f"C{k}" if k < 10 else f"C{k - 10}" for k, peer in enumerate(PEERS)}
    written = []
    for name, plot in PLOTS.items():
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        for number, peer in enumerate(peers):
            values = samples.values.get(peer, {})
            style = {
                "label": peer,
                "color": colours[peer],
                "linestyle": "--" if PEERS[peer].limit else "-",
                "linewidth": 2.5 if peer == OURS else 1.2,
            }
            plot(axes, values, style, (number, len(peers)))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
            axes.grid(alpha=0.3)
            for ending in ("png", "svg"):
                written.append(folder / f"{name}.{ending}")
                figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)
    return written


def _throughput(axes: Any, values: Values, style: dict[str, Any], place: tuple[int, int]) -> None:
    number, count = place
    rates = [workload for workload in SMALL_TASKS if workload.group == "Small tasks"]
    present = [
        (k, statistics.median(values[f"{w.name}:rate"]))
        for k, w in enumerate(rates)
        if f"{w.name}:rate" in values
    ]
    if present:
        at = [k + 0.8 * (number / count - 0.5) for k, _ in present]
        axes.bar(
            at, [v for _, v in present], 0.8 / count, label=style["label"], color=style["color"]
        )
    axes.set_yscale("log")
    axes.set_ylabel("tasks per second")
    axes.set_xticks(range(len(rates)), [w.figures[0].title for w in rates], rotation=30)


def _latency(axes: Any, values: Values, style: dict[str, Any], _: tuple[int, int]) -> None:
    if rounds := values.get("latency-1:quantiles"):
        middle = [statistics.median(each) * 1e6 for each in zip(*rounds, strict=True)]
        axes.plot(middle, range(1, 100), **style)
    axes.set_xscale("log")
    axes.set_xlabel("round trip of a no-op, one at a time [µs]")
    axes.set_ylabel("percent of them that take no longer")


def _bandwidth(direction: str) -> Callable[..., None]:
    def plot(axes: Any, values: Values, style: dict[str, Any], _: tuple[int, int]) -> None:
        keys = {mib: f"{direction}-{size}:bandwidth" for size, mib in SIZES.items()}
        _line(axes, values, style, keys)
        axes.set_xlabel(f"array {DIRECTIONS[direction][1]} [MiB]")
        axes.set_ylabel("MiB/s")

    return plot


def _growth(
    kind: str,
    figure: str,
    numbers: Sequence[int],
    xlabel: str,
    ylabel: str = "µs for each task",
    scale: float = 1e6,
) -> Callable[..., None]:
    def plot(axes: Any, values: Values, style: dict[str, Any], _: tuple[int, int]) -> None:
        _line(axes, values, style, {n: f"{kind}-{n}:{figure}" for n in numbers}, scale)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)

    return plot


def _line(
    axes: Any, values: Values, style: dict[str, Any], keys: dict[Any, str], scale: float = 1
) -> None:
    points = [
        (x, statistics.median(values[key]) * scale) for x, key in keys.items() if key in values
    ]
    if points:
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", **style)
    axes.set_xscale("log")
    axes.set_yscale("log")


PLOTS: dict[str, Callable[..., None]] = {
    "throughput": _throughput,
    "latency": _latency,
    **{f"bandwidth-{direction}": _bandwidth(direction) for direction in DIRECTIONS},
    "pending-submit": _growth("pending", "submit", PENDING, "pending tasks"),
    "pending-complete": _growth("pending", "complete", PENDING, "pending tasks"),
    "pending-memory": _growth(
        "pending", "bytes", PENDING, "pending tasks", "bytes for each task", 1
    ),
    "workers": _growth("workers", "task", MANY, "workers"),
    "simulated": _growth(
        "simulated", "cpu", SIMULATED, "simulated workers", "µs of the master for each job"
    ),
}
