"""Training steps as a static graph against the same steps without. Making one takes ten seconds and more, so one
session shows several things at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

pytest.importorskip("ppdiffusers", reason="the Paddle environment is not here: persona backends setup paddle")

from persona.core.training.plan import TrainingPlan
from tests.backends.compiled import CASES, compiled_steps_are_the_steps
from tests.backends.golden import cases as golden


def plan_of(base: Any, case: str) -> TrainingPlan:
    """A golden case with much of what goes with it switched on."""
    plan = golden.cases(base)[case]
    if case != "decomposed, with text encoder":
        return plan
    unet, text = (dataclasses.replace(part, dropout=0.3) for part in plan.trains)
    conv = tuple(path for path in unet.targets if path.endswith("conv1"))
    decomposed = dataclasses.replace(unet, targets=tuple(path for path in unet.targets if path not in conv))
    plain = dataclasses.replace(unet, targets=conv, decomposed=False, initialisation="pissa")
    return dataclasses.replace(plan, trains=(decomposed, plain, text), ema_decay=0.5, gradient_checkpointing=True)


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_a_graph_makes_the_steps_it_was_made_from(kind: str, case: str, tiny: Any, opened: Any) -> None:
    base = tiny(kind)
    _, graph = compiled_steps_are_the_steps(base, case, plan_of(base, case), opened)
    assert len(graph._predict_in_steps.program_cache) == 1, "only training steps are compiled, each shape once"
