"""A run in two processes is the run in one: through torchrun from end to end, and in forked processes for every way in
which it can stop."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from persona import api
from persona.core.host.errors import BackendMissing, BaseModelError, Interrupted, NotFinite, TrainingError, UsageError
from persona.core.training.events import Event, StepDone
from persona.core.training.processes import PeerLost
from persona.core.training.run import RunFolder, checkpoints, load_checkpoint, load_step
from persona.runs import launching
from tests.forked import Launched
from tests.several import column, difference, losses, two_processes_are_one_until_one_is_killed

FEW = {"batch": 2, "steps": 4, "save_every": 2, "keep_last": 100, "sample_steps": 1, "device": "cpu", "seed": 5}
METHOD = {"class_word": "toy", "class_pictures": 11, "learning_rate": 1e-3, "lora": True}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        drawn = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(drawn).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, pictures: Path, tiny_sd1: Path) -> RunFolder:
    """The run on one device, with a cache of its own."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERSONA_CACHE", str(folder / "cache"))
        return api.train("dreambooth", pictures, base=tiny_sd1, output=str(folder / "run"), **FEW, **METHOD)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, so that class pictures are made."""
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def in_parts(tmp_path: Path) -> str:
    """A configuration of accelerate: FSDP with two processes."""
    file = tmp_path / "accelerate.yaml"
    file.write_text("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2}\n")
    return str(file)


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two processes are forked instead of launched; `kill_at` is (rank, function, call) of one that kills itself."""
    told: dict[str, Any] = {"kill_at": None, "log": tmp_path / "processes.log"}

    def started(line: Any, environment: Any, log: Path) -> Launched:
        told["launched"] = Launched(2, environment, told["log"], told["kill_at"])
        return told["launched"]

    monkeypatch.setattr(launching, "started", started)
    return told


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
def test_through_torchrun_it_is_the_same_run_until_a_process_is_killed(
    straight: RunFolder, pictures: Path, tiny_sd1: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = two_processes_are_one_until_one_is_killed(
        "dreambooth", pictures, straight, tmp_path / "run", monkeypatch, base=tiny_sd1, **FEW, **METHOD
    )
    made, expected = (
        {file.name: file.read_bytes() for file in (where / "class-pictures").rglob("*.png")}
        for where in (cache, straight.path.parent / "cache")
    )
    assert len(made) == METHOD["class_pictures"] and made == expected, "the processes made each other's share"
    assert json.loads(run.environment.read_text())["devices"] == 2

    step = load_step(checkpoints(run)[-1])
    ended = api.resume(run, devices=1, steps=step + 1)
    assert ended.product == run.adapter and len(losses(ended)) >= step + 1


def test_a_run_goes_on_in_two_processes_and_in_one_again(
    straight: RunFolder, pictures: Path, tiny_sd1: Path, tmp_path: Path, forked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSONA_CACHE", str(straight.path.parent / "cache"))
    output = str(tmp_path / "run")
    run = api.train("dreambooth", pictures, base=tiny_sd1, output=output, **FEW | {"steps": 1}, **METHOD)
    api.resume(run, devices=2, steps=3)
    assert sorted(path.name for path in run.path.iterdir() if not path.name.startswith(".")) == sorted(
        path.name for path in straight.path.iterdir() if not path.name.startswith(".")
    )
    api.resume(run, devices=1, steps=4)
    np.testing.assert_allclose(losses(run), losses(straight), rtol=1e-5)
    assert difference(run.adapter, straight.adapter) < 1e-5


@pytest.mark.slow
def test_in_parts_in_two_processes_it_is_the_same_run_and_goes_on_whole_and_in_parts_again(
    pictures: Path, tiny_sd1: Path, tmp_path: Path, forked: Any, monkeypatch: pytest.MonkeyPatch, in_parts: str
) -> None:
    """Whole weights of both components, averages, a validation loss; more processes than blocks of class pictures."""
    held_out = tmp_path / "held out"
    held_out.mkdir()
    shutil.copy(pictures / "0.png", held_out)
    training = tmp_path / "pictures"
    shutil.copytree(pictures, training, ignore=shutil.ignore_patterns("0.png"))
    words = {"class_word": "toy", "class_pictures": 1, "learning_rate": 1e-5, "train_text_encoder": True, **FEW,
             "ema_decay": 0.5, "validation_data": str(held_out), "validation_every": 1, "base": tiny_sd1}  # fmt: skip
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "one"))
    straight = api.train("dreambooth", training, output=str(tmp_path / "straight"), **words)
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "two"))
    few = {**words, "steps": 2}
    run = api.train("dreambooth", training, output=str(tmp_path / "run"), accelerate_config=in_parts, **few)
    assert json.loads(run.environment.read_text())["sharding"] == {"reshard_after_forward": True, "offload": False}
    made, expected = (
        {file.name: file.read_bytes() for file in (tmp_path / cache).rglob("class-pictures/*/*.png")}
        for cache in ("two", "one")
    )
    assert len(made) == 1 and made == expected
    api.resume(run, steps=3, devices=1, accelerate_config="none")
    api.resume(run, steps=4, accelerate_config=in_parts)
    np.testing.assert_allclose(losses(run), losses(straight), rtol=1e-5)
    np.testing.assert_allclose(column(run, "validation_loss"), column(straight, "validation_loss"), rtol=1e-5)
    for component in ("unet", "text_encoder"):
        (file,) = (path.relative_to(straight.path) for path in (straight.model / component).glob("*.safetensors"))
        assert difference(run.path / file, straight.path / file) < 1e-5
    state = Path("checkpoints", "step-000004", "state.safetensors")
    assert difference(run.path / state, straight.path / state) < 1e-5
    assert names_in(run.model) == names_in(straight.model)


def test_in_parts_one_that_dies_in_a_step_stops_all(
    pictures: Path, tiny_sd1: Path, tmp_path: Path, forked: Any, in_parts: str
) -> None:
    forked["kill_at"] = (1, "persona.plugins.backends.torch.session.TorchSession._add_gradients", 4)
    with pytest.raises(TrainingError, match="Process 1 of 0 to 1 ended without a word") as stopped:
        train_forked(pictures, tiny_sd1, tmp_path / "run", accelerate_config=in_parts)
    run = RunFolder(tmp_path / "run")
    assert stopped.value.hint == f"Go on with: persona train --resume {run.path}"
    assert [load_checkpoint(path)[0] for path in checkpoints(run)] == [2]
    forked["kill_at"] = None
    assert api.resume(run).product and len(losses(run)) == 4


def test_in_parts_what_goes_wrong_is_said_once(
    pictures: Path, tiny_sd1: Path, tmp_path: Path, forked: Any, in_parts: str
) -> None:
    words = {"learning_rate": 1e30, "steps": 200, "save_every": 200, "accumulation": 2, "accelerate_config": in_parts}
    with pytest.raises(NotFinite, match=r"Step \d+ of 200: The (loss|gradient) is not finite "):
        train_forked(pictures, tiny_sd1, tmp_path / "run", **words)


def names_in(folder: Path) -> list[str]:
    """Every file that is not hidden."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.startswith("."))


def train_forked(pictures: Path, base: Path, output: Path, **options: Any) -> RunFolder:
    """A LoRA in two processes."""
    words = {"prompt": "a toy", "rank": 2, "learning_rate": 1e-2, **FEW, **options}
    words |= {} if "accelerate_config" in options else {"devices": 2}
    return api.train("lora", pictures, base=base, output=str(output), **words)


def test_the_first_process_may_be_the_one_that_dies(
    pictures: Path, tiny_sd1: Path, tmp_path: Path, forked: Any
) -> None:
    forked["kill_at"] = (0, "os.fsync", 12)  # inside a checkpoint
    with pytest.raises(TrainingError, match="Process 0 of 0 to 1 ended without a word"):
        train_forked(pictures, tiny_sd1, tmp_path / "run", steps=40)
    run = RunFolder(tmp_path / "run")
    assert all(load_checkpoint(path)[1] for path in checkpoints(run))
    forked["kill_at"] = None
    assert api.resume(run, steps=4).product


def test_what_goes_wrong_is_said_once_and_as_on_one_device(
    pictures: Path, tiny_sd1: Path, tmp_path: Path, forked: Any
) -> None:
    with pytest.raises(NotFinite, match=r"Step \d+ of 200: The (loss|gradient) is not finite ") as told:
        train_forked(pictures, tiny_sd1, tmp_path / "run", learning_rate=1e30, steps=200, save_every=1)
    assert "--learning-rate" in told.value.hint


def test_a_base_that_cannot_be_loaded_leaves_no_run_behind(
    pictures: Path, tiny_sd1: Path, tmp_path: Path, forked: Any
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_sd1, broken)
    file = next((broken / "unet").glob("*.safetensors"))
    weights = load_file(file)
    save_file({"nobody.knows": weights.pop("conv_out.bias"), **weights}, file)
    with pytest.raises(BaseModelError, match=r"unet has no conv_out\.bias"):
        train_forked(pictures, broken, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_interrupt_lets_the_step_finish_on_all(pictures: Path, tiny_sd1: Path, tmp_path: Path, forked: Any) -> None:
    from persona.runs.assemble import assemble
    from persona.runs.training import start

    asked = {"stop": False}

    def emit(event: Event) -> None:
        asked["stop"] |= isinstance(event, StepDone) and event.step == 3

    typed = {"method": "lora", "data": str(pictures), "base": str(tiny_sd1), "output": str(tmp_path / "run")}
    typed |= {"prompt": "a toy", "rank": 2, "devices": 2, **FEW, "steps": 100_000, "sample_every": 100_000}
    recipe = assemble(api.host(), [], typed, default_recipe=None).recipe
    with pytest.raises(Interrupted, match=r"Stopped after step \d+ of 100000; it is saved"):
        start(recipe, api.host(), emit=emit, stop=lambda: asked["stop"])
    run = RunFolder(tmp_path / "run")
    assert load_checkpoint(checkpoints(run)[-1])[0] == len(losses(run)) >= 3


def test_a_command_that_is_killed_takes_its_processes_along(
    pictures: Path, tiny_sd1: Path, tmp_path: Path, forked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(Exception):
        """As if the command had been killed: nobody is told anything."""

    monkeypatch.setattr(launching._Watch, "end", lambda self: [p.lines.connection.close() for p in self.processes])

    def emit(event: Event) -> None:
        if isinstance(event, StepDone):
            raise Gone

    words = {"prompt": "a toy", "rank": 2, "devices": 2, **FEW, "steps": 100_000, "sample_every": 100_000}
    with pytest.raises(Gone):
        api.train("lora", pictures, base=tiny_sd1, output=str(tmp_path / "run"), emit=emit, **words)
    until = time.monotonic() + 60
    while forked["launched"].poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    assert forked["launched"].poll() is not None, "they are still running"
    assert checkpoints(RunFolder(tmp_path / "run")), "the step was saved before they ended"


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (("--devices", 2, "--batch", 3), "3 samples a step, which 2 devices cannot share", "--batch 4"),
        (("--devices", 0), "--devices 0 is too small", "--devices 1"),
        (("--devices", "two"), "--devices 'two' is not a whole number", "--devices 10"),
        (("--devices", 2, "--device", "cuda:7"), "cuda:7", "--device"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    words: tuple[Any, ...], error: str, says: str, persona_: Any, pictures: Path, tiny_sd1: Path, tmp_path: Path
) -> None:
    common = ("train", "--plugin", "lora", "--prompt", "a toy", "--data", pictures, "--base", tiny_sd1)
    answer = persona_(*common, "--output", tmp_path / "run", *words)
    assert answer.code in (1, 2) and error in answer.err and says in answer.err
    assert len(answer.err.strip().splitlines()) == 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("WORLD_SIZE", "2", "started by a launcher, 2 times"),
        ("ACCELERATE_USE_FSDP", "true", "started by accelerate launch"),
    ],
)
def test_another_launcher_in_front_is_refused(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch, pictures: Path, tiny_sd1: Path
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=says):
        api.train("lora", pictures, base=tiny_sd1, prompt="a toy", **FEW)


def test_devices_are_looked_up_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from persona.plugins.backends.torch import device, launch

    there = ["cuda:0", "cuda:1", "cpu"]
    monkeypatch.setattr(device, "present_devices", lambda: there)
    monkeypatch.setattr(launch, "present_devices", lambda: there)
    assert launch.devices_for("cuda", 2) == launch.devices_for("auto", 2) == ("cuda:0", "cuda:1")
    assert launch.devices_for("cpu", 3) == ("cpu",) * 3
    with pytest.raises(BackendMissing, match="3 devices were asked for, and here there are cuda:0, cuda:1") as told:
        launch.devices_for("cuda", 3)
    assert told.value.hint == "Take what is there: --devices 2"
    with pytest.raises(UsageError, match="cuda:1 is one device"):
        launch.devices_for("cuda:1", 2)

    class Second:
        local_rank = 1

    monkeypatch.setattr(torch.cuda, "set_device", lambda name: there.append(f"current {name}"))
    assert str(launch.device_of("auto", Second()).name) == "cuda:1"  # type: ignore[arg-type]
    assert there[-1] == "current cuda:1"


def test_only_what_a_library_says_of_a_peer_is_a_lost_peer() -> None:
    from persona.plugins.backends.torch.processes import peers_noticed

    seen = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:55506. This is typically …"
    with pytest.raises(PeerLost, match="Another process of the run is gone"), peers_noticed():
        raise RuntimeError(seen)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"), peers_noticed():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_recipe_that_needs_a_plugin_is_refused_where_that_is_not_installed(plugged: Any, tmp_path: Path) -> None:
    from types import SimpleNamespace

    import persona
    from persona.core.host.descriptor import Descriptor
    from persona.runs.assemble import assemble

    class Mine:
        @persona.hookimpl
        def persona_trackers(self) -> list[Descriptor]:
            return [Descriptor("mine", "a tracker", "persona.plugins.trackers.csv:CsvTracker")]

    plugged(mine=Mine())
    typed = {"method": "lora", "prompt": "a toy", "devices": 2}
    told: list[Any] = []
    elsewhere: Any = SimpleNamespace(name="paddle", python="/there/bin/python", plugins=lambda: ["persona", "theirs"])
    recipe = assemble(api.host(), [], typed, default_recipe=None).recipe
    assert launching._plugins_left_behind(recipe, api.host(), elsewhere, told.append) == ["theirs"]
    assert [event.text for event in told] == ["not told how the run goes, because they are not installed there: mine"]
    recipe = assemble(api.host(), [], typed | {"tracker": ("mine",)}, default_recipe=None).recipe
    with pytest.raises(UsageError, match=r"has no plugin mine \(tracker mine\)") as refused:
        launching._plugins_left_behind(recipe, api.host(), elsewhere, told.append)
    assert "/there/bin/python -m pip install" in refused.value.hint
    elsewhere.plugins = lambda: ["persona", "mine"]
    assert launching._plugins_left_behind(recipe, api.host(), elsewhere, told.append) == []
