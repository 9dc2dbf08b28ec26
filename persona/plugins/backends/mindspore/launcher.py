"""`python boot.py persona.plugins.backends.mindspore.launcher COUNT WORDS…`: COUNT processes of a MindSpore cluster on
this machine, each running `python WORDS…`, with the scheduler they meet at.

The variables are those that msrun sets (MindSpore's "dynamic cluster"). Not msrun itself (2.7.0): it waits for its
processes in a loop without a pause, which takes a processor; it runs whatever `python` is on the path; it ends the
first process, with what that has to say, in the moment another one dies; and it leaves its scheduler behind when it is
ended itself."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from persona.plugins.backends.shared.meeting import MEETING, Table

PATIENCE = 30.0
"""Seconds for the others to end by themselves when one has failed: the command has to hear why."""


def main() -> int:
    """Launch, and wait for all to end; the exit code of the first that failed, or 0. When it is ended, all are."""
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        schedule()
        return 0
    count, words = int(sys.argv[1]), sys.argv[2:]
    cluster = os.environ | {
        "MS_WORKER_NUM": str(count),
        "MS_SCHED_HOST": "127.0.0.1",
        "MS_SCHED_PORT": str(free_port()),
        "RANK_SIZE": str(count),
        MEETING: str(Table(count).port),
    }
    scheduler = subprocess.Popen([sys.executable, words[0], __spec__.name], env=cluster | {"MS_ROLE": "MS_SCHED"})
    workers = [scheduler]

    def end_all(number: int, frame: FrameType | None) -> None:
        for process in workers:
            process.kill()
        for process in workers:  # gone is what they are to be when this one ends; Popen.wait may hold its lock just now
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, 0)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end_all)
    for rank in range(count):
        own = {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(rank), "RANK_ID": str(rank), "DEVICE_ID": str(rank)}
        workers.append(subprocess.Popen([sys.executable, *words], env=cluster | own))
    code = wait_for(workers[1:])
    for process in workers:
        process.kill()
        process.wait()
    return code


def free_port() -> int:
    """A port that nobody listens on, below those that systems give to whoever asks for any (32768 on Linux, 49152
    elsewhere): between this look and the scheduler's, which takes seconds, such a one would be somebody's."""
    for port in random.sample(range(20000, 32768), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no port between 20000 and 32767 is free on this machine")


def wait_for(workers: list[subprocess.Popen[bytes]]) -> int:
    """Until all have ended, or one has failed and the others had their time; the exit code of the first that failed."""
    failed, since = 0, 0.0
    while any(process.poll() is None for process in workers):
        time.sleep(0.1)
        if not failed:
            failed = next((process.returncode for process in workers if process.returncode), 0)
            since = time.monotonic()
        elif time.monotonic() > since + PATIENCE:
            break
    return failed or next((process.returncode for process in workers if process.returncode), 0)


def schedule() -> None:
    """Be the scheduler, until the processes have parted."""
    from persona.plugins.backends.mindspore.libraries import quiet_imports

    with quiet_imports():
        import mindspore
        from mindspore import communication

    mindspore.set_device("CPU")
    communication.init()


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    os._exit(exit_code & 255)
