"""Training steps as a static graph against the same steps without. Making one takes ten seconds and more, so one
session shows several things at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ppdiffusers", reason="the Paddle environment is not here: persona backends setup paddle")

from persona.core.training.plan import TrainingPlan
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


def go_on(session: Any, base: Any, case: str, steps: range) -> list[Any]:
    seen: list[Any] = []
    for step in steps:
        seen.append(session.accumulate(golden.batch_of(base, case, number=step)))
        seen.append(session.update([1e-3] * len(session.plan.trains), 1.0)[0])
        if session.plan.ema_decay is not None:
            session.average(0.5)
        seen.append(session.evaluate(golden.batch_of(base, case)))
    return seen


@pytest.mark.parametrize(
    ("kind", "case"),
    [("tiny", "decomposed, with text encoder"), ("tiny", "whole weights"), ("tiny-sdxl", "new tokens")],
)
def test_a_graph_makes_the_steps_it_was_made_from(kind: str, case: str, tiny: Any, opened: Any) -> None:
    base = tiny(kind)
    plan = plan_of(base, case)
    plain, graph = (opened(base, dataclasses.replace(plan, compile=compile)) for compile in (None, True))
    assert (plain.first_step(), graph.first_step()) == ("first step", "compiling")
    if case != "whole weights":
        start = golden.start_values(plain.state())
        for session in (plain, graph):
            session.load_state(start)
    expected = go_on(plain, base, case, range(2))
    found = go_on(graph, base, case, range(1))
    kept = graph.state()
    found += go_on(graph, base, case, range(1, 2))  # values were written after the graph was made
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    wanted, end = plain.state(), graph.state()
    for name, value in end.items():
        if not name.endswith("k_proj.bias"):  # its gradient is zero but for rounding, of which Adam makes whole steps
            assert np.linalg.norm(value - wanted[name]) <= 1e-4 * np.linalg.norm(wanted[name]), name
    assert len(graph._predict_in_steps.program_cache) == 1, "only training steps are compiled, each shape once"
    if case == "decomposed, with text encoder":  # a resumed run makes the same bits
        resumed = opened(base, dataclasses.replace(plan, compile=True))
        resumed.load_state(kept)
        again = go_on(resumed, base, case, range(1, 2))
        assert all(np.array_equal(one, other) for one, other in zip(again, found[3:], strict=True))
        assert all(np.array_equal(value, end[name]) for name, value in resumed.state().items())
