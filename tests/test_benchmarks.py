"""The benchmark suite runs, and its tables have something in them; no figure is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "--scale", "tiny", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def results(*arguments: str, folder: Path) -> tuple[dict[str, Any], str]:
    done = run(*arguments, "--output", str(folder))
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return document, done.stdout


def test_workloads_of_two_peers(tmp_path: Path) -> None:
    only = "zmqexecutor,fork,small tasks,latency,argument-1M,argument-100M,pending-10,recovery"
    document, shown = results("--only", only, folder=tmp_path)
    assert not document["reasons"], document["reasons"]
    for peer in ("zmqexecutor", "fork"):
        values = document["values"][peer]
        for name in ("submit:rate", "map-100:rate", "latency-1:median", "argument-1M:bandwidth"):
            assert len(values[name]) == 1
            assert values[name][0] > 0
        assert len(values["latency-1:quantiles"][0]) == 99
        assert document["notes"][peer]["argument-100M"] == "-"
    assert document["values"]["zmqexecutor"]["recovery:seconds"][0] > 0
    assert document["notes"]["fork"]["recovery"] == "pool broken"
    assert document["notes"]["fork"]["submit-lambda"] == "cannot"
    assert "submit-lambda:rate" in document["values"]["zmqexecutor"]

    titles = [table["title"] for table in document["tables"]]
    assert titles[:2] == ["Small tasks", "Latency"]
    for table in document["tables"]:
        assert all(len(row) == len(table["head"]) for row in table["rows"])
        assert table["title"] in shown
        assert f"## {table['title']}" in (tmp_path / "results.md").read_text()
    assert "CPython" in shown or "python:" in shown


def test_simulated_workers_register_and_answer(tmp_path: Path) -> None:
    document, _ = results("--only", "zmqexecutor,simulated-*", folder=tmp_path)
    assert not document["reasons"], document["reasons"]
    values = document["values"]["zmqexecutor"]
    assert values["simulated-2:rate"][0] > 0
    assert values["simulated-8:cpu"][0] > 0
    [table] = document["tables"]
    assert table["title"] == "Cost over simulated workers"
    assert [row[0] for row in table["rows"]] == ["2", "8"]


def test_stages(tmp_path: Path) -> None:
    done = run("--stages", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    [table] = json.loads((tmp_path / "stages" / "results.json").read_text())["tables"]
    views = [row[0] for row in table["rows"]]
    assert views.count("alone") == 10
    assert views.count("on the way") == 9


@pytest.mark.parametrize("name", ["nobody", "fork,nothing"])
def test_a_name_that_means_nothing(name: str) -> None:
    done = run("--only", name)
    assert done.returncode == 2
    assert "there is no peer, workload or group" in done.stderr
