"""A backend at work in its own environment. It reads requests from standard input, answers on standard output, and what
its libraries print goes to standard error, which the parent keeps as a log.

    ["capabilities", "cpu"]   ["open", base, plan, runtime]   ["session", "update", [...], {}]   …
    → {"result": …, "notes": [...]}   or   {"error": class, "message": …, "hint": …}
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from persona.core.adapters.entry import Checkpoint
from persona.core.adapters.tensor import TensorRef
from persona.core.host.errors import BackendMissing, PersonaError
from persona.core.training.processes import devices_of
from persona.core.training.run import clear_disk_errors, write_state
from persona.environments.wire import Lent, name_of, receive, send

FRAMEWORKS = ("torch", "paddle", "mindspore")
"""Of these a worker loads its own and no other."""
PACKAGES = (
    "numpy", "torch", "torch_npu", "diffusers", "transformers", "peft", "accelerate", "safetensors",
    "paddlepaddle", "paddlepaddle-gpu", "ppdiffusers", "paddlenlp", "mindspore", "mindone",
)  # fmt: skip


class Worker:
    """What a request may ask for: the methods without an underscore."""

    def __init__(self, backend: str) -> None:
        from persona.api import host

        self.name = backend
        self._backend: Any = host().load("backend", backend)()
        self._session: Any = None
        self._lent: list[TensorRef] = []

    def availability(self) -> Any:
        """Of the backend."""
        return self._backend.availability()

    def capabilities(self, device: str) -> dict[str, bool]:
        """Of the backend on a device."""
        return dict(self._backend.capabilities(device))

    def free_memory(self, device: str) -> int:
        """Bytes that are free on a device; 0 where the backend cannot tell."""
        return int(self._backend.free_memory(device)) if hasattr(self._backend, "free_memory") else 0

    def devices(self, device: str, count: int) -> tuple[str, ...]:
        """The devices of so many processes, as the backend finds them."""
        return devices_of(self._backend, device, count)

    def launch_line(self, count: int, boot: str, module: str, logs: Any) -> list[str]:
        """What starts `module` so often here."""
        return list(self._backend.launch_line(count, boot, module, logs))

    def plugins(self) -> list[str]:
        """The plugins that are installed here and can be used."""
        from persona.api import host

        return [name for name, record in host().records.items() if record.state == "ok"]

    def open(self, base: Any, plan: Any, runtime: Any) -> dict[str, Any]:
        """Open the session; which methods it has, and what is loaded here."""
        if runtime.log is not None:
            log = os.open(runtime.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            os.close(log)
        self._session = self._backend.open(base, plan, runtime)
        methods = [name for name in dir(self._session) if not name.startswith("_")]
        return {
            "methods": [name for name in methods if callable(getattr(self._session, name))],
            "surroundings": surroundings(self.name),
        }

    def session(self, method: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """A method of the open session. Whole weights are lent, not sent: they may be larger than the memory."""
        result = getattr(self._session, method)(*arguments, **keywords)
        return self._lend(result) if isinstance(result, Checkpoint) else result

    def write_state(self, path: Path) -> None:
        """Write the open session's state to a file. Raises as `persona.core.training.run.write_state`, and
        UnwritableOutput."""
        with clear_disk_errors(path):
            write_state(path, self._session.state())

    def read(self, number: int) -> Any:
        """A tensor that was lent."""
        return self._lent[number].read()

    def close(self) -> None:
        """Close the session; another may be opened."""
        session, self._session, self._lent = self._session, None, []
        if session is not None:
            session.close()

    def notes(self) -> list[str]:
        """The open session's notes so far."""
        return list(getattr(self._session, "notes", ()))

    def _lend(self, checkpoint: Checkpoint) -> Checkpoint:
        def lent(tensors: Mapping[str, TensorRef]) -> Any:
            found = {}
            for name, tensor in tensors.items():
                found[name] = Lent(len(self._lent), name_of(tensor.dtype), tuple(tensor.shape))
                self._lent.append(tensor)
            return found

        components = {name: lent(tensors) for name, tensors in checkpoint.components.items()}
        return dataclasses.replace(checkpoint, components=components, extras=lent(checkpoint.extras))


def surroundings(backend: str) -> dict[str, Any]:
    """Where this process works, for the run's record. Raises BackendMissing unless the framework of `backend` is loaded
    and no other one is: a run must not say one framework and mean another."""
    loaded = [name for name in FRAMEWORKS if name in sys.modules]
    if backend in FRAMEWORKS and loaded != [backend]:
        raise BackendMissing(
            f"The worker of {backend} has loaded {' and '.join(loaded) or 'no framework'}, not {backend} alone.",
            hint=f"Build its environment again: persona backends remove {backend}; persona backends setup {backend}",
        )
    return {
        "python": platform.python_version(),
        "packages": versions(),
        "worker": {"executable": sys.executable, "process": os.getpid(), "frameworks_loaded": loaded},
    }


def versions() -> dict[str, str]:
    """The versions of the packages that decide what is computed, of those that are here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def answer(worker: Worker, request: Any) -> dict[str, Any]:
    """What is answered to one request; an error as its class, words and hint."""
    name, *arguments = request
    try:
        result = getattr(worker, name)(*arguments)
    except PersonaError as error:
        return {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    except Exception as error:
        traceback.print_exc()
        return {"error": "", "message": f"{type(error).__name__}: {error}", "hint": ""}
    return {"result": result, "notes": worker.notes()}


def serve(backend: str, requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more."""
    worker: Worker | None = None
    while True:
        try:
            request = receive(requests)
        except EOFError:
            return
        if request == ["quit"]:
            return
        try:
            worker = worker or Worker(backend)
            told = answer(worker, request)
        except PersonaError as error:  # there is no such backend here, or it cannot be imported
            told = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        send(answers, told)


def main() -> None:
    """Take standard input and output for the conversation, and give what libraries print to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means: finish the step, save
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(sys.argv[1], requests, answers)
    except BrokenPipeError:
        pass  # the parent is gone
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # some frameworks print thousands of lines when an interpreter ends


if __name__ == "__main__":
    main()
