"""Training steps with the denoiser compiled: what dynamo makes of the model, and what the session does with that.
Inductor, whose C++ takes minutes, is not asked here; `benchmarks/speed.py compile` compares its losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from persona.core.host.errors import TrainingError, UsageError
from persona.core.training.plan import Weights
from persona.plugins.backends.torch import compiling
from tests.backends.torch.conftest import attention_lora, batch_of, modules, plan_of

CONVOLUTIONS = (".conv1", "downsamplers.0.conv")


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "COMPILER", "aot_eager")
    monkeypatch.setattr(compiling, "require_compiler", lambda kind: None)


def steps_of(session: Any, base: Any, steps: range) -> list[Any]:
    seen: list[Any] = []
    for step in steps:
        seen.append(session.accumulate(batch_of(base, seed=step)))
        seen.append(session.update([1e-2] * len(session.plan.trains), 1.0)[0])
        if session.plan.ema_decay is not None:
            session.average(0.5)
        seen.append(session.evaluate(batch_of(base, seed=9)))
    return seen


def plan_for(base: Any, case: str) -> Any:
    if case == "weights":
        return plan_of(Weights("unet", 1e-3, ("mid_block.", "add_embedding.")))
    lora = attention_lora(base, dropout=0.3, decomposed=True, limit=6)
    conv = attention_lora(base, dropout=0.3)
    conv = dataclasses.replace(conv, targets=modules(base, "unet", CONVOLUTIONS), initialisation="pissa")
    return plan_of(lora, conv, ema_decay=0.5, gradient_checkpointing=True)


@pytest.mark.parametrize(("kind", "case"), [("sd1", "lora"), ("sdxl", "weights")])
def test_compiled_steps_are_the_steps(kind: str, case: str, narrow: Any, opened: Any, without_inductor: None) -> None:
    base = narrow(kind)
    plan = plan_for(base, case)
    plain, session = (opened(base, dataclasses.replace(plan, compile=compile)) for compile in (None, True))
    assert (plain.first_step(), session.first_step()) == ("first step", "compiling")
    expected = steps_of(plain, base, range(2))
    found = steps_of(session, base, range(1))
    kept = {name: value.copy() for name, value in session.state().items()}
    found += steps_of(session, base, range(1, 2))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    state, wanted = session.state(), plain.state()
    assert state.keys() == wanted.keys()
    for name, value in state.items():
        assert np.linalg.norm(value - wanted[name]) <= 1e-4 * np.linalg.norm(wanted[name]), name
    made, plain_made = session.product(), plain.product()
    if case == "weights":
        assert made.components["unet"].keys() == plain_made.components["unet"].keys()
    else:
        assert made.entries.keys() == plain_made.entries.keys()
        resumed = opened(base, dataclasses.replace(plan, compile=True))
        resumed.load_state(kept)
        again = steps_of(resumed, base, range(1, 2))
        assert all(np.array_equal(one, other) for one, other in zip(again, found[3:], strict=True))
        end = resumed.state()
        assert all(np.array_equal(value, end[name]) for name, value in state.items())


def test_every_shape_is_compiled_for_itself(narrow: Any, opened: Any, without_inductor: None) -> None:
    base = narrow("sd1")
    session = opened(base, plan_of(attention_lora(base, limit=1), compile=True))
    plain = opened(base, plan_of(attention_lora(base, limit=1)))
    torch._dynamo.utils.counters.clear()
    for count in (2, 3, 2):
        batch = batch_of(base, count=count)
        np.testing.assert_allclose(session.accumulate(batch), plain.accumulate(batch), rtol=1e-5)
    session.evaluate(batch_of(base, count=4))  # not compiled
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_missing_compiler_is_told_before_anything_is_loaded(
    narrow: Any, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiling.sys, "platform", "linux")
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    base = narrow("sd1")
    with pytest.raises(UsageError, match=r"--compile: torch compiles with a C\+\+ compiler, g\+\+,") as refused:
        opened(base, plan_of(attention_lora(base, limit=1), compile=True))
    assert "apt install g++" in refused.value.hint and "leave --compile out" in refused.value.hint
    opened(base, plan_of(attention_lora(base, limit=1)))


def test_so_are_missing_headers_and_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name)
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="Triton") as refused:
        compiling.require_compiler("cuda")
    assert "pip install triton" in refused.value.hint
    with monkeypatch.context() as patched:
        patched.setattr(compiling.sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(UsageError, match=r"Python\.h") as refused:
            compiling.require_compiler("cpu")
    assert "python3-dev" in refused.value.hint


def test_what_cannot_be_compiled_is_told_with_the_way_out(
    narrow: Any, opened: Any, without_inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = narrow("sd1")
    session = opened(base, plan_of(attention_lora(base, limit=1), compile=True))
    block = session._components["unet"].mid_block

    def told(*values: Any, **more: Any) -> Any:
        torch._dynamo.graph_break()
        return type(block).forward(block, *values, **more)

    monkeypatch.setattr(block, "forward", told)
    with pytest.raises(TrainingError, match="torch cannot compile this denoiser: ") as refused:
        session.accumulate(batch_of(base))
    assert refused.value.hint == "Train without: --no-compile"
