"""A run is a folder that can be understood, resumed, extended and shared.

    recipe.yaml        what was asked for, complete (can be trained again: persona train recipe.yaml)
    plan.json          what the method made of it
    environment.json   versions, device, base and data digests
    metrics.csv        one row a step
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
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.host.errors import OutputExists, PersonaError, ResumeError, TrainingError
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
            raise ResumeError(
                f"{self.path} is not a run: it has no {self.plan_file.name}.",
                hint="Name the folder that persona train printed, for example: --resume runs/dreambooth-001",
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise ResumeError(f"{self.plan_file} cannot be read: {error}") from error

    def facts(self) -> dict[str, Any]:
        """environment.json as data; empty when it is missing."""
        try:
            document: dict[str, Any] = json.loads(self.environment.read_text(encoding="utf-8"))
            return document
        except (OSError, ValueError):
            return {}


def new_run(wanted: Path | None, parent: Path, name: str) -> RunFolder:
    """Make a run's folder: `wanted` (must not hold anything yet), or the next free `parent/name-NNN`."""
    with clear_disk_errors(wanted or parent):
        if wanted is not None:
            if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
                raise OutputExists(
                    f"{wanted} is there already and not empty.",
                    hint=f"Go on with it (--resume {wanted}) or choose another --output",
                )
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


@contextlib.contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a read-only folder and the like into one clear line."""
    try:
        yield
    except OSError as error:
        if isinstance(error, PersonaError):
            raise
        place = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TrainingError(
                f"The disk is full: {place} could not be written. What was saved before is whole.",
                hint="Make room, then go on with: persona train --resume RUN",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise TrainingError(
                f"{place} cannot be written: {error.strerror}.", hint="Choose a folder of your own: --output FOLDER"
            ) from error
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file of a run by `content`, whole or not at all."""
    with clear_disk_errors(path):
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


def save_checkpoint(run: RunFolder, step: int, state: Mapping[str, Array], *, keep_last: int) -> Path:
    """Write `checkpoints/step-NNNNNN` whole, then drop all but the newest `keep_last`.

    `state` is `Session.state()`. The folder is built under a temporary name, synced, and renamed."""
    from safetensors.numpy import save_file

    final = run.checkpoints / f"step-{step:06d}"
    temporary = run.checkpoints / f".step-{step:06d}.{os.getpid()}"
    with clear_disk_errors(final):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            arrays = {name: np.ascontiguousarray(values) for name, values in state.items()}
            _save(temporary / "state.safetensors", lambda path: save_file(arrays, path))
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
    except Exception as error:  # safetensors wraps the system's error in its own type and loses its number
        if "No space left" in str(error) or "os error 28" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
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


def load_checkpoint(path: Path) -> tuple[int, dict[str, Array]]:
    """(step, state) of a checkpoint. Raises ResumeError when it is damaged."""
    from safetensors.numpy import load_file

    try:
        step = int(json.loads((path / "progress.json").read_text(encoding="utf-8"))["step"])
        return step, load_file(path / "state.safetensors")
    except Exception as error:
        raise ResumeError(
            f"The checkpoint {path} cannot be read: {error}",
            hint=f"Take an older one away from its place, or begin again: rm -r {path}",
        ) from error
