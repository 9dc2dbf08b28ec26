"""A run that is gone on with by another backend than began it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona import Descriptor, api, hookimpl
from persona.core.host.errors import ResumeError
from persona.core.training.events import Event, Note
from persona.core.training.plan import LowRank, Optimizer, TrainingPlan
from persona.plugins.backends.torch.backend import TorchBackend
from persona.runs.differences import other_backend

LORA = {"prompt": "a toy", "rank": 2, "batch": 1, "sample_steps": 1, "device": "cpu", "dropout": 0.3}


class OtherBackend(TorchBackend):
    """The torch backend under another name: what it adds to a state is its own affair."""

    name = "other"


class Plugin:
    """Gives it."""

    @hookimpl
    def persona_backends(self) -> list[Descriptor]:
        """One backend."""
        return [Descriptor("other", "torch by another name", f"{__name__}:OtherBackend")]


def plan_of(optimizer: str = "adamw", dropout: float = 0.0) -> TrainingPlan:
    part = LowRank("unet", ("a",), 1, 1.0, 1e-3, dropout=dropout)
    return TrainingPlan("lora", (part,), (), steps=3, optimizer=Optimizer(name=optimizer))


def test_a_checkpoint_goes_from_backend_to_backend_and_says_so(
    plugged: Any, tiny_sd1: Path, toys: Path, tmp_path: Path
) -> None:
    plugged(other=Plugin())
    straight = api.train("lora", toys, base=tiny_sd1, backend="torch", steps=4, output=str(tmp_path / "a"), **LORA)
    run = api.train("lora", toys, base=tiny_sd1, backend="torch", steps=2, output=str(tmp_path / "b"), **LORA)
    heard: list[Event] = []
    api.resume(run, backend="other", steps=3, emit=heard.append)
    notes = [event.text for event in heard if isinstance(event, Note)]
    assert any("going on with other what was begun with torch" in note and "dropout" in note for note in notes)
    assert run.facts()["backend"] == "other"
    heard.clear()
    api.resume(run, steps=4, emit=heard.append)  # the recipe has kept what was typed
    assert not any("going on with" in event.text for event in heard if isinstance(event, Note))
    assert run.adapter.read_bytes() == straight.adapter.read_bytes()


def test_a_run_goes_on_with_its_own_backend_whatever_would_be_taken_now(
    plugged: Any, tiny_sd1: Path, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugged(other=Plugin())
    run = api.train("lora", toys, base=tiny_sd1, backend="other", steps=1, output=str(tmp_path / "b"), **LORA)
    recipe = run.recipe.read_text().replace("backend: other", "backend: null")
    run.recipe.write_text(recipe)  # as if it had been chosen, and not typed
    api.resume(run, steps=2)
    assert run.facts()["backend"] == "other"


def test_the_state_of_another_optimizer_stays_where_it_was_made() -> None:
    state = {"value/unet.a.up": np.zeros(1), "optimizer/unet.a.up/exp_avg": np.zeros(1)}
    with pytest.raises(ResumeError, match="backend torch and the optimizer prodigy, whose state paddle cannot") as told:
        other_backend("torch", "paddle", state, plan_of("prodigy"))
    assert told.value.hint == "Go on with it: --backend torch"
    assert other_backend("torch", "torch", state, plan_of("prodigy")) == ""
    assert other_backend("", "paddle", state, plan_of()) == "", "a run of before backends were noted"
    neutral = {"value/unet.a.up": np.zeros(1), "adam_m/unet.a.up": np.zeros(1)}
    assert "dropout" not in other_backend("torch", "paddle", neutral, plan_of())
    assert "dropout draws other numbers" in other_backend("torch", "paddle", neutral, plan_of(dropout=0.1))
