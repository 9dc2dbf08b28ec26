"""Many calls side by side: in processes forked from this one where that can be done, else in threads.

What takes time in a conversion is Python as much as the disk, and of threads only one runs Python at a time. A forked
process has everything imported already; one that is spawned would take longer to start than to convert a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

Work: TypeAlias = Callable[[int], dict[str, Any]]
Ended: TypeAlias = Generator[tuple[int, "dict[str, Any] | None"], None, None]
MOST = 8
"""Processes or threads: a disk is not faster for more, and each holds a file's names."""


def side_by_side(work: Work, count: int) -> Ended:
    """work(0) to work(count - 1), each with its number, in the order they end; None for a call whose process was
    killed. Close the generator to stop early: it waits for the calls that have begun. `work` must not raise, and what
    it returns is JSON data, since nothing is unpickled here."""
    workers = min(count, MOST, _cores() + 1)  # one more than can run: some wait for the disk
    return (_in_processes if can_fork() else _in_threads)(work, count, workers)


def can_fork() -> bool:
    """Whether this process may be forked: on Linux (elsewhere system libraries do not stand it), with one thread."""
    return sys.platform == "linux" and threading.active_count() == 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(work: Work, count: int, workers: int) -> Ended:
    import multiprocessing
    from multiprocessing.connection import wait

    context = multiprocessing.get_context("fork")
    numbers = iter(range(count))
    processes: dict[Any, Any] = {}
    busy: dict[Any, int] = {}

    def give(connection: Any) -> None:
        number = next(numbers, None)
        if number is not None:
            busy[connection] = number
            with contextlib.suppress(OSError):  # it was killed: that is seen when it is listened to
                connection.send_bytes(str(number).encode())

    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(work, theirs, [ours, *processes]), daemon=True)
            with warnings.catch_warnings():  # numpy's idle threads, which it stops and starts around a fork by itself
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            processes[ours] = process
            give(ours)
        while busy:
            ready: list[Any] = wait(list(busy))
            for connection in ready:
                number, result = busy.pop(connection), None
                with contextlib.suppress(EOFError, OSError):
                    result = json.loads(connection.recv_bytes())
                    give(connection)
                if result is None:  # the pipe closes before everything else of a killed process does
                    processes[connection].join(10)
                yield number, result
        yield from ((number, None) for number in numbers)  # every process was killed
    finally:
        for connection in processes:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"")
        for connection, process in processes.items():
            with contextlib.suppress(EOFError, OSError):
                while True:  # a process whose last result nobody takes cannot end
                    connection.recv_bytes()
            process.join()


def _serve(work: Work, connection: Any, inherited: Sequence[Any]) -> None:
    """A process's life: one number after the other, until there is none or nobody to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the first one decides
    for other in inherited:
        other.close()
    with contextlib.suppress(EOFError, OSError):
        while number := connection.recv_bytes():
            connection.send_bytes(json.dumps(work(int(number))).encode())


def _in_threads(work: Work, count: int, workers: int) -> Ended:
    waiting: SimpleQueue[int] = SimpleQueue()
    for number in range(count):
        waiting.put(number)
    finished: SimpleQueue[tuple[int, dict[str, Any]]] = SimpleQueue()
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set():
            try:
                number = waiting.get_nowait()
            except Empty:
                return
            finished.put((number, work(number)))

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(count):
            yield finished.get()
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
