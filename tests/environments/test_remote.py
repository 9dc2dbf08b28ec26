"""A session behind a pipe is the session itself: its answers, errors, notes; and what happens when its worker dies."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from persona.core.host.contracts import Runtime, SampleRequest
from persona.core.host.errors import (
    BackendMissing,
    ConversionError,
    ResumeError,
    TrainingError,
    UnwritableOutput,
    UsageError,
)
from persona.core.training.batch import Batch
from persona.core.training.plan import Stream, TrainingPlan, Weights
from persona.environments.remote import RemoteBackend
from persona.environments.worker import surroundings
from persona.hub.bases import open_base
from persona.runs.steps import state_writer
from tests.environments.conftest import alive
from tests.kept_workers import kept_workers

PLAN = TrainingPlan("full", (Weights("unet", 1e-2, ("conv_out.bias",)),), (Stream("pictures"),), steps=4)
TRAIN = ("train", "--plugin", "full", "--target", "conv_out", "--backend", "stub", "--batch", 2, "--steps", 6,
         "--save-every", 2, "--sample-steps", 1, "--prompt", "a toy")  # fmt: skip


def batch(seed: int) -> Batch:
    random = np.random.default_rng(seed)
    numbers = {name: random.random(2).astype(np.float32) for name in ("a", "s", "p", "q", "w")}
    latents, noise = random.normal(size=(2, 2, 16, 8, 8)).astype(np.float32)
    return Batch(latents, noise, np.arange(2), **numbers)


@pytest.fixture
def session(stub: RemoteBackend, tmp_path: Path) -> Any:
    opened = stub.open(open_base("mini"), PLAN, Runtime(log=tmp_path / "worker.log"))
    yield opened
    opened.close()


def test_it_answers_as_the_session_in_this_process_would(session: Any, stub_is_known: None) -> None:
    import stub as module

    here = module.StubBackend().open(open_base("mini"), PLAN, Runtime())
    for number in range(3):
        np.testing.assert_array_equal(session.accumulate(batch(number)), here.accumulate(batch(number)))
        assert session.update([1e-2], 1.0) == here.update([1e-2], 1.0)
    for name, value in here.state().items():
        np.testing.assert_array_equal(session.state()[name], value)
    request = SampleRequest(("a", "b"), (0, 1), width=16, height=16)
    np.testing.assert_array_equal(session.sample(request), here.sample(request))
    (mine,), (theirs,) = (s.product().components["unet"].items() for s in (here, session))
    assert mine[0] == theirs[0]
    np.testing.assert_array_equal(theirs[1].read(), mine[1].read())
    assert (theirs[1].dtype, theirs[1].shape) == (mine[1].dtype, mine[1].shape)
    session.load_state(here.state())


def test_it_has_the_methods_that_the_session_has_and_no_others(session: Any) -> None:
    assert hasattr(session, "evaluate")
    assert not hasattr(session, "determinism")
    assert session.back({("a", 1): [None, 2.5]}) == {("a", 1): [None, 2.5]}
    with pytest.raises(AttributeError):
        session.no_such_method()


def test_it_works_in_another_process_that_sees_no_package_of_this_one(session: Any, tmp_path: Path) -> None:
    process, torch, _ = session.where()
    assert process == session.surroundings["worker"]["process"] != os.getpid()
    assert not torch
    session.close()
    assert not alive(process)


def test_errors_come_back_as_what_they_were(session: Any) -> None:
    with pytest.raises(ConversionError, match="no room") as told:
        session.fails("persona")
    assert told.value.hint == "make room"
    with pytest.raises(TrainingError, match="ZeroDivisionError: 0/0"):
        session.fails("other")
    with pytest.raises(ResumeError):
        session.load_state({})
    assert session.back(1) == 1  # and it goes on
    assert session.notes == ["opened", "persona", "other"]


def test_what_libraries_print_is_in_the_log_and_nowhere_else(
    session: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingError):
        session.fails("other")
    log = (tmp_path / "worker.log").read_text()
    assert "chatter of a library\nchatter of its C part\n" in log
    assert "ZeroDivisionError" in log  # with its traceback
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_is_killed_is_told_with_its_last_words(session: Any, tmp_path: Path) -> None:
    os.kill(session.where()[0], signal.SIGKILL)
    with pytest.raises(TrainingError, match="stub worker was killed by SIGKILL") as told:
        session.back(1)
    assert "memory" in told.value.message
    assert "chatter of its C part" in told.value.message
    assert told.value.hint == f"All it said is in {tmp_path / 'worker.log'}."


def test_a_worker_that_ends_by_itself_is_told_with_its_code(session: Any) -> None:
    with pytest.raises(TrainingError, match="ended with exit code 7"):
        session.exits()


def test_a_worker_that_dies_before_it_takes_its_log_is_told_too(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'libpaddle.so: cannot open shared object file' >&2\nexit 3\n")
    broken.chmod(0o755)
    backend = RemoteBackend("stub", "", broken)
    with pytest.raises(TrainingError, match=r"(?s)exit code 3\..*libpaddle\.so: cannot open"):
        backend.open(open_base("mini"), None, Runtime(log=tmp_path / "worker.log"))


def test_what_cannot_be_sent_is_not_half_sent(session: Any) -> None:
    with pytest.raises(TypeError, match="a object cannot be sent"):
        session.back(object())
    assert session.back(1) == 1


def test_an_interrupt_of_the_terminal_does_not_reach_the_worker(session: Any) -> None:
    os.kill(session.where()[0], signal.SIGINT)
    assert session.back("still here") == "still here"


def test_the_worker_ends_with_its_parent(stub_python: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from persona.environments.remote import RemoteBackend\n"
        "from persona.core.host.contracts import Runtime; from persona.hub.bases import open_base\n"
        f"backend = RemoteBackend('stub', '', Path({str(stub_python)!r}))\n"
        "session = backend.open(open_base('mini'), None, Runtime())\n"
        "print(session.surroundings['worker']['process'], flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert alive(worker)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not alive(worker):
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def test_a_worker_can_be_kept_for_the_next_session(stub: RemoteBackend, stub_python: Path, tmp_path: Path) -> None:
    base = open_base("mini")
    with kept_workers():
        first = stub.open(base, PLAN, Runtime(log=tmp_path / "first.log"))
        process = first.where()[0]
        first.accumulate(batch(1))
        first.close()
        assert alive(process)
        second = RemoteBackend("stub", "", stub_python).open(base, PLAN, Runtime(log=tmp_path / "second.log"))
        assert second.where()[0] == process
        assert float(second.state()["step"]) == 0  # nothing is left of the first
        assert "chatter" in (tmp_path / "second.log").read_text()
        with pytest.raises(TrainingError, match="exit code 7"):
            second.exits()
        second.close()
        third = stub.open(base, None, Runtime())  # the dead one is not taken
        process = third.where()[0]
        third.close()
        assert alive(process)
    assert not alive(process)


def test_a_python_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BackendMissing, match="cannot be started") as told:
        RemoteBackend("paddle", "", tmp_path / "python").capabilities("cpu")
    assert told.value.hint == "Build it again: persona backends setup paddle"


def test_a_python_without_what_the_worker_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"  # of an environment with nothing in it
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    with pytest.raises(BackendMissing, match=r"python has no package \w+\.") as told:
        RemoteBackend("paddle", "", python).capabilities("cpu")
    assert told.value.hint == "persona backends setup paddle"
    monkeypatch.setenv("PERSONA_PADDLE_PYTHON", str(python))
    with pytest.raises(BackendMissing) as told:
        RemoteBackend("paddle", "", python).capabilities("cpu")
    assert told.value.hint == (
        f"PERSONA_PADDLE_PYTHON names {python}. Install it there, or take persona's own: "
        "unset PERSONA_PADDLE_PYTHON; persona backends setup paddle"
    )


def test_a_python_of_ones_own_without_the_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("paddle") is not None:
        pytest.skip("paddle is installed here")
    monkeypatch.setenv("PERSONA_PADDLE_PYTHON", sys.executable)
    backend = RemoteBackend("paddle", "", Path(sys.executable).absolute())
    with pytest.raises(BackendMissing, match=r"not installed: .*paddle") as told:
        backend.capabilities("cpu")
    backend.close()
    assert told.value.hint.startswith(f"PERSONA_PADDLE_PYTHON names {sys.executable}. Install it there")


def test_a_worker_must_have_loaded_its_own_framework_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "paddle", "mindspore"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(BackendMissing, match="has loaded no framework, not paddle alone"):
        surroundings("paddle")
    monkeypatch.setitem(sys.modules, "paddle", object())
    assert surroundings("paddle")["worker"]["frameworks_loaded"] == ["paddle"]
    monkeypatch.setitem(sys.modules, "torch", object())
    with pytest.raises(BackendMissing, match="torch and paddle, not paddle alone"):
        surroundings("paddle")


def test_a_run_elsewhere_leaves_a_whole_run_folder(
    persona_: Callable[..., Any], stub_is_known: None, toys: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    answer = persona_(*TRAIN, "--data", toys, "--output", run)
    assert answer.code == 0, answer.err
    facts = json.loads((run / "environment.json").read_text())
    assert facts["backend"] == "stub"
    assert facts["worker"]["frameworks_loaded"] == []
    assert facts["packages"]["numpy"] == np.__version__
    assert "chatter of its C part" in (run / "worker.log").read_text()
    assert "chatter" not in answer.out + answer.err
    assert (run / "model" / "unet").is_dir()
    assert len(list((run / "samples").glob("step-*/00.png"))) == 3


def test_the_worker_writes_its_state_itself(session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session.accumulate(batch(1))
    session.update([1e-2], 1.0)
    expected = session.state()
    monkeypatch.setattr(type(session), "_ask", None)  # nothing of the session travels
    state_writer(session)(tmp_path / "state.safetensors")
    found = load_file(tmp_path / "state.safetensors")
    assert found.keys() == expected.keys() and len(found) > 1
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    with pytest.raises(UnwritableOutput, match="cannot be written: No such file"):
        state_writer(session)(tmp_path / "nowhere" / "state.safetensors")


def test_a_killed_worker_leaves_the_last_checkpoint_whole_and_a_resumed_run_is_the_same_run(
    persona_: Callable[..., Any], stub_is_known: None, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert persona_(*TRAIN, "--data", toys, "--output", straight).code == 0
    monkeypatch.setenv("STUB_KILLED_AT", "4")
    answer = persona_(*TRAIN, "--data", toys, "--output", killed)
    assert answer.code == 1
    assert "Step 3 of 6" in answer.err or "Step 4 of 6" in answer.err, answer.err
    assert "killed by SIGKILL" in answer.err
    assert "the last words" in answer.err
    assert f"persona train --resume {killed}" in answer.err
    assert "Traceback" not in answer.err
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.delenv("STUB_KILLED_AT")
    answer = persona_("train", "--resume", killed)
    assert answer.code == 0, answer.err
    name = "model/unet/diffusion_pytorch_model.safetensors"
    assert (killed / name).read_bytes() == (straight / name).read_bytes()


def test_generate_and_export_work_elsewhere_too(
    persona_: Callable[..., Any], stub_is_known: None, toys: Path, tmp_path: Path
) -> None:
    answer = persona_("generate", "--prompt", "a", "--backend", "stub", "--output", tmp_path / "pictures")
    assert answer.code == 0, answer.err
    assert (tmp_path / "pictures" / "0000.png").is_file()
    run = tmp_path / "run"
    assert persona_(*TRAIN, "--data", toys, "--output", run).code == 0
    answer = persona_("export", f"{run}:4")
    assert answer.code == 0, answer.err
    assert (run / "model-000004" / "unet").is_dir()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--ema-decay", 0.9), "--ema-decay: the backend stub on cpu cannot do this (moving averages"),
        (("--precision", "bf16"), "--precision bf16: the backend stub on cpu cannot do this"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_it_cannot_do_is_refused_before_a_run_is_made(
    flags: tuple[Any, ...], said: str, persona_: Callable[..., Any], stub_is_known: None, toys: Path, tmp_path: Path
) -> None:
    answer = persona_(*TRAIN, "--data", toys, "--output", tmp_path / "run", "--device", "cpu", *flags)
    assert answer.code == 2
    assert said in answer.err
    assert "persona backends" in answer.err
    assert not (tmp_path / "run").exists()


def test_several_devices_are_refused(
    persona_: Callable[..., Any], stub_is_known: None, toys: Path, tmp_path: Path
) -> None:
    answer = persona_(*TRAIN, "--data", toys, "--output", tmp_path / "run", "--devices", 2)
    assert (answer.code, "The backend stub runs on one device" in answer.err) == (2, True)
    assert not (tmp_path / "run").exists()


def test_a_sampler_it_has_not_is_refused_with_those_it_has(
    persona_: Callable[..., Any], stub_is_known: None, tmp_path: Path
) -> None:
    answer = persona_("generate", "--prompt", "a", "--backend", "stub", "--sampler", "lcm", "--output", tmp_path / "p")
    assert answer.code == 2
    assert "--sampler lcm: the backend stub on auto cannot do this" in answer.err
    assert "take one of ddim" in answer.err


def test_an_optimizer_of_another_framework_is_refused() -> None:
    import dataclasses

    from persona.core.host.capabilities import refuse_optimizer

    prodigy = dataclasses.replace(PLAN.optimizer, name="prodigy", classes={"torch": "prodigyopt:Prodigy"})
    refuse_optimizer(dataclasses.replace(PLAN, optimizer=prodigy), "torch")
    with pytest.raises(UsageError, match="--optimizer prodigy is there for torch, not for paddle"):
        refuse_optimizer(dataclasses.replace(PLAN, optimizer=prodigy), "paddle")
