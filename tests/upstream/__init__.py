"""Test suites that we did not write, run with `ZmqExecutor` in the place of their own pool.

Nothing of them is kept here: they are found on the machine, or downloaded, when the
tests run. A suite runs in a process of its own (`driver`), because its tests replace
streams, patch modules, count threads and sometimes crash.
"""
