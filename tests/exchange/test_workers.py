"""Batches whose files are converted in processes of their own: what the first process learns of them."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from persona.api import host
from persona.core.host.errors import NoPlace
from persona.exchange import workers
from persona.exchange.batch import Job, convert_all
from persona.exchange.convert import Wish, convert
from persona.exchange.report import Report

KOHYA = Path(__file__).parents[1] / "fixtures/torch/kohya_sd15_linear/kohya_sd15_linear.safetensors"


def test_errors_come_back_from_other_processes_with_their_hints(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    for name in ("b", "c"):
        shutil.copy(KOHYA, tmp_path / f"{name}.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    (out / "b.safetensors").write_bytes(b"mine")
    jobs = [Job((path,), out / path.name) for path in sorted(tmp_path.glob("*.safetensors"))]
    outcomes = {one.job.sources[0].stem: one for one in convert_all(jobs, Wish(to="kohya"), host(), lambda one: None)}
    assert "is empty" in str(outcomes["a"].error)
    assert "exists already" in str(outcomes["b"].error)
    assert "--force" in outcomes["b"].error.hint
    assert outcomes["c"].report.written == (out / "c.safetensors",)


def test_an_error_of_any_kind_is_told(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise NoPlace("unet.x", "nowhere")

    monkeypatch.setattr("persona.exchange.batch.convert", refuse)
    jobs = [Job((tmp_path / name,), tmp_path / f"{name}.out") for name in "ab"]
    outcomes = convert_all(jobs, Wish(to="kohya"), host(), lambda one: None)
    assert [str(one.error) for one in outcomes] == [str(NoPlace("unet.x", "nowhere"))] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="threads elsewhere: there is no process to kill")
def test_a_killed_process_loses_its_own_file_alone(tmp_path, monkeypatch):
    def dies(sources, *_):
        if sources[0].stem == "3":
            os.kill(os.getpid(), signal.SIGKILL)
        return Report(())

    monkeypatch.setattr(workers, "can_fork", lambda: True)
    monkeypatch.setattr("persona.exchange.batch.convert", dies)
    jobs = [Job((tmp_path / str(n),), tmp_path / f"{n}.out") for n in range(12)]
    outcomes = convert_all(jobs, Wish(to="kohya"), host(), lambda one: None)
    assert len(outcomes) == 12
    assert [one.job.sources[0].stem for one in outcomes if one.error is not None] == ["3"]
    assert "was killed" in str(next(one.error for one in outcomes if one.error is not None))


def test_what_a_conversion_reports_is_the_same_from_another_process(tmp_path, monkeypatch):
    told = []
    for number, forks in enumerate([True, False]):
        monkeypatch.setattr(workers, "can_fork", lambda forks=forks: forks and sys.platform == "linux")
        jobs = [Job((KOHYA,), tmp_path / f"{number}{name}.safetensors") for name in "ab"]
        outcomes = convert_all(jobs, Wish(to="diffusers"), host(), lambda one: None)
        first = next(one for one in outcomes if one.job == jobs[0])
        told.append({**first.report.as_document(), "written": [path.name[1:] for path in first.report.written]})
    assert told[0] == told[1]
    alone = convert((KOHYA,), tmp_path / "2a.safetensors", Wish(to="diffusers"), host()).as_document()
    assert told[0] == {**alone, "written": ["a.safetensors"]}


@pytest.mark.skipif(sys.platform != "linux", reason="threads elsewhere: there is no process to kill")
def test_a_batch_whose_processes_are_all_killed_ends(monkeypatch):
    monkeypatch.setattr(workers, "can_fork", lambda: True)
    ended = list(workers.side_by_side(lambda number: os.kill(os.getpid(), signal.SIGKILL), 40))
    assert sorted(ended) == [(number, None) for number in range(40)]
