"""A worker that squares numbers: python square_worker.py [ENDPOINT [WORKPOINT]]."""

import os
import sys

from zmqexecutor import Worker

# In the home directory, where no other user can put a socket in our place.
home = os.path.expanduser("~")
endpoint = sys.argv[1] if len(sys.argv) > 1 else f"ipc://{home}/square-master.ipc"
workpoint = sys.argv[2] if len(sys.argv) > 2 else f"ipc://{home}/square-worker.ipc"


def square(*args):
    number = int((args)[0][1])
    return str(number * number)


worker = Worker(endpoint, workpoint, target=square)
try:
    worker.run()
except KeyboardInterrupt:
    worker.stop()
