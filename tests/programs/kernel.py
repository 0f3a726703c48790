"""Run cells, given as JSON, in an IPython kernel; print what each of them shows, as JSON.

A cell that begins with `#interrupt` is interrupted once it has printed something.
"""

from __future__ import annotations

import json
import sys
import warnings
from queue import Empty
from typing import Any

warnings.simplefilter("ignore")
from jupyter_client.manager import KernelManager  # noqa: E402

TRIES = 25
"""Of a second each, for each step; all of them are to end before the test loses patience."""
TRIES_TO_WAKE = 8
"""Of them, for a kernel to begin with a cell."""
KERNELS = 3


class AsleepError(Exception):
    """The kernel has not begun with a cell.

    ipykernel 7 sometimes sleeps over a request (seen on an idle kernel, before any pool was
    there) until the next one comes, and sometimes until it is shut down: its main thread then
    waits in its event loop, as stacks have shown.
    """


def run_cell(manager: Any, client: Any, cell: str) -> str:
    shown, begun = "", False
    request = client.execute(cell)
    for tries in range(TRIES):
        try:
            message = client.get_iopub_msg(timeout=1)
        except Empty:
            if not begun and tries >= TRIES_TO_WAKE:
                raise AsleepError from None
            client.kernel_info()
            continue
        if message["parent_header"].get("msg_id") != request:
            continue
        begun = True
        kind, content = message["msg_type"], message["content"]
        if kind == "status" and content["execution_state"] == "idle":
            return shown
        if kind == "stream":
            shown += content["text"]
            if cell.startswith("#interrupt"):
                manager.interrupt_kernel()
        elif kind == "execute_result":
            shown += content["data"]["text/plain"]
        elif kind == "error":
            shown += content["ename"]
    raise TimeoutError(f"the kernel does not end {cell!r}; it showed {shown!r}")


def wait_until_ready(client: Any) -> None:
    # Not the client's own `wait_for_ready`, which asks once: see above.
    for _ in range(TRIES):
        client.kernel_info()
        try:
            client.get_shell_msg(timeout=1)
            client.get_iopub_msg(timeout=1)
        except Empty:
            continue
        return
    raise TimeoutError("the kernel does not answer")


def run_cells(cells: list[str]) -> list[str]:
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(extra_arguments=["--InteractiveShell.colors=NoColor"])
    client = manager.blocking_client()
    try:
        client.start_channels()
        wait_until_ready(client)
        return [run_cell(manager, client, cell) for cell in cells]
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


def main() -> None:
    cells = json.load(sys.stdin)
    for _ in range(KERNELS):
        try:
            print(json.dumps(run_cells(cells)))
            return
        except AsleepError:
            pass
    raise AsleepError(f"{KERNELS} kernels")


main()
