"""Hosts for each test: `home`, where the test itself is, and others."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zmqexecutor.keys import Keys, add_worker

from .network import Host, Network, Program, free_port, why_not
from .tasks import Diary

CALLS_WORKER = """
    import os, sys
    from zmqexecutor.calls import serve

    keys, endpoint, *services = sys.argv[1:]
    if serve(endpoint, services, patience=60, keys=keys):
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

    def start(host: Host, *services: str, python: str = sys.executable) -> Program:
        folder = keys.directory / "workers" / host.name
        return host.python(CALLS_WORKER, str(folder), endpoint, *services, python=python)

    return start


@pytest.fixture
def diary(tmp_path: Path) -> Diary:
    return Diary(tmp_path / "diary")
