"""Every method with every optimizer, with and without averages: a run that is taken up again from a checkpoint file is
the run that went on, to the last bit. (test_method_runs.py trains whole runs further by the command line.)"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona.api import host
from persona.core.host.contracts import Runtime, Session
from persona.core.training.loop import Ingredients, learning_rates, take_step
from persona.core.training.plan import Picture, TrainingPlan
from persona.core.training.run import RunFolder, load_checkpoint, save_checkpoint
from persona.core.training.settings import TrainSettings
from persona.hub.bases import open_base
from persona.plugins.backends.torch import TorchBackend
from persona.runs.calibration import made_up, with_stand_ins
from persona.runs.ingredients import trains_text
from persona.runs.optimizers import with_optimizer
from persona.runs.steps import state_writer

PACKAGES = {
    "adamw": None,
    "adafactor": "transformers",
    "prodigy": "prodigyopt",
    "lion": "lion_pytorch",
    "adamw-8bit": "bitsandbytes",
}
"""Optimizers by the package they come from. bitsandbytes (125 MB) is not among a contributor's tools: skipped where it
is not installed. It keeps 8 bits of tensors of 4,096 values and more; smaller ones it treats as AdamW does."""
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "dropout": 0.2, "train_text_encoder": True},
    "dreambooth": {"class_word": "toy"},
    "textual-inversion": {"placeholder": ("<toy>", "<dog>"), "initializer": ("robot",), "vectors": 2},
    "full": {"train_text_encoder": True},
}
PICTURES = (
    Picture("/photos/<toy>/a.png", ("a photo of sks toy <toy>", "a red <toy> sks"), sha256="a" * 64, size=(64, 64)),
    Picture("/photos/<dog>/b.png", ("a sks <dog>",), sha256="b" * 64, size=(64, 64)),
)


@pytest.fixture(scope="module")
def base(tiny_sd1: Path) -> Any:
    return open_base(str(tiny_sd1))


def plan_for(method: str, optimizer: str, ema_decay: float | None, base: Any) -> TrainingPlan:
    cls = host().load("method", method)
    settings = TrainSettings(
        steps=4, batch=1, accumulation=2, learning_rate=1.0 if optimizer == "prodigy" else 1e-3, optimizer=optimizer,
        ema_decay=ema_decay, caption_dropout=0.2, random_flip=True, seed=5,
    )  # fmt: skip
    plan: TrainingPlan = cls().plan(cls.Options(**METHODS[method]), settings, base, PICTURES)
    return with_stand_ins(with_optimizer(plan, (), host()))


def opened(plan: TrainingPlan, base: Any) -> tuple[Session, Ingredients]:
    session = TorchBackend().open(base, plan, Runtime("cpu"))
    return session, made_up(plan, base, session, cached=not trains_text(plan, base))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("optimizer", PACKAGES)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_taken_up_again_is_the_straight_run(
    method: str,
    optimizer: str,
    ema_decay: float | None,
    base: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """diffusers#5840, #5412; sd-scripts#1959; musubi-tuner#307, #667: resume that begins anew, or with a jump."""
    if PACKAGES[optimizer] is not None:
        pytest.importorskip(PACKAGES[optimizer])
    plan = plan_for(method, optimizer, ema_decay, base)
    shorter = dataclasses.replace(plan, steps=2)
    assert [learning_rates(plan, update) for update in range(2)] == [learning_rates(shorter, n) for n in range(2)]
    straight, given = opened(plan, base)
    figures = []
    try:
        for update in range(4):
            figures.append(take_step(plan, given, straight, update))
            if update == 1:
                saved = save_checkpoint(RunFolder(tmp_path), 2, state_writer(straight), keep_last=1)
        end = {name: values.copy() for name, values in straight.state().items()}
    finally:
        straight.close()
    step, state = load_checkpoint(saved)
    assert step == 2
    again, given = opened(plan, base)
    try:
        again.load_state(state)
        for update in range(2, 4):
            found = take_step(plan, given, again, update)
            assert without_time(found) == without_time(figures[update])
        assert_same(again.state(), end)
    finally:
        again.close()
    trained = [name for name in end if name.startswith("value/")]
    assert any(not np.array_equal(end[name], state[name]) for name in trained), "something was trained in between"
    assert capsys.readouterr().out == "", "what a package prints when it is made is not part of --json"
    assert (ema_decay is not None) == any(name.startswith("ema/") for name in end)


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def without_time(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name != "seconds"}
