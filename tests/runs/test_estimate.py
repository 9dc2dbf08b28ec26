"""What a run needs, told before it is begun: figures by hand, the trial's prediction, and refusals."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona.api import host
from persona.core.host.errors import TrainingError
from persona.core.training.plan import Generated, LowRank, NewToken, NewTokens, Picture, Stream, TrainingPlan, Weights
from persona.core.training.settings import TrainSettings
from persona.hub.bases import open_base
from persona.plugins.methods.lora import LoraOptions
from persona.runs.calibration import Calibration
from persona.runs.estimate import estimate, seconds
from persona.runs.preparing import Prepared, prepare
from persona.runs.recipe import Recipe
from persona.runs.sizes import product_bytes, refuse_without_memory, refuse_without_room, trained_parameters

ROBOT = Path(__file__).parents[2] / "persona" / "assets" / "subjects" / "robot"


@pytest.fixture(scope="module")
def mini() -> Any:
    return open_base("mini")


def ready_for(mini: Any, plan: TrainingPlan, **settings: Any) -> Prepared:
    recipe = Recipe("lora", str(ROBOT), LoraOptions(), TrainSettings(**settings))
    return Prepared(recipe, mini, plan, {}, ())


def plan_of(*trains: Any, streams: tuple[Stream, ...] = (), **options: Any) -> TrainingPlan:
    return TrainingPlan("lora", trains, streams, 100, width=64, height=64, center_crop=True, **options)


def test_trained_numbers_are_counted_as_the_backend_makes_them(mini: Any) -> None:
    from persona.core.host.contracts import Runtime
    from persona.plugins.backends.torch import TorchBackend

    convolution = "down_blocks.0.resnets.0.conv1"
    query = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    low_rank = LowRank("unet", (query, convolution), 4, 4.0, 1e-3, ranks={convolution: 2}, decomposed=True)
    tokens = NewTokens(("text_encoder",), (NewToken("<toy>", "robot", 3),), 1e-3)
    plan = plan_of(low_rank, tokens)
    session = TorchBackend().open(mini, plan, Runtime("cpu"))
    try:
        made = [sum(value.numel() for value in group.values.values()) for group in session._groups]
    finally:
        session.close()
    assert [trained_parameters(part, mini) for part in plan.trains] == made and made[1] == 3 * 192


def test_a_trial_predicts_the_whole_run(mini: Any) -> None:
    streams = (
        Stream("instance", tuple(Picture(f"/{n}", ("a",), sha256=str(n)) for n in range(5))),
        Stream("class", generated=Generated("a robot nobody has", 7, steps=10)),
    )
    plan = plan_of(LowRank("unet", ("a",), 1, 1.0, 1e-3), streams=streams)
    ready = ready_for(mini, plan, sample_prompts=("x", "y"), sample_steps=20)
    found = Calibration(load=3.0, first_step=2.0, step=0.5, picture=0.1, sampler_step=0.01, peak_bytes=1)
    # 99 later steps; 12 pictures; before, half-way, after: 3 · 2 prompts · 20; 7 class pictures · 10
    assert seconds(ready, found) == pytest.approx(3 + 2 + 99 * 0.5 + 12 * 0.1 + (3 * 2 * 20 + 7 * 10) * 0.01)


def test_the_trial_keeps_nothing_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = TrainSettings(steps=5, batch=1, sample_steps=2)
    figures = estimate(prepare(Recipe("lora", str(ROBOT), LoraOptions(rank=2), settings), host()), host())
    assert figures["seconds"] > 5 * figures["seconds_per_step"] > 0
    assert figures["peak_memory_bytes"] > figures["weights_and_optimizer_bytes"] > 40e6
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fills_the_disk_is_refused_with_what_would_save_it(
    mini: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(Weights("unet", 1e-4))
    count = sum(int(np.prod(parameter.shape)) for parameter in mini.parameters["unet"].values())
    settings = TrainSettings(keep_last=3, save_every=10)
    recipe = Recipe("full", str(ROBOT), None, settings, output=str(tmp_path / "new" / "run"))

    def free(bytes_: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(bytes_, 0, bytes_))  # type: ignore[attr-defined]

    free(count * 12 * 4 + count * 8)  # three checkpoints and the one being written, the product twice
    refuse_without_room(plan, mini, recipe)
    free(count * 12 * 4 + count * 8 - 1)
    with pytest.raises(TrainingError, match=r"has .* free") as refused:
        refuse_without_room(plan, mini, recipe)
    assert refused.value.hint == "Keep one checkpoint: --keep-last 1"
    free(1000)
    with pytest.raises(TrainingError) as refused:
        refuse_without_room(plan, mini, recipe)
    assert "--output" in refused.value.hint
    assert product_bytes(plan, mini) == count * 4


def test_a_run_without_memory_is_refused_with_the_flags(mini: Any) -> None:
    """d8ahazard/sd_dreambooth_extension#1023, #760: "No executable batch size found"."""
    plan = plan_of(Weights("unet", 1e-4))
    with pytest.raises(
        TrainingError, match=r"Weights and optimizer alone take 8\.0 GiB, and cuda has 6\.0 GiB"
    ) as refused:
        refuse_without_memory(8 << 30, 6 << 30, plan, "cuda")
    for flag in ("--plugin lora", "--precision bf16", "--gradient-checkpointing"):
        assert flag in refused.value.hint
    refuse_without_memory(8 << 30, 0, plan, "cuda")  # not known: nothing is refused for what is not known
    low = dataclasses.replace(plan_of(LowRank("unet", ("a",), 1, 1.0, 1e-3)), precision="bf16")
    with pytest.raises(TrainingError) as refused:
        refuse_without_memory(8 << 30, 6 << 30, low, "cuda")
    assert refused.value.hint == "Lower it: --gradient-checkpointing"


def test_a_trial_on_a_slow_machine_is_two_steps(mini: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from persona.runs import calibration

    made: list[int] = []
    take_step = calibration.take_step
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibration, "LONG", 0.0)
    monkeypatch.setattr(calibration, "take_step", lambda *given: made.append(given[3]) or take_step(*given))
    settings = TrainSettings(steps=5, batch=1)
    estimate(prepare(Recipe("lora", str(ROBOT), LoraOptions(rank=2), settings), host()), host())
    assert made == [0, 1]
