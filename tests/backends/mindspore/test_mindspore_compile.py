"""Training steps in a graph against the same steps one operation after the other. Compiling takes ten seconds and
more, so one session shows several things at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindone", reason="the MindSpore environment is not here: persona backends setup mindspore")

import mindspore as ms
from mindspore import Tensor

from persona.core.host.errors import TrainingError
from persona.core.training.plan import TrainingPlan
from persona.plugins.backends.mindspore.dropout import Dropout
from tests.backends.compiled import CASES, compiled_steps_are_the_steps
from tests.backends.golden import cases as golden


def plan_of(base: Any, case: str) -> TrainingPlan:
    """A golden case with much of what goes with it switched on."""
    plan = golden.cases(base)[case]
    if case == "decomposed, with text encoder":
        unet, text = (dataclasses.replace(part, dropout=0.3) for part in plan.trains)
        some = unet.targets[::8]  # every layer takes the compiler longer
        conv = tuple(path for path in unet.targets if path.endswith("conv1"))[:1]
        decomposed = dataclasses.replace(unet, targets=some)
        plain = dataclasses.replace(unet, targets=conv, decomposed=False, initialisation="pissa")
        return dataclasses.replace(plan, trains=(decomposed, plain, text), ema_decay=0.5)
    return dataclasses.replace(plan, gradient_checkpointing=case == "whole weights")


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_a_graph_makes_the_steps_it_was_made_from(kind: str, case: str, tiny: Any, opened: Any) -> None:
    base = tiny(kind)
    plain, graph = compiled_steps_are_the_steps(base, case, plan_of(base, case), opened)
    if case == "whole weights":  # pictures of another size
        wide = golden.batch_of(base, case)
        twice = {name: np.concatenate([getattr(wide, name)] * 2, -1) for name in ("latents", "noise")}
        wide = dataclasses.replace(wide, **twice)
        np.testing.assert_allclose(graph.accumulate(wide), plain.accumulate(wide), rtol=1e-5)


def test_dropout_draws_the_same_in_a_graph_and_as_told() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    source = Dropout()
    source.begin(12)
    source.begin_micro_batch()
    layers = [source.layer(0.3) for _ in range(2)]
    x = Tensor(np.ones((2, 64, 320), np.float32))
    masks = []
    for layer in layers:
        layer.set_train(True)
        masks.append(layer(x).asnumpy() != 0)
        layer.in_graph = True
        np.testing.assert_array_equal(ms.jit(layer.construct)(x).asnumpy() != 0, masks[-1])
    first, second = masks
    assert abs(first.mean() - 0.7) < 0.01 and abs(second.mean() - 0.7) < 0.01  # 40,960 values: 4 deviations are 0.009
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.025
    assert abs(np.corrcoef(first.ravel()[:-1], first.ravel()[1:])[0, 1]) < 0.025
    source.begin_micro_batch()
    assert not np.array_equal(layers[0](x).asnumpy() != 0, first)


def test_what_cannot_be_compiled_is_told_with_the_way_out(
    tiny: Any, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny()
    session = opened(base, dataclasses.replace(golden.cases(base)["low rank"], compile=True))

    def refuse(*tensors: Any) -> Any:
        raise TypeError("-----\nThe compiler knows no such thing.\n-----\nmore")

    monkeypatch.setattr(session, "_predict_in_steps", refuse)
    with pytest.raises(
        TrainingError, match=r"cannot compile this denoiser: The compiler knows no such thing\."
    ) as told:
        session.accumulate(golden.batch_of(base, "low rank"))
    assert told.value.hint == "Train without: --no-compile"
    other = opened(base, golden.cases(base)["low rank"])  # MindSpore remembers nothing of the gradient that failed
    assert np.isfinite(other.accumulate(golden.batch_of(base, "low rank"))).all()
