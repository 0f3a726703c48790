"""Peers on other hosts that may not join, beside one that may."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zmqexecutor import ZmqExecutor
from zmqexecutor.keys import Keys, add_worker

from .conftest import StartWorker
from .network import Host
from .tasks import Diary, note


@pytest.mark.parametrize("stranger", ["wrong master", "revoked", "no keys"])
def test_a_stranger_gets_nothing_and_disturbs_nobody(
    alpha: Host,
    beta: Host,
    endpoint: str,
    keys: Keys,
    start_worker: StartWorker,
    diary: Diary,
    tmp_path: Path,
    stranger: str,
) -> None:
    folder = keys.directory / "workers" / "beta"
    if stranger == "wrong master":
        Keys.create(tmp_path / "others")
        folder = add_worker(tmp_path / "others", "beta")
        said = "ended the handshake: it is not the master whose key is"
    elif stranger == "revoked":
        (keys.directory / "authorized" / "beta.public").unlink()
        said = "refused this worker's key"
    else:
        # Which of the two is the first to notice decides.
        said = "this worker has no keys|wants keys, which this worker does not have"
    start_worker(alpha)
    with ZmqExecutor(0, endpoint=endpoint, keys=keys, lost_after=2) as executor:
        executor.wait_for_workers(1, 60)
        (worker,) = executor.workers
        if stranger == "no keys":
            program = beta.python(NO_KEYS, endpoint, stdout=-1, env={"ZMQEXECUTOR_KEYS": ""})
        else:
            program = start_worker(beta, patience=5, keys=folder)
        done = 0
        while program.poll() is None:
            futures = [executor.submit(note, str(diary), done + n) for n in range(20)]
            assert [f.result(30) for f in futures] == list(range(done, done + 20))
            done += 20
        assert re.search(said, program.communicate(timeout=30)[0])
        assert executor.submit(note, str(diary), done).result(30) == done
        assert [w.id for w in executor.workers] == [worker.id]
    assert {host for _, host in diary.entries()} == {"alpha"}
    assert not diary.repeated()


NO_KEYS = """
    import sys
    from zmqexecutor.worker.calls import serve

    try:
        serve(sys.argv[1], patience=5, allow_plaintext_tcp_from_anyone=True)
    except ConnectionError as error:
        print(error)
"""
