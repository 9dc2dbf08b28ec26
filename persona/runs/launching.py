"""A run on several devices, seen from the command that was typed: the backend's own launcher starts one process a
device, each runs `persona.runs.process`, and what they tell comes back here.

    persona train --devices 2
      └─ torchrun (or what the backend has)
           ├─ process 0: the run as on one device; it alone writes the folder, and tells how it goes
           └─ process 1: the same steps with its part of the samples

A framework with an environment of its own is launched there, by its own Python; the command stays where it was typed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persona.core.host.errors import TrainingError, UsageError
from persona.core.host.host import Host
from persona.core.training import processes
from persona.core.training.events import Emit, Note
from persona.core.training.plan import TrainingPlan
from persona.core.training.run import RunFolder, checkpoints
from persona.environments.remote import BOOT, RemoteBackend, clean_environment
from persona.runs.abilities import taken
from persona.runs.accelerate_file import refuse_unshardable
from persona.runs.link import VARIABLE, Lines, error_from, event_from
from persona.runs.recipe import Recipe, recipe_text

MODULE = "persona.runs.process"
OTHERS = ("WORLD_SIZE", "PADDLE_TRAINERS_NUM", "MS_WORKER_NUM")
"""What launchers tell their processes: how many they are."""
GRACE = 15.0
"""Seconds that the first process has to say what went wrong, after another one did, and all have to end then."""


def refuse_other_launchers() -> None:
    """Raises UsageError when somebody else's launcher started this command several times: each would make a run."""
    if VARIABLE in os.environ:
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UsageError(
            "persona train was started by accelerate launch: each process would make a run of its own.",
            hint="Start it once, with the same file: persona train --accelerate-config FILE …",
        )
    for name in OTHERS:
        count = os.environ.get(name, "1")
        if count.isdigit() and int(count) > 1:
            raise UsageError(
                f"persona train was started by a launcher, {count} times ({name}).",
                hint=f"Start it once: persona train --devices {count} …",
            )


def devices_of(backend: Any, recipe: Recipe, plan: TrainingPlan) -> tuple[str, ...]:
    """The device of every process; one name for a run on one device.

    Raises UsageError when the samples of a step cannot be shared equally, the backend knows one device only or cannot
    follow accelerate's file, and BackendMissing when so many devices are not there."""
    refuse_other_launchers()
    if recipe.accelerate_config is not None and not backend.capabilities(recipe.device).get("sharding", False):
        raise UsageError(
            f"--accelerate-config: the backend {backend.name} on {taken(backend, recipe.device)} cannot follow a file "
            "of accelerate.",
            hint=f"--devices {recipe.devices}, or --backend torch on cpu or cuda",
        )
    if recipe.sharding is not None:
        refuse_unshardable(plan)
    if recipe.devices == 1:
        return (recipe.device,)
    processes.shares(plan, recipe.devices)
    return processes.devices_of(backend, recipe.device, recipe.devices)


def launch(
    run: RunFolder,
    recipe: Recipe,
    backend: Any,
    host: Host,
    *,
    fresh: bool,
    allow_change: bool = False,
    emit: Emit,
    stop: Callable[[], bool],
) -> None:
    """Execute a `fresh` run, or resume one, in `recipe.devices` processes, to its end.

    Raises what a process raised, and TrainingError for one that ended without a word."""
    elsewhere = isinstance(backend, RemoteBackend)
    job = {
        "run": str(run.path.absolute()),
        "recipe": recipe_text(recipe),
        "backend": backend.name,
        "without": [name for name, record in host.records.items() if record.state == "disabled"],
        "elsewhere": elsewhere,
        "fresh": fresh,
        "allow_change": allow_change,
    }
    if elsewhere:
        job["without"] = _plugins_left_behind(recipe, host, backend, emit)
    with tempfile.TemporaryDirectory(prefix="persona-") as folder, socket.create_server(("127.0.0.1", 0)) as server:
        logs = Path(folder)
        token = secrets.token_hex(16)
        environment = surroundings(recipe.devices, elsewhere) | {VARIABLE: f"{server.getsockname()[1]}:{token}"}
        line = backend.launch_line(recipe.devices, str(BOOT), MODULE, logs)
        if elsewhere:
            backend.close()  # the worker that has told the line
        launcher = started(line, environment, logs / "launcher.log")
        watched = _Watch(server, token, launcher, job, emit)
        try:
            watched.until_the_end(stop)
        finally:
            watched.end()
            said = _said(logs)
            if elsewhere and run.path.is_dir():
                with run.worker_log.open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in said)
        watched.raise_what_went_wrong(run, recipe.devices, said)


def started(line: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """The launcher, running. It has a session of its own: Ctrl-C is for this command, which lets the step finish."""
    with log.open("wb") as file:
        return subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )


def surroundings(count: int, elsewhere: bool = False) -> dict[str, str]:
    """The environment variables of launched processes: a fair share of the processor's cores, and nothing that leads to
    the packages here when they work `elsewhere`."""
    found = clean_environment() | {"PYTHONNOUSERSITE": "1"} if elsewhere else dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    return found


def _plugins_left_behind(recipe: Recipe, host: Host, backend: RemoteBackend, emit: Emit) -> list[str]:
    """The plugins to switch off in the backend's environment. Raises UsageError for a recipe that needs one which is
    not installed there."""
    there = set(backend.plugins())
    missing = {name for name, record in host.records.items() if record.state == "ok"} - there
    optimizer = recipe.settings.optimizer
    needed = [("method", recipe.method), *(("tracker", name) for name in recipe.settings.tracker)]
    needed += [("optimizer", optimizer)] if optimizer in host.provided("optimizer") else []
    for kind, name in needed:
        if host.giver(kind, name) in missing:
            raise UsageError(
                f"--devices {recipe.devices}: {backend.name} works in an environment of its own, which has no plugin "
                f"{host.giver(kind, name)} ({kind} {name}).",
                hint=f"Leave --devices out, or install it there: {backend.python} -m pip install …",
            )
    if missing:
        emit(Note(f"not told how the run goes, because they are not installed there: {', '.join(sorted(missing))}"))
    return [name for name in there if name not in host.records or host.records[name].state == "disabled"]


def _said(logs: Path) -> list[str]:
    """What the launcher and its processes have printed, file by file; lines with something on them."""
    files = sorted((path for path in logs.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime)
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in files)
    return [line for text in texts for line in text.splitlines() if line.strip()]


@dataclass
class _Process:
    """What is known of a launched process."""

    lines: Lines
    pid: int = 0
    rank: int = -1
    finished: bool = False
    error: dict[str, Any] | None = None
    gone: bool = False


@dataclass
class _Watch:
    """Listens to the launched processes until all have ended."""

    server: socket.socket
    token: str
    launcher: subprocess.Popen[bytes]
    job: Mapping[str, Any]
    emit: Emit
    processes: list[_Process] = field(default_factory=list)
    left: list[_Process] = field(default_factory=list)  # those that have ended, in that order

    def __post_init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.server, selectors.EVENT_READ)
        self._told = False

    def until_the_end(self, stop: Callable[[], bool]) -> None:
        """Pass on what they tell, until the launcher and all of them have ended, or something went wrong and the first
        had its time to say what."""
        trouble = 0.0
        while self.launcher.poll() is None or self._anybody_there():
            for key, _ in self._selector.select(timeout=0.1):
                self._welcome() if key.data is None else self._hear(key.data)
            if stop() and not self._told:
                self._told = True
                self._tell_all(stop=True)
            if self._went_wrong() and not trouble:
                trouble = time.monotonic()
            if trouble and (self._first_has_spoken() or time.monotonic() > trouble + GRACE):
                return

    def end(self) -> None:
        """See to it that nothing is left running: the launcher is asked to stop, then made to."""
        self._tell_all(end=True)
        if all(process.finished for process in self.processes) and self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.launcher.wait(GRACE)
        if self.launcher.poll() is None:
            self.launcher.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.launcher.wait(GRACE)
        for process in self.processes:
            if not process.gone:  # a launcher that was itself killed leaves its processes behind
                with contextlib.suppress(OSError):
                    os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        self.launcher.kill()
        self.launcher.wait()
        for process in self.processes:
            process.lines.connection.close()
        self._selector.close()

    def raise_what_went_wrong(self, run: RunFolder, count: int, said: list[str]) -> None:
        """The error of the process that is its cause, if there is one. `said` is what they printed."""
        ordered = sorted(self.processes, key=lambda process: process.rank)
        told = [process.error for process in ordered if process.error]
        causes = [error for error in told if error["error"] != "PeerLost"]
        if causes:
            raise error_from(causes[0])
        if len(ordered) == count and all(process.finished for process in ordered):
            return
        if len(ordered) < count:
            more = f": {said[-1].strip()}" if said else "."
            raise TrainingError(f"{count} processes were to be started, and {len(ordered)} were{more}")
        lost = next((process.rank for process in self.left if not process.finished and not process.error), None)
        saved = checkpoints(run)
        kept = f"the last checkpoint is whole: {saved[-1]}" if saved else "there is no checkpoint yet"
        raise TrainingError(
            f"Process {lost} of 0 to {count - 1} ended without a word (killed, or out of memory). "
            f"All have stopped; {kept}."
            if lost is not None and lost >= 0
            else f"The processes of the run ended without a word. {kept[0].upper()}{kept[1:]}.",
            hint=f"Go on with: persona train --resume {run.path}",
        )

    def _welcome(self) -> None:
        connection, _ = self.server.accept()
        connection.settimeout(GRACE)  # for the first line; nobody but our own has a reason to keep us waiting
        process = _Process(Lines(connection))
        said = process.lines.take()
        if not said or said[0].get("token") != self.token:
            connection.close()
            return
        connection.settimeout(None)
        process.pid = int(said[0]["pid"])
        self.processes.append(process)
        self._selector.register(connection, selectors.EVENT_READ, process)
        process.lines.send(**self.job)
        if self._told:
            process.lines.send(stop=True)

    def _hear(self, process: _Process) -> None:
        messages = process.lines.take()
        if messages is None:
            process.gone = True
            self.left.append(process)
            self._selector.unregister(process.lines.connection)
            return
        for message in messages:
            if "event" in message:
                self.emit(event_from(message))
            elif "error" in message:
                process.error = message
                if message.get("traceback"):
                    print(message["traceback"], file=sys.stderr)
            elif "rank" in message:
                process.rank = int(message["rank"])
            elif "finished" in message:
                process.finished = True

    def _tell_all(self, **message: Any) -> None:
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.lines.send(**message)

    def _anybody_there(self) -> bool:
        return any(not process.gone for process in self.processes)

    def _went_wrong(self) -> bool:
        left = self.launcher.poll() is not None and not all(process.finished for process in self.processes)
        return left or any(process.error or (process.gone and not process.finished) for process in self.processes)

    def _first_has_spoken(self) -> bool:
        first = next((process for process in self.processes if process.rank == 0), None)
        return first is None or first.gone or first.error is not None
