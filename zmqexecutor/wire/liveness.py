"""How long a master is looked for, and how long a silent peer is believed to be alive."""

from __future__ import annotations

from typing import Final

__all__ = ["CLIENT_PATIENCE", "LOST_AFTER", "WORKER_PATIENCE"]

LOST_AFTER: Final = 10.0
"""Default of the seconds after which a peer on another host that is not heard of is lost."""
CLIENT_PATIENCE: Final = 5.0
"""Default of how long a client looks for a master, in seconds."""
WORKER_PATIENCE: Final = 60.0
"""Default of how long a worker looks for a master, in seconds."""
