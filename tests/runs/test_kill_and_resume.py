"""A run that is killed at any moment and resumed is, bit for bit, the run that was never killed."""

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forked import start

ROOT = Path(__file__).parents[2]
SHARED = ["--steps", 12, "--batch", 1, "--save-every", 3, "--sample-every", 5, "--sample-steps", 1, "--seed", 7]
SHARED += ["--random-flip", "--no-center-crop", "--caption-dropout", 0.3, "--train-text-encoder"]
LORA = ["--plugin", "lora", "--prompt", "a photo of sks toy", "--dropout", 0.3, "--rank", 2, "--learning-rate", 1e-2]
DREAMBOOTH = ["--plugin", "dreambooth", "--class", "toy", "--class-pictures", 3, "--learning-rate", 1e-4]
METHODS = {"lora": [*LORA, *SHARED], "dreambooth": [*DREAMBOOTH, *SHARED]}


class Trial:
    """One run in its own folder with its own cache, killed as often as wanted."""

    def __init__(self, folder: Path, name: str, first: list[object]) -> None:
        self.run, self.log = folder / name, folder / f"{name}.log"
        self.environment = {"PERSONA_CACHE": str(folder / f"{name}-cache"), "OMP_NUM_THREADS": "1"}
        self.first = ["train", *first, "--output", self.run]

    def go(self, kill_at=None):
        """Start or go on, until it ends by itself or kills itself; the exit code."""
        process = self._started(kill_at)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.log.read_text()
        return process.exitcode

    def kill_after(self, text, seconds):
        """Start or go on, and kill it so long after it said this, unless it is finished before."""
        self.log.unlink(missing_ok=True)
        process = self._started(None)
        while process.exitcode is None and not (self.log.exists() and text in self.log.read_text()):
            time.sleep(0.005)
        time.sleep(seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.log.read_text()

    def is_finished(self):
        """Whether the run says that its product is that of its last step."""
        facts = self.run / "environment.json"
        return facts.is_file() and json.loads(facts.read_text()).get("product_steps") == 12

    def _started(self, kill_at):
        begun = (self.run / "recipe.yaml").is_file()
        words = ["train", "--resume", self.run] if begun else self.first
        return start(words, environment=self.environment, log=self.log, kill_at=kill_at)


def wait_for(text, process, log):
    """Wait until a running process has said this."""
    while process.exitcode is None:
        if log.exists() and text in log.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"it ended without saying {text!r}: {log.read_text() if log.exists() else ''}")


def everything(run):
    """What two equal runs have in common: every byte but times, places and the order of writing."""
    plan = json.loads((run / "plan.json").read_text())
    for stream in plan["streams"]:
        for picture in stream["pictures"]:
            picture["path"] = Path(picture["path"]).name
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
    kept = [run / "recipe.yaml", run / "sheet.png"]
    for folder in ("samples", "checkpoints", "model", "cache"):
        kept += sorted(path for path in (run / folder).rglob("*") if path.is_file())
    kept += [run / "adapter.safetensors"] if (run / "adapter.safetensors").is_file() else []
    return {"plan": plan, "metrics": rows} | {str(path.relative_to(run)): path.read_bytes() for path in kept}


def assert_equal(killed, straight):
    assert killed.keys() == straight.keys()
    for name in straight:
        assert killed[name] == straight[name], f"{name} differs"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        drawn = np.random.default_rng(number).integers(0, 256, (80, 96, 3), np.uint8)
        Image.fromarray(drawn).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data, tiny_sd1):
    """By method: the run that is never killed, and how many seconds it took."""
    folder, made = tmp_path_factory.mktemp("straight"), {}
    start(["--version"], environment={}, log=folder / "log").join()  # the imports of the fork server do not count

    def run(method):
        if method not in made:
            trial = Trial(folder, method, [*METHODS[method], "--data", data, "--base", tiny_sd1])
            begun = time.monotonic()
            assert trial.go() == 0
            made[method] = (everything(trial.run), time.monotonic() - begun)
        return made[method]

    return run


MOMENTS = {
    "lora": [
        ("os.fsync", 2),  # there is a recipe, and no plan yet
        ("persona.core.training.run.RunFolder.facts", 1),  # a resume that has only begun
        ("os.fsync", 3),  # the latents are made and not yet written
        ("persona.core.training.run._sync", 2),  # inside the first checkpoint
        ("pathlib.Path.rename", 1),  # the checkpoint is complete, and has not got its name yet
        ("shutil.rmtree", 5),  # an old checkpoint is about to go
        ("persona.runs.training.run_sheet", 1),
        ("persona.runs.training.write_product", 1),
        ("persona.runs.training.now", 1),  # the product is written, and nothing says so yet
    ],
    "dreambooth": [
        ("os.fsync", 5),  # the second class picture of three
        ("os.fsync", 2),  # the second again: it was made in a block with the others
        ("persona.core.training.run._sync", 2),
        ("shutil.rmtree", 4),
    ],
}


@pytest.mark.parametrize("method", METHODS)
def test_killed_between_any_two_writes_it_goes_on_to_the_same_bits(method, tmp_path, data, tiny_sd1, straight):
    expected, _ = straight(method)
    trial = Trial(tmp_path, method, [*METHODS[method], "--data", data, "--base", tiny_sd1])
    for moment in MOMENTS[method]:
        assert trial.go(kill_at=moment) == -signal.SIGKILL, f"{moment} was never reached"
    assert trial.go() == 0
    assert_equal(everything(trial.run), expected)


MARKS = ["loading the base", "latents", "sampling", *(f"step {step} of 12" for step in range(1, 13)), "checkpoint:"]


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments_it_goes_on_to_the_same_bits(method, tmp_path, data, tiny_sd1, straight):
    expected, seconds = straight(method)
    trial = Trial(tmp_path, method, [*METHODS[method], "--data", data, "--base", tiny_sd1])
    chance = random.Random(os.environ.get("PERSONA_KILL_SEED", "persona"))
    for place in sorted(chance.sample(range(len(MARKS)), 3)):
        if not trial.is_finished():
            trial.kill_after(MARKS[place], chance.uniform(0, seconds / 12))
    if not trial.is_finished():
        assert trial.go() == 0
    assert_equal(everything(trial.run), expected)


def test_the_first_interrupt_saves_the_step_and_the_second_stops_at_once(tmp_path, data, tiny_sd1, straight):
    expected, _ = straight("lora")
    trial = Trial(tmp_path, "lora", [*METHODS["lora"], "--data", data, "--base", tiny_sd1])

    def interrupt_when(text, times=1):
        arguments = ["train", "--resume", trial.run] if trial.run.exists() else trial.first
        process = start(arguments, environment=trial.environment, log=trial.log)
        wait_for(text, process, trial.log)
        for _ in range(times):
            with contextlib.suppress(ProcessLookupError):  # the step was done and saved before the second one came
                os.kill(process.pid, signal.SIGINT)
            time.sleep(0.05 if times > 1 else 0)
        process.join()
        said = trial.log.read_text()
        trial.log.unlink()
        return process.exitcode, said

    code, said = interrupt_when("step 1 of 12")
    assert code == 130
    assert "stopping after this step and saving; once more to stop at once" in said
    saved = sorted(path.name for path in (trial.run / "checkpoints").iterdir())
    step = int(saved[-1].removeprefix("step-"))
    assert f"\nStopped after step {step} of 12; it is saved.\n" in said
    assert f"  Go on with: persona train --resume {trial.run}\n" in said
    assert not (trial.run / "adapter.safetensors").exists()

    code, said = interrupt_when(f"step {step + 2} of 12", times=2)
    assert code == 130
    assert "Traceback" not in said
    assert trial.go() == 0
    assert_equal(everything(trial.run), expected)


def test_an_interrupt_before_the_first_step_stops_there_and_keeps_what_was_made(tmp_path, data, tiny_sd1, straight):
    expected, _ = straight("dreambooth")
    trial = Trial(tmp_path, "dreambooth", [*METHODS["dreambooth"], "--data", data, "--base", tiny_sd1])
    process = start(trial.first, environment=trial.environment, log=trial.log)
    wait_for("loading the base", process, trial.log)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert "Stopped before the first step; what was made so far is kept." in trial.log.read_text()
    assert trial.go() == 0
    assert_equal(everything(trial.run), expected)


def test_the_command_as_it_is_typed_answers_an_interrupt_with_130(tmp_path, data, tiny_sd1):
    words = [
        "train",
        *METHODS["lora"],
        "--steps",
        500,
        "--data",
        data,
        "--base",
        tiny_sd1,
        "--output",
        tmp_path / "r",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "persona", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    for line in process.stderr:
        if line.startswith("run: "):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert "Stopped before the first step" in rest
    assert "Traceback" not in rest


def test_two_processes_cannot_train_one_run(tmp_path, data, tiny_sd1, persona_):
    trial = Trial(tmp_path, "lora", [*METHODS["lora"], "--data", data, "--base", tiny_sd1])
    process = start(trial.first, environment=trial.environment, log=trial.log)
    wait_for("loading the base", process, trial.log)
    answer = persona_("train", "--resume", trial.run)
    process.kill()
    process.join()
    assert answer.code == 1
    assert f"error: {trial.run} is being trained by another process.\n" in answer.err
