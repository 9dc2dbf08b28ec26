"""What tests of runs in several processes look at."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from persona import api
from persona.core.host.errors import TrainingError
from persona.core.training.events import Event, Note, StepDone
from persona.core.training.run import RunFolder, checkpoints, load_checkpoint, load_step
from persona.environments.remote import BOOT
from persona.runs import launching
from persona.runs.link import VARIABLE


def losses(run: RunFolder) -> list[list[float]]:
    """Of every step: the loss and those of its streams."""
    with run.metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [[float(value) for name, value in row.items() if name.startswith("loss")] for row in rows]


def column(run: RunFolder, name: str) -> list[float]:
    """One figure of every step."""
    with run.metrics.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def difference(one: Path, other: Path) -> float:
    """How far apart two checkpoints or adapters are: the largest relative Frobenius norm of a kind of array (values,
    moments). Element by element says less: AdamW's first steps are as large for a gradient of 1e-9, which is rounding,
    as for any other."""
    arrays, others = (load_file(path) for path in (one, other))
    assert arrays.keys() == others.keys()
    kinds = {name.partition("/")[0] if "/" in name else "" for name in arrays}

    def of(kind: str, kept: dict[str, Any]) -> Any:
        return np.concatenate([kept[name].ravel().astype(float) for name in sorted(kept) if name.startswith(kind)])

    return max(
        float(np.linalg.norm(of(kind, arrays) - of(kind, others)) / np.linalg.norm(of(kind, others))) for kind in kinds
    )


def what_two_found(backend: Any, room: Path, folder: Path) -> dict[str, Any]:
    """What `two_processes.py` of a room tells from two processes, which has to be the same from both. One of them lets
    the other wait for longer than the frameworks' collectives would."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(room)]),
        "PERSONA_TEST_RESULT": str(folder),
        "PERSONA_TEST_WAIT": "31",
        "OMP_NUM_THREADS": "1",
    }
    line = backend.launch_line(2, str(BOOT), "two_processes", folder)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert first == second
    return dict(first)


def is_running(pid: int) -> bool:
    """Whether a process is there and is not merely waiting to be reaped."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def left_running(watch: Any) -> Iterator[str]:
    """What is still there of all that a launcher has started: processes that were told its command's port."""
    sign = f"{VARIABLE}=".encode()
    port = f"{watch.server.getsockname()[1]}:{watch.token}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if sign + port in (folder / "environ").read_bytes() and is_running(int(folder.name)):
                yield (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue


def two_processes_are_one_until_one_is_killed(
    method: str, pictures: Path, straight: RunFolder, folder: Path, monkeypatch: pytest.MonkeyPatch, **words: Any
) -> RunFolder:
    """Make the run of `straight` (its first steps) in two processes, kill the second one, and look at all that is left.
    `words` are those of `straight`; the run that was killed is returned."""
    seen: list[Event] = []
    watches: list[Any] = []
    real, end = launching._Watch.__post_init__, launching._Watch.end
    monkeypatch.setattr(launching._Watch, "__post_init__", lambda self: (watches.append(self), real(self))[1])
    left: list[str] = []
    monkeypatch.setattr(launching._Watch, "end", lambda self: (end(self), left.extend(left_running(self)))[0])
    steps = len(losses(straight))

    def kill_behind_the_last(event: Event) -> None:
        seen.append(event)
        if isinstance(event, StepDone) and event.step == steps + 1:
            assert len(list(left_running(watches[0]))) >= 3, "a launcher and two processes"
            os.kill(next(process.pid for process in watches[0].processes if process.rank == 1), signal.SIGKILL)

    run = RunFolder(folder)
    endless = words | {"steps": 100_000, "devices": 2, "sample_every": 100_000, "output": str(folder)}
    with pytest.raises(TrainingError, match="Process 1 of 0 to 1 ended without a word") as stopped:
        api.train(method, pictures, emit=kill_behind_the_last, **endless)
    assert "the last checkpoint is whole" in stopped.value.message
    assert stopped.value.hint == f"Go on with: persona train --resume {run.path}"
    assert not left, left
    notes = [event.text for event in seen if isinstance(event, Note)]
    assert any("2 samples a step and stream as on one device, 1 on each" in note for note in notes)

    np.testing.assert_allclose(losses(run)[:steps], losses(straight), rtol=1e-5)
    for path in checkpoints(straight):
        assert difference(run.checkpoints / path.name / "state.safetensors", path / "state.safetensors") < 1e-5
    step, state = load_checkpoint(checkpoints(run)[-1])
    assert step >= steps and state and run.product is None
    return run


def two_processes_and_one_again(backend: str, pictures: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA in two processes on the CPU is the run in one, ends cleanly when one is killed, and goes on in one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words: dict[str, Any] = {"rank": 2, "learning_rate": 1e-2, "prompt": "a toy", "batch": 2, "save_every": 1,
                             "keep_last": 100, "seed": 5, "sample_steps": 1, "device": "cpu",
                             "backend": backend}  # fmt: skip
    straight = api.train("lora", pictures, output=str(folder / "one"), steps=3, **words)
    run = two_processes_are_one_until_one_is_killed("lora", pictures, straight, folder / "two", monkeypatch, **words)
    steps = load_step(checkpoints(run)[-1]) + 1
    ended = api.resume(run, devices=1, steps=steps)
    assert ended.product and len(losses(ended)) == steps
