"""What a process wrote last to its standard error: its last lines, and where it crashed."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["LastWords"]

TAIL_LINES: Final = 20
TAIL_BYTES: Final = 4096
"""What is kept of ordinary text."""
FAULT_BYTES: Final = 64 * 1024
"""The longest stack of a crash; what goes on for longer is something else."""

_FAULT: Final = "Fatal Python error: "
_HEADER: Final = _FAULT.encode()
# What `faulthandler` and the interpreter write below that line.
_PART_OF_FAULT = re.compile(
    r"\s|Current thread|Thread 0x|Stack \(|Python runtime state: |Extension modules: "
    r"|Cannot show|<|\.\.\."
)


class LastWords:
    """Takes all that the process writes, and keeps the end of it."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def add(self, data: bytes) -> None:
        """Take what it has written."""
        kept = self._kept
        kept += data
        end = kept.rfind(_HEADER)
        if end == -1 or len(kept) - end > FAULT_BYTES:
            end = len(kept)
        del kept[: max(0, end - TAIL_BYTES)]

    def tell(self, *, crashed: bool) -> tuple[str, str]:
        """The last lines, and the stack of a crash, which is not among them.

        Args:
            crashed: whether the process ended in a way that leaves a stack;
                otherwise what looks like one is another process's.
        """
        text = self._kept.decode(errors="replace")
        fault = ""
        start = text.rfind(_FAULT)
        if crashed and start != -1:
            lines = text[start:].splitlines(keepends=True)
            length = 1
            while length < len(lines) and _PART_OF_FAULT.match(lines[length]):
                length += 1
            fault = "".join(lines[:length]).rstrip() + "\n"
            text = text[:start] + "".join(lines[length:])
        tail = text[-TAIL_BYTES:].splitlines(keepends=True)[-TAIL_LINES:]
        return "".join(tail), fault
