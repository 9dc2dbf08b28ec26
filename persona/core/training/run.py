"""A run is a folder that can be understood, resumed, extended and shared.

    recipe.yaml        what was asked for, complete (can be trained again: persona train recipe.yaml)
    plan.json          what the method made of it
    environment.json   versions, device, base and data digests
    metrics.csv        one row a step
    worker.log         what the libraries of a framework in another environment printed
    checkpoints/step-000100/{state.safetensors, progress.json}
    cache/latents.safetensors
    samples/step-000100/00.png …   sheet.png
    adapter.safetensors  or  model/      the product

Every file is written under a temporary name and renamed, so that a kill at any instant leaves the last checkpoint
whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.host.errors import (
    NotFinite,
    OutputExists,
    PersonaError,
    ResumeError,
    TrainingError,
    UnwritableOutput,
    closest,
)
from persona.core.training.plan import TrainingPlan, plan_from_json, plan_to_json

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class RunFolder:
    """The places inside a run's folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        """What was asked for."""
        return self.path / "recipe.yaml"

    @property
    def plan_file(self) -> Path:
        """What the method made of it."""
        return self.path / "plan.json"

    @property
    def environment(self) -> Path:
        """Where and on what it ran."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One row a step."""
        return self.path / "metrics.csv"

    @property
    def worker_log(self) -> Path:
        """What the libraries of a framework in another environment printed."""
        return self.path / "worker.log"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """The folder of sampled pictures."""
        return self.path / "samples"

    @property
    def adapter(self) -> Path:
        """The product, when it is an adapter."""
        return self.path / "adapter.safetensors"

    @property
    def model(self) -> Path:
        """The product, when it is whole weights: a diffusers folder with the changed components."""
        return self.path / "model"

    @property
    def product(self) -> Path | None:
        """The product that is there, if the run is finished."""
        return next((path for path in (self.adapter, self.model) if path.exists()), None)

    def plan(self) -> TrainingPlan:
        """The plan the run was started with. Raises ResumeError when it cannot be read."""
        try:
            return plan_from_json(self.plan_file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ResumeError(f"{self.path} has no {self.plan_file.name}.", hint=_name_a_run(self.path)) from error
        except (ValueError, TypeError, KeyError) as error:
            raise ResumeError(f"{self.plan_file} cannot be read: {error}") from error

    def check(self) -> None:
        """Raises ResumeError when this folder is no run."""
        if not self.path.is_dir():
            raise ResumeError(f"There is no run {self.path}.", hint=_name_a_run(self.path))
        if not self.recipe.is_file():
            raise ResumeError(f"{self.path} is not a run: it has no recipe.yaml.", hint=_name_a_run(self.path))

    def facts(self) -> dict[str, Any]:
        """environment.json as data; empty when it is missing."""
        try:
            document: dict[str, Any] = json.loads(self.environment.read_text(encoding="utf-8"))
            return document
        except (OSError, ValueError):
            return {}


def _name_a_run(path: Path) -> str:
    """The line to type when `path` is no run: the nearest run that is there, else what a run looks like."""
    around = [folder.parent for root in (path, path.parent, Path("runs")) for folder in root.glob("*/recipe.yaml")]
    near = closest(path.name, [folder.name for folder in around], count=1)
    found = next((folder for folder in around if near and folder.name == near[0]), around[-1] if around else None)
    return f"Did you mean --resume {found}?" if found else "Name the folder that persona train printed: --resume FOLDER"


def new_run(wanted: Path | None, parent: Path, name: str) -> RunFolder:
    """Make a run's folder: `wanted` (must not hold anything yet), or the next free `parent/name-NNN`."""
    with clear_disk_errors(wanted or parent):
        if wanted is not None:
            if wanted.is_dir() and any(not path.name.startswith(".") for path in wanted.iterdir()):
                raise OutputExists(
                    f"{wanted} is there already and not empty.",
                    hint=f"Go on with it: persona train --resume {wanted}"
                    if RunFolder(wanted).recipe.is_file()
                    else "Choose another folder: --output FOLDER",
                )
            if os.path.lexists(wanted) and not wanted.is_dir():
                raise OutputExists(f"{wanted} is a file.", hint="Choose another folder: --output FOLDER")
            wanted.mkdir(parents=True, exist_ok=True)
            return RunFolder(wanted)
        parent.mkdir(parents=True, exist_ok=True)
        for number in range(1, 100000):
            path = parent / f"{name}-{number:03d}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return RunFolder(path)
    raise OutputExists(f"{parent} holds too many runs.", hint="Choose a folder yourself: --output FOLDER")


_BEFORE = ("recipe.yaml", "plan.json", "environment.json", "worker.log", ".lock")
"""What a run has before its first picture or step."""


def discard(run: RunFolder) -> None:
    """Take a run away again that was refused before its first picture or step; one that has made something is kept."""
    made = {path.name for path in run.path.iterdir()} - set(_BEFORE)
    if made:
        return
    for name in _BEFORE:
        (run.path / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        run.path.rmdir()


@contextlib.contextmanager
def sole_writer(run: RunFolder) -> Iterator[None]:
    """Hold the run for this process, and clear away what killed ones left half-written.

    Raises TrainingError when another process is training it. Where files cannot be locked, nobody is kept out."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    file = run.path / ".lock"
    lock = -1
    try:
        while lock < 0 or not _is_still(file, lock):  # whoever held it before took the file away
            if lock >= 0:
                os.close(lock)
                lock = -1
            with clear_disk_errors(run.path):
                lock = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TrainingError(
                    f"{run.path} is being trained by another process.", hint="Wait for it, or stop it with Ctrl-C there"
                ) from error
            except OSError:
                break  # a file system without locks
        _clear_leftovers(run)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.unlink()
    finally:
        if lock >= 0:
            os.close(lock)


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _clear_leftovers(run: RunFolder) -> None:
    hidden = [
        path
        for folder in (run.path, run.checkpoints, run.path / "cache", *run.samples.glob("step-*"))
        for path in folder.glob(".*")
    ]
    for path in (*hidden, *run.checkpoints.glob("unusable-*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != ".lock":
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def clear_disk_errors(path: Path, *, elsewhere: str = "--output FOLDER") -> Iterator[None]:
    """Turn a full disk, a read-only folder and the like into one clear line; `elsewhere` is what to type to write to
    another place."""
    try:
        yield
    except OSError as error:
        if isinstance(error, PersonaError):
            raise
        raise _in_words(error, path, elsewhere) from error


_FULL = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "Your disk quota is used up",
    errno.EFBIG: "The disk takes no file as large as this",
}


def _in_words(error: OSError, path: Path, elsewhere: str) -> UnwritableOutput:
    if error.errno in _FULL:
        run = next((folder for folder in (path, *path.parents) if RunFolder(folder).recipe.is_file()), None)
        kept = " What was saved before is whole." if run else ""
        then = f"go on with: persona train --resume {run}" if run else "type the same again"
        return UnwritableOutput(f"{_FULL[error.errno]}: {path} was not written.{kept}", hint=f"Make room, then {then}")
    return UnwritableOutput(
        f"{path} cannot be written: {error.strerror or error}.", hint=f"Choose another place: {elsewhere}"
    )


def write_atomically(path: Path, content: bytes, *, elsewhere: str = "--output FOLDER") -> None:
    """Replace a file of a run by `content`, whole or not at all. `elsewhere` as in `clear_disk_errors`."""
    with clear_disk_errors(path, elsewhere=elsewhere):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_plan(run: RunFolder, plan: TrainingPlan) -> None:
    """Keep the plan beside the run."""
    write_atomically(run.plan_file, plan_to_json(plan).encode())


def write_facts(run: RunFolder, facts: Mapping[str, Any]) -> None:
    """Keep versions and digests beside the run."""
    write_atomically(run.environment, json.dumps(facts, indent=1, ensure_ascii=False).encode())


def write_state(path: Path, state: Mapping[str, Array]) -> None:
    """Write `Session.state()` to a file. Raises NotFinite for trained values that are infinite or no numbers: such a
    checkpoint would be good for nothing."""
    from safetensors.numpy import save_file

    if any(name.startswith("value/") and not np.isfinite(values).all() for name, values in state.items()):
        raise NotFinite("The trained weights are not finite any more.")
    arrays = {name: np.asarray(values, order="C") for name, values in state.items()}
    _save(path, lambda path: save_file(arrays, path))


def save_checkpoint(run: RunFolder, step: int, write: Callable[[Path], None], *, keep_last: int) -> Path:
    """Write `checkpoints/step-NNNNNN` whole, then drop all but the newest `keep_last`.

    `write` writes the state to the file it is given, and raises what `write_state` raises. The folder is built under a
    temporary name, synced, and renamed."""
    final = run.checkpoints / f"step-{step:06d}"
    temporary = run.checkpoints / f".step-{step:06d}.{os.getpid()}"
    with clear_disk_errors(final):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary / "state.safetensors")
            (temporary / "progress.json").write_text(json.dumps({"step": step}), encoding="utf-8")
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            if final.exists():  # the same step again, after an extension or a second save: the newer one wins
                shutil.rmtree(final)
            temporary.rename(final)
            _sync(run.checkpoints)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(run)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _save(path: Path, write: Any) -> None:
    try:
        write(path)
    except Exception as error:  # safetensors wraps the system's error in its own type; its number is in the text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(run: RunFolder) -> list[Path]:
    """The whole checkpoints, oldest first."""
    if not run.checkpoints.is_dir():
        return []
    return sorted(path for path in run.checkpoints.glob("step-*") if (path / "progress.json").is_file())


def load_step(path: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(json.loads((path / "progress.json").read_text(encoding="utf-8"))["step"])


def load_checkpoint(path: Path) -> tuple[int, dict[str, Array]]:
    """(step, state) of a checkpoint. Raises ResumeError when it is damaged."""
    from safetensors.numpy import load_file

    try:
        return load_step(path), load_file(path / "state.safetensors")
    except Exception as error:
        raise ResumeError(
            f"The checkpoint {path} cannot be read: {error}",
            hint=f"Take it away, and the one before it is used: rm -r {path}",
        ) from error
