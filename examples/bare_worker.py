"""A worker that squares numbers, written from docs/protocol.md alone.

    python bare_worker.py ENDPOINT

It uses nothing of zmqexecutor, as a worker in another language would.
"""

import os
import sys
import time
import uuid

import zmq
from msgspec.msgpack import decode, encode
from zmq.utils.monitor import recv_monitor_message


def machine():
    parts = [os.uname().nodename]
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            parts.append(file.read().strip())
        parts += [os.readlink("/proc/self/ns/pid"), os.readlink("/proc/self/ns/mnt")]
    except OSError:
        pass
    return " ".join(parts)


def run(job):
    seq, _id, data, _codec, *_ = job
    start = time.perf_counter()
    try:
        ok, answer = True, str(int(data.decode()) ** 2)
    except ValueError as error:
        ok, answer = False, repr(error)
    return [seq, ok, answer.encode(), "text", time.perf_counter() - start]


def open_socket(name):
    socket = context.socket(zmq.DEALER)
    socket.routing_id = name.encode()
    socket.linger = 0
    return socket, socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)


def serve(endpoint):
    """Work for one master, until it is lost (True) or lets us go (False)."""
    name = uuid.uuid4().hex
    (control, control_news), (work, work_news) = open_socket(name), open_socket(name)
    control.immediate = True
    control.connect(endpoint)
    try:
        while True:
            welcomed = bool(work.last_endpoint)
            sockets = [control, work, control_news, work_news]
            ready, _, _ = zmq.select(sockets, [], [], None if welcomed else 60)
            if not ready:
                sys.exit("no master answered within a minute")
            news = [socket for socket in (control_news, work_news) if socket in ready]
            if zmq.EVENT_DISCONNECTED in [recv_monitor_message(socket)["event"] for socket in news]:
                return True
            if control_news in ready:
                hello = ["Hello", 1, name, os.getpid(), os.uname().nodename, machine(), None, None]
                control.send(encode(hello))
            if work in ready:
                jobs = decode(work.recv())[2]
                results = [run(job) for job in jobs]
                if results:
                    work.send(encode(["Results", 0, results]), zmq.DONTWAIT)
            if control in ready:
                kind, *fields = decode(control.recv())
                if kind == "Welcome":
                    work.connect(fields[1])
                    work.send(encode(["Ready", name]))
                elif kind == "Expelled":
                    return True
                elif kind == "Refused":
                    sys.exit(f"the master refused this worker: {fields[0]}")
                elif kind == "Drain":
                    work.send(encode(["Goodbye"]), zmq.DONTWAIT)
                    work.linger = 1000
                    return False
    except zmq.Again:
        return True  # there is nobody to send to any more
    finally:
        control.disable_monitor()
        work.disable_monitor()
        for socket in (control_news, work_news, control, work):
            socket.close()


if len(sys.argv) != 2:
    sys.exit("usage: python bare_worker.py ENDPOINT (a master's, such as ipc:///tmp/jobs.ipc)")
context = zmq.Context()
while serve(sys.argv[1]):
    pass
context.term()
