"""Workloads that do something."""

from __future__ import annotations

import functools
import importlib.util
import io
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tasks
from benchmarks.base import Bench, Figure, Figures, Workload, clock
from benchmarks.peers import PEERS, NotOfferedError


@functools.cache
def _pictures(count: int) -> list[bytes]:
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(3)
    ramp = np.linspace(0, 200, 1024)
    pictures = []
    for _ in range(4):
        pixels = np.add.outer(ramp, ramp)[..., None] / 2 + random.uniform(0, 55, (1024, 1024, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG")
        pictures.append(file.getvalue())
    return (pictures * count)[:count]


def _sources(count: int) -> list[str]:
    """Source files of the standard library, from small ones to large ones."""
    files = Path(sysconfig.get_paths()["stdlib"]).glob("*.py")
    return [str(file) for file in sorted(files, key=lambda file: file.name)[:count]]


@functools.cache
def _blocks(number: int) -> list[tuple[Any, Any]]:
    import numpy as np

    matrix = np.random.default_rng(5).random((number * 256, 512))
    rows = np.split(matrix, number)
    return [(one, other.T.copy()) for one in rows for other in rows]


def _timed(
    fn: Callable[[Any], Any], items: Callable[[Bench], Sequence[Any]], needs: str = ""
) -> Callable[[Bench], Figures]:
    def run(bench: Bench) -> Figures:
        if needs and importlib.util.find_spec(needs) is None:
            raise NotOfferedError(f"no {needs}")
        work = items(bench)
        list(bench.pool.map(fn, work[: bench.workers * 2], 1))  # its imports, in each worker
        start = clock()
        results = list(bench.pool.map(fn, work, 1))
        found = clock() - start
        if len(results) != len(work):
            raise ValueError(f"{len(results)} results of {len(work)} tasks")
        return {"seconds": found}

    return run


def _work(name: str, title: str, run: Callable[[Bench], Figures]) -> Workload:
    everyone = tuple(n for n, peer in PEERS.items() if not peer.limit or n == "serial loop")
    return Workload(name, "Real work", (Figure("seconds", title, "ms"),), run, everyone, slow=True)


WORKLOADS = [
    _work(
        "thumbnails",
        "thumbnails",
        _timed(tasks.thumbnail, lambda bench: _pictures(bench.sized(300, 2)), "PIL"),
    ),
    _work("tokenise", "tokenise", _timed(tasks.count_names, lambda b: _sources(b.sized(240, 2)))),
    _work(
        "matrix",
        "block product",
        _timed(tasks.block_product, lambda bench: _blocks(bench.sized(24, 2))),
    ),
    _work(
        "arithmetic",
        "array arithmetic",
        _timed(
            tasks.arithmetic,
            lambda bench: [(s, 100_000) for s in range(bench.sized(300, 2))],
            "numpy",
        ),
    ),
    _work(
        "monte-carlo",
        "Monte Carlo",
        _timed(tasks.points_in_circle, lambda b: [(s, 20_000) for s in range(b.sized(600, 2))]),
    ),
    _work(
        "sweep",
        "scipy sweep",
        _timed(
            tasks.swing,
            lambda bench: [(k / 100, 1 + k % 7 / 5) for k in range(bench.sized(600, 2))],
            "scipy",
        ),
    ),
]
