"""How long a peer on another host is believed to be alive that is not heard of."""

from __future__ import annotations

from typing import Final

__all__ = ["LOST_AFTER"]

LOST_AFTER: Final = 10.0
"""Seconds; the default."""
