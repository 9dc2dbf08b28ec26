"""A backend and a session that are elsewhere: what they are asked goes to a worker in the framework's own environment.

Noise, order, learning rates, trackers, plugins, checkpoints and printing stay in this process. What travels is the plan
once, and per step a micro-batch (some hundred kilobytes) and two numbers back."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from persona.core.adapters.entry import Checkpoint
from persona.core.adapters.tensor import TensorRef
from persona.core.host import errors
from persona.core.host.contracts import Availability, Runtime
from persona.core.host.errors import BackendMissing, PersonaError, TrainingError
from persona.core.training.base import Base
from persona.core.training.plan import TrainingPlan
from persona.environments.places import own_python, variable_of
from persona.environments.wire import Lent, dtype_called, receive, send

BOOT = Path(__file__).with_name("boot.py")
TAIL = 12
"""Lines of a dead worker's log that are shown."""
PACKAGES = {"yaml": "PyYAML", "PIL": "pillow"}
"""What installs a module that is not called so."""
_OWN = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


def command(python: Path, module: str, *arguments: str) -> list[str]:
    """What runs a module of this very persona with another environment's Python."""
    return [str(python), "-I", str(BOOT), module, *arguments]


def clean_environment() -> dict[str, str]:
    """The environment variables of this process without those that lead a Python to another one's packages."""
    return {name: value for name, value in os.environ.items() if name not in _OWN}


class Process:
    """The worker's process, and the conversation with it."""

    def __init__(self, python: Path, backend: str) -> None:
        self.backend, self.python = backend, python
        self._words = tempfile.NamedTemporaryFile(prefix="persona-worker-", suffix=".log")  # noqa: SIM115
        self.log = Path(self._words.name)
        self._is_waiting = self._has_answered = False
        try:
            self._process = subprocess.Popen(
                command(python, "persona.environments.worker", backend),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                env=clean_environment(),
            )
        except OSError as error:
            raise BackendMissing(
                f"The environment of {backend} cannot be started: {python}: {error.strerror}.",
                hint=f"Build it again: persona backends setup {backend}",
            ) from error

    def call(self, name: str, *arguments: Any) -> tuple[Any, list[str]]:
        """Ask for something; the result and the session's notes so far. Raises what the worker raised when it is an
        error of persona's, TrainingError when the worker failed otherwise or is gone."""
        self._is_waiting = True
        try:
            send(cast(IO[bytes], self._process.stdin), [name, *arguments])
            told = receive(cast(IO[bytes], self._process.stdout))
        except (EOFError, BrokenPipeError, ConnectionError) as error:
            self._is_waiting = False
            raise self._death() from error
        except TypeError:  # something that cannot be sent: nothing was
            self._is_waiting = False
            raise
        self._is_waiting = False
        self._has_answered = True
        if "error" not in told:
            return told["result"], told["notes"]
        kind = getattr(errors, told["error"], None) if told["error"] else None
        if isinstance(kind, type) and issubclass(kind, PersonaError):
            raise kind(told["message"], hint=self._to_type(told["hint"]) if kind is BackendMissing else told["hint"])
        raise TrainingError(f"The {self.backend} worker failed: {told['message']}.", hint=self._where_to_look())

    def move_log(self, place: Path) -> None:
        """From now on the worker writes its words there."""
        self.log = place

    def close(self) -> None:
        """End the worker; one that is in the middle of something at once."""
        if self._process.poll() is None and self._is_waiting:
            self._process.kill()
        with contextlib.suppress(OSError, ValueError):
            send(cast(IO[bytes], self._process.stdin), ["quit"])
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                cast(IO[bytes], stream).close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(OSError):
            self._words.close()

    def _to_type(self, hint: str) -> str:
        """Setting up persona's environment helps nobody whose own is taken."""
        if own_python(self.backend) != self.python or f"backends setup {self.backend}" not in hint:
            return hint
        variable = variable_of(self.backend)
        return f"{variable} names {self.python}. Install it there, or take persona's own: unset {variable}; {hint}"

    def _death(self) -> PersonaError:
        try:
            code = self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        # It may have died before it took the log it was told to write.
        said = next((lines for place in (self.log, Path(self._words.name)) if (lines := _lines(place))), [])
        missing = re.match(r"ModuleNotFoundError: No module named '(\w+)", said[-1]) if said and code == 1 else None
        if missing and not self._has_answered:
            package = PACKAGES.get(missing[1], missing[1])
            return BackendMissing(
                f"The backend {self.backend} cannot be used here: {self.python} has no package {package}.",
                hint=self._to_type(f"persona backends setup {self.backend}"),
            )
        why = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        memory = "; when memory runs out, the system does that" if why.endswith("SIGKILL") else ""
        words = "".join(f"\n    {line[:300]}" for line in said[-TAIL:])
        last = f" Its last words:{words}" if words else ""
        return TrainingError(f"The {self.backend} worker {why}{memory}.{last}", hint=self._where_to_look())

    def _where_to_look(self) -> str:
        return f"All it said is in {self.log}." if self.log != Path(self._words.name) else ""


def _lines(file: Path) -> list[str]:
    """The lines of a log that have something on them; none when it is not there."""
    try:
        return [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return []


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class RemoteSession:
    """`persona.core.host.contracts.Session`, each of whose methods is asked of the worker. `surroundings` tells where
    it works: Python, versions, and which frameworks are loaded there."""

    def __init__(self, process: Process, methods: list[str], surroundings: Mapping[str, Any], notes: list[str]) -> None:
        self._process, self._methods = process, frozenset(methods)
        self.surroundings = surroundings
        self.notes = notes

    def __getattr__(self, name: str) -> Any:
        """Whatever methods the session over there has, this one has too."""
        if name.startswith("_") or name not in self._methods:
            raise AttributeError(name)
        return functools.partial(self._ask, name)

    def write_state(self, path: Path) -> None:
        """Let the worker write its state to a file: it would take twice the memory to send it."""
        self.notes[:] = self._process.call("write_state", path.absolute())[1]

    def close(self) -> None:
        """Free the memory, by ending the worker."""
        self._process.close()

    def _ask(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        result, notes = self._process.call("session", method, list(arguments), keywords)
        self.notes[:] = notes
        return self._borrow(result) if isinstance(result, Checkpoint) else result

    def _borrow(self, checkpoint: Checkpoint) -> Checkpoint:
        """Tensors that were lent, as tensors that are read when they are wanted, until the session is closed."""

        def borrowed(tensors: Mapping[str, Any]) -> dict[str, TensorRef]:
            return {name: self._reference(lent) for name, lent in tensors.items()}

        components = {name: borrowed(tensors) for name, tensors in checkpoint.components.items()}
        return dataclasses.replace(checkpoint, components=components, extras=borrowed(checkpoint.extras))

    def _reference(self, lent: Lent) -> TensorRef:
        return TensorRef(dtype_called(lent.dtype), lent.shape, lambda: self._process.call("read", lent.number)[0])


class RemoteBackend:
    """`persona.core.host.contracts.Backend` in the environment that `python` belongs to."""

    def __init__(self, name: str, summary: str, python: Path, told: Mapping[str, Any] | None = None) -> None:
        """`told` is what setting the environment up has found out: version, capabilities by device."""
        self.name, self.summary = name, summary
        self.python = python
        self._told = told or {}
        self._ready: Process | None = None

    def availability(self) -> Availability:
        """It is there; whether it works is seen when it is opened."""
        return Availability(True, version=str(self._told.get("version", "")))

    def capabilities(self, device: str) -> Mapping[str, bool]:
        """What works on that device, as the backend says over there, or has said when it was set up."""
        known: Mapping[str, Mapping[str, bool]] = self._told.get("capabilities", {})
        if device in known:
            return known[device]
        able: Mapping[str, bool] = self._process().call("capabilities", device)[0]
        return able

    def free_memory(self, device: str) -> int:
        """Bytes that are free on that device; 0 where it cannot be asked."""
        return int(self._process().call("free_memory", device)[0])

    def devices(self, device: str, count: int) -> tuple[str, ...]:
        """The devices of `count` processes there. Raises UsageError for a backend that knows one device only."""
        return tuple(self._process().call("devices", device, count)[0])

    def launch_line(self, count: int, boot: str, module: str, logs: Path) -> list[str]:
        """What starts `module` so often over there, by the launcher of the framework."""
        return list(self._process().call("launch_line", count, boot, module, logs)[0])

    def plugins(self) -> list[str]:
        """The plugins that are installed there."""
        return list(self._process().call("plugins")[0])

    def open(self, base: Base, plan: TrainingPlan | None, runtime: Runtime) -> RemoteSession:
        """Start a worker (or take the one that has told the capabilities) and open a session in it."""
        process, self._ready = self._process(), None
        try:
            if runtime.log is not None:
                process.move_log(runtime.log.absolute())
            runtime = dataclasses.replace(runtime, log=runtime.log and process.log, processes=None)
            told, notes = process.call("open", base, plan, runtime)
        except BaseException:
            process.close()
            raise
        return RemoteSession(process, told["methods"], told["surroundings"], notes)

    def close(self) -> None:
        """End a worker that was asked something but never opened."""
        if self._ready is not None:
            self._ready.close()
            self._ready = None

    def _process(self) -> Process:
        if self._ready is None:
            self._ready = Process(self.python, self.name)
        return self._ready
