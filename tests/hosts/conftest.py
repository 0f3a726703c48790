"""Hosts for each test: `home`, where the test itself is, and others."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zmqexecutor.keys import Keys, add_worker

from .network import Host, Network, Program, free_port, why_not
from .tasks import Diary

CALLS_WORKER = """
    import os, sys
    from zmqexecutor.worker.calls import serve

    keys, patience, endpoint, *services = sys.argv[1:]
    try:
        lost = serve(endpoint, services, patience=float(patience), keys=keys)
    except (ConnectionError, OSError) as error:
        sys.exit(print(error))
    if lost:
        os.execv(sys.executable, sys.orig_argv)  # a fresh process for what comes next
"""

StartWorker = Callable[..., Program]

_why_not = functools.lru_cache(why_not)


@pytest.fixture
def network() -> Iterator[Network]:
    if reason := _why_not():
        pytest.skip(reason)
    made = Network()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def home(network: Network) -> Iterator[Host]:
    """Where the test itself runs, with all that it starts without naming a host."""
    host = network.host("home")
    with host.inside():
        yield host


@pytest.fixture
def alpha(home: Host, network: Network) -> Host:
    return network.host("alpha")


@pytest.fixture
def beta(alpha: Host, network: Network) -> Host:
    return network.host("beta")


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """The master's, who admits alpha and beta."""
    made = Keys.create(tmp_path / "keys")
    for name in ("alpha", "beta"):
        add_worker(made.directory, name)
    return made


@pytest.fixture
def endpoint(home: Host) -> str:
    return home.tcp(free_port(home))


@pytest.fixture
def start_worker(endpoint: str, keys: Keys) -> StartWorker:
    """Start a worker on a host, which makes calls and joins again when it was lost."""

    def start(host: Host, *services: str, patience: float = 60, **options: Any) -> Program:
        folder = options.pop("keys", keys.directory / "workers" / host.name)
        arguments = (str(folder), str(patience), endpoint, *services)
        return host.python(CALLS_WORKER, *arguments, stdout=subprocess.PIPE, **options)

    return start


@pytest.fixture
def diary(tmp_path: Path) -> Diary:
    return Diary(tmp_path / "diary")
