"""Compiled training steps of a golden case against the same steps as they are: what Paddle's and MindSpore's tests of
--compile have in common. Compiling takes ten seconds and more, so one session shows several things at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from persona.core.training.plan import TrainingPlan
from tests.backends.golden import cases as golden

CASES = [("tiny", "decomposed, with text encoder"), ("tiny", "whole weights"), ("tiny-sdxl", "new tokens")]
"""(base, golden case)."""


def go_on(session: Any, base: Any, case: str, steps: range) -> list[Any]:
    """Losses, norms and losses in evaluation of some steps."""
    seen: list[Any] = []
    for step in steps:
        seen.append(session.accumulate(golden.batch_of(base, case, number=step)))
        seen.append(session.update([1e-3] * len(session.plan.trains), 1.0)[0])
        if session.plan.ema_decay is not None:
            session.average(0.5)
        seen.append(session.evaluate(golden.batch_of(base, case)))
    return seen


def compiled_steps_are_the_steps(
    base: Any, case: str, plan: TrainingPlan, opened: Callable[[Any, TrainingPlan], Any]
) -> tuple[Any, Any]:
    """Two steps in a compiled session and in one that is not; the two sessions, the compiled one last. A decomposed
    case is also resumed, compiled, and has to make the same bits."""
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
    if case == "decomposed, with text encoder":
        resumed = opened(base, dataclasses.replace(plan, compile=True))
        resumed.load_state(kept)
        again = go_on(resumed, base, case, range(1, 2))
        assert all(np.array_equal(one, other) for one, other in zip(again, found[3:], strict=True))
        assert all(np.array_equal(value, end[name]) for name, value in resumed.state().items())
    return plain, graph
