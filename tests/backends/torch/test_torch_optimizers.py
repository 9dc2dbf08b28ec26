"""Other optimizers than AdamW: made from the plan, and taken up again to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import attention_lora, batch_of, plan_of

from persona.api import host
from persona.core.host.errors import UsageError
from persona.core.training.plan import Optimizer
from persona.plugins.backends.torch.optimizer_state import any_state, group_numbers, load_any_state
from persona.runs.optimizers import with_optimizer


class StepFinder(torch.optim.Optimizer):
    """Keeps what Prodigy, Lion and 8-bit optimizers keep: a number in its group, tensors of three dtypes, a counter."""

    def __init__(self, params: Any, lr: float = 1.0, growth: float = 1.1) -> None:
        super().__init__(params, {"lr": lr, "growth": growth, "d": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["d"] *= group["growth"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                known = self.state[parameter]
                mean = known.get("mean", torch.zeros_like(parameter, dtype=torch.bfloat16)).float()
                mean = 0.9 * mean + 0.1 * parameter.grad
                known["mean"] = mean.bfloat16()
                known["signs"] = (mean > 0).to(torch.uint8)
                known["calls"] = known.get("calls", 0) + 1
                parameter -= group["lr"] * group["d"] * known["mean"].float() / known["calls"]


FINDER = Optimizer(name="step-finder", classes={"torch": f"{__name__}:StepFinder"}, options={"growth": 1.5})


@pytest.mark.parametrize("which", ["step-finder", "adafactor"])
def test_a_resumed_run_is_the_straight_run(which: str, narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    plan = plan_of(attention_lora(base), ema_decay=0.9, optimizer=Optimizer(name="adafactor"))
    plan = with_optimizer(plan, (), host()) if which == "adafactor" else plan_of(attention_lora(base), optimizer=FINDER)

    def go_on(session: Any, steps: range) -> list[Any]:
        seen = []
        for step in steps:
            seen.append(session.accumulate(batch_of(base, seed=step)).tolist())
            seen.append(session.update([1e-2], 1.0))
            if plan.ema_decay is not None:
                session.average(plan.ema_decay)
        return seen

    straight = opened(base, plan)
    go_on(straight, range(3))
    kept = {name: value.copy() for name, value in straight.state().items()}
    expected, end = go_on(straight, range(3, 6)), straight.state()
    resumed = opened(base, plan)
    resumed.load_state(kept)
    assert go_on(resumed, range(3, 6)) == expected
    again = resumed.state()
    assert again.keys() == end.keys() and len(end) > 10
    assert all(np.array_equal(again[name], end[name]) for name in end)


def test_adafactor_is_transformers_own(narrow: Any, opened: Any) -> None:
    from transformers.optimization import Adafactor

    base = narrow("sd1")
    session = opened(
        base, with_optimizer(plan_of(attention_lora(base), optimizer=Optimizer(name="adafactor")), (), host())
    )
    copies = [torch.nn.Parameter(value.detach().clone()) for value in session._optimizer.names.values()]
    theirs = Adafactor(
        copies, lr=1e-2, scale_parameter=False, relative_step=False, warmup_init=False, weight_decay=0.01
    )
    session.accumulate(batch_of(base))
    for copy, value in zip(copies, session._optimizer.names.values(), strict=True):
        copy.grad = value.grad.clone()
    session.update([1e-2], 0.0)
    theirs.step()
    for copy, value in zip(copies, session._optimizer.names.values(), strict=True):
        torch.testing.assert_close(copy, value, rtol=0, atol=1e-7)


def test_state_keeps_every_dtype_bit_for_bit() -> None:
    values = {"a": torch.nn.Parameter(torch.linspace(-1, 1, 7))}
    first, second = StepFinder(values.values()), StepFinder(values.values())
    values["a"].grad = torch.linspace(0.3, -0.7, 7)
    constants = group_numbers(first)
    first.step()
    state = any_state(first, values, constants)
    assert {name: str(array.dtype) for name, array in state.items()} == {
        "optimizer/a/bf16:mean": "int16", "optimizer/a/signs": "uint8", "optimizer_number/a/calls": "int64",
        "optimizer_group/0/d": "float64",  # growth is as the plan has it, which may be changed on purpose
    }  # fmt: skip
    load_any_state(second, values, state)
    parameter = values["a"]
    assert torch.equal(first.state[parameter]["mean"], second.state[parameter]["mean"])
    assert second.state[parameter]["mean"].dtype == torch.bfloat16 and second.state[parameter]["calls"] == 1
    assert second.param_groups[0]["d"] == first.param_groups[0]["d"]


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (Optimizer(name="lion"), "has no optimizer"),
        (Optimizer(name="shell", classes={"torch": "os:system"}), "not an optimizer of torch"),
        (Optimizer(name="gone", classes={"torch": "no_such_package:X"}), "cannot be imported"),
        (Optimizer(name="x", classes={"torch": "torch.optim:SGD"}, options={"bogus": 1}), "refuses its options"),
    ],
)
def test_a_plan_that_names_no_optimizer_is_refused(optimizer: Optimizer, said: str, narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    with pytest.raises(UsageError, match=said):
        opened(base, plan_of(attention_lora(base), optimizer=optimizer))


def test_the_loss_without_gradients_is_the_loss_and_changes_nothing(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    session = opened(base, plan_of(attention_lora(base, dropout=0.5), ema_decay=0.5))
    plain = opened(base, plan_of(attention_lora(base)))
    before = session.state()
    losses = session.evaluate(batch_of(base))
    np.testing.assert_allclose(
        losses, plain.accumulate(batch_of(base)), rtol=1e-6
    )  # up is zero yet: dropout has no say
    after = session.state()
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    session.accumulate(batch_of(base))
    session.update([0.1], 0.0)
    session.average(0.5)
    averaged = session.evaluate(batch_of(base))
    session._averages = None
    assert not np.allclose(averaged, session.evaluate(batch_of(base))), "the averages are judged, not the values"
