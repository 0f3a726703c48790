"""Takes jobs back from workers that have not started them.

    ask ── the journal says that they are recalled ──► a moment later: which one runs?
                                                       the others are back

No worker has to answer, so a job that holds the interpreter's lock, or a worker that
is stopped, holds up no other job. `journal` says why none of them can run twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from .peers import Peer

__all__ = ["SETTLE", "Recalls"]

SETTLE: Final = 0.001
"""Seconds after which what one process wrote into a journal is there for the other."""


class Recalls:
    """Used by the master thread only."""

    def __init__(
        self,
        read_journal: Callable[[Peer], None],
        taken_back: Callable[[Peer, list[int]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with none.

        Args:
            read_journal: takes the results that have not come as messages.
            taken_back: called with a worker and the numbers of the jobs that it will not
                run; there may be none.
            clock: tells the time in seconds.
        """
        self._clock = clock
        self._read_journal = read_journal
        self._taken_back = taken_back
        self._due: dict[Peer, float] = {}  # the longest under way first

    def ask(self, peer: Peer) -> None:
        """Take back all that this worker has not started, but for one."""
        if peer.journal and peer.state and peer.state.held and peer not in self._due:
            peer.journal.recall(peer.state.next_seq - 1)  # never less than the last time
            self._due[peer] = self._clock() + SETTLE  # from after the word on

    def next_deadline(self) -> float | None:
        """When `check` must be called, even if nothing happens."""
        return next(iter(self._due.values()), None)

    def check(self, now: float) -> None:
        """Finish the recalls whose time has come."""
        while self._due:
            peer, due = next(iter(self._due.items()))
            if due > now:
                return
            del self._due[peer]
            self._finish(peer)

    def forget(self, peer: Peer) -> None:
        """A worker is lost."""
        self._due.pop(peer, None)

    def _finish(self, peer: Peer) -> None:
        self._read_journal(peer)
        assert peer.journal
        assert peer.state
        held, running, last = peer.state.held, peer.journal.running, peer.journal.recalled
        unstarted = [seq for seq in held if running < seq <= last]
        kept = 0
        if running in held:
            kept = running
        elif unstarted and not held[unstarted[0]][0].doomed:
            # It has something to do when it goes on. It may stand before one that was
            # taken back earlier, which it drops then.
            kept = unstarted.pop(0)
        peer.journal.settle(kept)
        self._taken_back(peer, unstarted)
