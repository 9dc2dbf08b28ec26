"""`make test-backends`: every method on every framework that has an environment of its own, on mini, from the command
line of an environment that has torch and nothing of theirs. The same recipe must give what torch gives.

`make test` skips this where the environments are not set up; with PERSONA_REQUIRE_BACKENDS=1 that is a failure."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from persona import api
from persona.environments.frameworks import FRAMEWORKS
from persona.environments.places import variable_of
from persona.environments.state import find
from tests.kept_workers import kept_workers
from tests.several import losses as all_losses
from tests.several import two_processes_are_one_until_one_is_killed

SURROUNDINGS = {
    name: os.environ[name] for name in ("PERSONA_DATA", *map(variable_of, FRAMEWORKS)) if name in os.environ
}
STATES = {name: find(framework) for name, framework in FRAMEWORKS.items()}  # before a test hides the user's folders
DIALECTS = {"paddle": ("ppdiffusers", ".pdparams"), "mindspore": ("mindone", ".ckpt")}
COMMON = ("--steps", 4, "--batch", 2, "--save-every", 2, "--keep-last", 9, "--sample-steps", 2, "--seed", 5)
METHODS: dict[str, tuple[Any, ...]] = {
    "lora": ("--plugin", "lora", "--rank", 4, "--train-text-encoder", "--dora", "--prompt", "a toy"),
    "dreambooth": ("--plugin", "dreambooth", "--lora", "--conv-rank", 2, "--class-pictures", 1, "--class", "toy"),
    "textual-inversion": ("--plugin", "textual-inversion", "--placeholder", "<toy>", "--initializer", "robot"),
    "full": ("--plugin", "full", "--target", "attn2", "--ema-decay", 0.9, "--prompt", "a toy"),
}
PROMPT = ("--prompt", "a red apple", "--steps", 4, "--seed", 3)


@pytest.fixture(scope="module", params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a framework whose environment is there; one worker serves all its tests."""
    name: str = request.param
    state = STATES[name]
    if not state.is_usable:
        why = f"{state.reason}; set it up: {state.hint}, or all: make test-backends"
        if os.environ.get("PERSONA_REQUIRE_BACKENDS"):
            pytest.fail(why)
        pytest.skip(why)
    with kept_workers():
        yield name


@pytest.fixture
def typed(
    framework: str, persona_: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> Callable[..., Any]:
    """The command line, which sees the environments that are set up; a command has to succeed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, value in SURROUNDINGS.items():
        monkeypatch.setenv(name, value)
    if "PERSONA_DATA" not in SURROUNDINGS:
        monkeypatch.delenv("PERSONA_DATA", raising=False)

    def run(*words: object) -> Any:
        answer = persona_(*words)
        assert answer.code == 0, answer.err
        return answer

    return run


def losses(run: Path) -> list[float]:
    """The loss of every step."""
    with (run / "metrics.csv").open(newline="") as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


def product(run: Path) -> dict[str, bytes]:
    """The bytes of what was trained, by file."""
    files = [run / "adapter.safetensors"] if (run / "adapter.safetensors").is_file() else run.glob("model/**/*.safet*")
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def picture(folder: Path) -> Any:
    """The only picture in a folder, [height, width, 3]."""
    (file,) = folder.glob("*.png")
    return np.asarray(Image.open(file).convert("RGB"), np.float64)


def psnr(one: Any, other: Any) -> float:
    """Peak signal-to-noise ratio in decibels."""
    error = float(((one - other) ** 2).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_on_another_framework(
    method: str, framework: str, typed: Callable[..., Any], toys: Path, tmp_path: Path
) -> None:
    run, on_torch = tmp_path / "run", tmp_path / "torch"
    words = ("train", *METHODS[method], *COMMON, "--data", toys, "--device", "cpu")

    typed(*words, "--backend", framework, "--output", run)
    told = json.loads((run / "environment.json").read_text())
    assert told["backend"] == framework
    assert told["worker"]["frameworks_loaded"] == [framework]  # and not torch
    for package, version in FRAMEWORKS[framework].packages.items():
        if STATES[framework].state == "ready":
            assert told["packages"][package] == version
    assert "torch" not in told["packages"]

    typed(*words, "--backend", "torch", "--output", on_torch)
    np.testing.assert_allclose(losses(run), losses(on_torch), rtol=1e-4)

    whole = product(run)
    assert whole
    shutil.rmtree(run / "checkpoints" / "step-000004")
    typed("train", "--resume", run)
    assert product(run) == whole  # what was never stopped, bit for bit

    use = ("--base", run) if method == "full" else ("--adapter", run / "adapter.safetensors")
    typed("generate", *PROMPT, *use, "--backend", framework, "--output", tmp_path / "here", "--device", "cpu")
    typed("generate", *PROMPT, *use, "--backend", "torch", "--output", tmp_path / "there", "--device", "cpu")
    assert psnr(picture(tmp_path / "here"), picture(tmp_path / "there")) >= 40


def test_a_converted_adapter_comes_home(framework: str, typed: Callable[..., Any], toys: Path, tmp_path: Path) -> None:
    dialect, ending = DIALECTS[framework]
    run, converted = tmp_path / "run", tmp_path / f"converted{ending}"
    typed("train", "--plugin", "lora", "--rank", 4, "--alpha", 2, "--learning-rate", 1e-2, "--prompt", "a toy", *COMMON,
          "--data", toys, "--device", "cpu", "--backend", "torch", "--output", run)  # fmt: skip
    typed("convert", run / "adapter.safetensors", converted, "--to", dialect)
    pictures = {}
    for name, backend, adapter in (
        ("torch", "torch", run / "adapter.safetensors"),
        ("original", framework, run / "adapter.safetensors"),
        ("converted", framework, converted),
    ):
        typed("generate", *PROMPT, "--adapter", adapter, "--backend", backend, "--output", tmp_path / name)
        pictures[name] = picture(tmp_path / name)
    typed("generate", *PROMPT, "--backend", "torch", "--output", tmp_path / "without")
    assert psnr(pictures["torch"], picture(tmp_path / "without")) < 40  # the adapter does something
    assert psnr(pictures["original"], pictures["converted"]) >= 60
    assert psnr(pictures["original"], pictures["torch"]) >= 40


def test_a_checkpoint_of_one_framework_goes_on_in_another(
    framework: str, typed: Callable[..., Any], toys: Path, tmp_path: Path
) -> None:
    run, on_torch = tmp_path / "run", tmp_path / "torch"
    words = ("train", "--plugin", "lora", "--rank", 4, "--prompt", "a toy", *COMMON, "--data", toys, "--device", "cpu")
    typed(*words, "--backend", "torch", "--output", on_torch)
    typed(*words, "--backend", framework, "--output", run)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    typed("train", "--resume", run, "--backend", "torch")
    np.testing.assert_allclose(losses(run), losses(on_torch), rtol=1e-4)
    assert len(losses(run)) == 4


@pytest.mark.slow
def test_two_devices_elsewhere_make_the_run_of_one_until_one_is_killed(
    framework: str, typed: Callable[..., Any], toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"rank": 2, "prompt": "a toy", "batch": 2, "save_every": 1, "keep_last": 9, "sample_steps": 1, "seed": 5,
             "device": "cpu", "backend": framework}  # fmt: skip
    straight = api.train("lora", toys, output=str(tmp_path / "one"), steps=3, **words)
    run = two_processes_are_one_until_one_is_killed("lora", toys, straight, tmp_path / "two", monkeypatch, **words)
    told = json.loads(run.environment.read_text())
    assert told["worker"]["frameworks_loaded"] == [framework] and told["devices"] == 2
    typed("train", "--resume", run.path, "--devices", 1, "--steps", len(all_losses(run)) + 1)
    assert run.adapter.is_file()
