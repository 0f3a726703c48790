"""Five of them, kept alive by Circus: python square_workers.py [ENDPOINT [WORKPOINT]].

In the workpoint, $WID stands for an id that is unique to each worker.
"""

import os
import shlex
import sys

from zmqexecutor import Workers

home = os.path.expanduser("~")
endpoint = sys.argv[1] if len(sys.argv) > 1 else f"ipc://{home}/square-master.ipc"
workpoint = sys.argv[2] if len(sys.argv) > 2 else f"ipc://{home}/square-worker-$WID.ipc"

script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "square_worker.py")
cmd = shlex.join([sys.executable, script, endpoint, workpoint])

workers = Workers(cmd)
try:
    workers.run()
except KeyboardInterrupt:
    workers.stop()
