"""A run in two processes on the CPU is the run in one, and ends cleanly when one is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mindone", reason="the MindSpore environment is not here: persona backends setup mindspore")

from persona import api
from persona.core.training.run import checkpoints, load_step
from tests.several import losses, two_processes_are_one_until_one_is_killed

FEW = {"rank": 2, "learning_rate": 1e-2, "prompt": "a toy", "batch": 2, "save_every": 1, "keep_last": 100, "seed": 5,
       "sample_steps": 1, "device": "cpu", "backend": "mindspore"}  # fmt: skip


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_until_one_is_killed(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    straight = api.train("lora", toys, output=str(tmp_path / "one"), steps=3, **FEW)
    run = two_processes_are_one_until_one_is_killed("lora", toys, straight, tmp_path / "two", monkeypatch, **FEW)
    steps = load_step(checkpoints(run)[-1]) + 1
    ended = api.resume(run, devices=1, steps=steps)
    assert ended.product and len(losses(ended)) == steps
