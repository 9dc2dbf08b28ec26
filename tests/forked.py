"""`persona …` in processes that can be killed, forked from one that has imported torch already (seconds saved a start).

`start` runs the real command line; with `kill_at` the process kills itself, as `kill -9` would, at a given call of a
function such as `os.fsync`, so that the moments between two writes are hit every time and not by luck."""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PRELOADED = [
    "persona.commands.train",
    "persona.plugins.backends.torch.session",
    "persona.runs.assemble",
    "persona.runs.training",
]


def start(
    arguments: Sequence[object],
    *,
    environment: Mapping[str, str],
    log: Path,
    kill_at: tuple[str, int] | None = None,
) -> Any:
    """A running process with `.pid`, `.exitcode`, `.kill()` and `.join()`; what it prints goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    words = [str(argument) for argument in arguments]
    process = context.Process(target=_run, args=(words, dict(environment), str(log), kill_at))
    process.start()
    return process


def together(count: int, work: Any, *arguments: Any) -> dict[int, Any]:
    """What `count` forked processes put into a queue as (rank, found): `work(rank, count, *arguments, queue)` in each,
    with the variables that torchrun sets. `work` is a function of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results = context.Queue()
    places = torchrun_variables(count)
    given = [(variables, work, (rank, count, *arguments, results)) for rank, variables in enumerate(places)]
    processes = [context.Process(target=_take_part, args=one) for one in given]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    while len(found) < count and not any(process.exitcode for process in processes):
        with contextlib.suppress(queue.Empty):
            rank, its = results.get(timeout=0.2)
            found[rank] = its
    for process in processes:
        if len(found) < count:
            process.kill()
        process.join()
    assert len(found) == count, "one of the processes has failed"
    return found


def _take_part(variables: dict[str, str], work: Any, arguments: tuple[Any, ...]) -> None:
    gc.freeze()
    os.environ.update(variables)
    work(*arguments)


def torchrun_variables(count: int) -> list[dict[str, str]]:
    """The environment of each of `count` processes on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        {name: str(value) for name, value in {"RANK": rank, "LOCAL_RANK": rank, **shared}.items()}
        for rank in range(count)
    ]


class Launched:
    """What `subprocess.Popen` gives of a launcher, with processes forked here: `count` of `persona.runs.process`, with
    the variables torchrun sets. As torchrun does, it ends the others when one has failed."""

    def __init__(self, count: int, environment: Mapping[str, str], log: Path, kill_at: Any = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.processes = []
        for rank, own in enumerate(torchrun_variables(count)):
            words = dict(environment) | own
            deadly = kill_at[1:] if kill_at and kill_at[0] == rank else None
            self.processes.append(context.Process(target=_run, args=(None, words, str(log), deadly)))
            self.processes[-1].start()

    def poll(self) -> int | None:
        """None while one is running."""
        codes = [process.exitcode for process in self.processes]
        if any(codes):
            self.terminate()
        return None if None in codes else max(codes, key=abs)

    def wait(self, timeout: float | None = None) -> int:
        """Until all have ended."""
        for process in self.processes:
            process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0)
        return code

    def terminate(self) -> None:
        """Ask all to end."""
        for process in self.processes:
            process.terminate()

    def kill(self) -> None:
        """End all."""
        for process in self.processes:
            process.kill()


def _run(arguments: list[str] | None, environment: dict[str, str], log: str, kill_at: tuple[str, int] | None) -> None:
    gc.freeze()  # what torch brought is never garbage; looking through it takes longer than these runs
    os.environ.update(environment)
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # The fork server ignores interrupts, and its children with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if kill_at is not None:
        _arm(*kill_at)
    if arguments is None:
        from persona.runs.process import main as take_part

        sys.exit(take_part())
    from persona.cli import main

    main(arguments)


def _arm(dotted: str, call: int) -> None:
    """Make the `call`-th call of `module.function` or `module.Class.method` the last thing this process does."""
    owner_name, _, name = dotted.rpartition(".")
    try:
        owner: Any = importlib.import_module(owner_name)
    except ModuleNotFoundError:
        module, _, cls = owner_name.rpartition(".")
        owner = getattr(importlib.import_module(module), cls)
    original, count = getattr(owner, name), 0

    def deadly(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, deadly)
