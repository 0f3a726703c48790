"""The master, who has numbers squared: python square_master.py [ENDPOINT]."""

import os
import random
import sys
import time

from zmqexecutor import JobRunner, WorkerLostError

home = os.path.expanduser("~")
endpoint = sys.argv[1] if len(sys.argv) > 1 else f"ipc://{home}/square-master.ipc"

runner = JobRunner(endpoint)
runner.start()

try:
    # wait to have at least 1 worker
    print("Waiting for some workers to register -- run square_workers.py")
    while len(runner.workers) < 1:
        sys.stdout.write(".")
        sys.stdout.flush()
        time.sleep(1.0)

    while True:
        try:
            print(runner.execute("1", str(random.randrange(1000))))
        except WorkerLostError as error:
            print(error)  # its number has no square; the next one goes to another worker
except KeyboardInterrupt:
    runner.stop()
    print("bye")
