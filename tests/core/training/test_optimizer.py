"""The reference AdamW and gradient clipping against torch's over a run of steps."""

import numpy as np
import pytest
import torch

from persona.core.training.optimizer import AdamWState, adamw, clip_norm, global_norm

SHAPES = {"down": (4, 32), "up": (16, 4), "bias": (7,)}
RATES = np.linspace(1e-2, 1e-4, 50)


def gradients_of_a_run(seed):
    generator = np.random.default_rng(seed)
    for step in range(50):
        scale = 10.0 ** generator.integers(-4, 2) if step != 20 else 0.0
        yield {name: (generator.normal(size=shape) * scale).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(
    "settings",
    [{}, {"weight_decay": 0.0}, {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-4, "weight_decay": 0.3}],
)
def test_fifty_steps_are_those_of_torch(settings, clip):
    start = np.random.default_rng(1)
    values = {name: start.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    parameters = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in values.items()}
    theirs = torch.optim.AdamW(
        parameters.values(),
        betas=(settings.get("beta1", 0.9), settings.get("beta2", 0.999)),
        eps=settings.get("epsilon", 1e-8),
        weight_decay=settings.get("weight_decay", 1e-2),
    )
    state = AdamWState.start(values)
    for rate, gradients in zip(RATES, gradients_of_a_run(2), strict=True):
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(gradients[name].copy())
        theirs.param_groups[0]["lr"] = float(rate)
        if clip is not None:
            expected = torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
            gradients, norm = clip_norm(gradients, clip)
            assert norm == pytest.approx(float(expected), rel=1e-6)
        theirs.step()
        values, state = adamw(values, gradients, state, float(rate), **settings)
        for name, parameter in parameters.items():
            np.testing.assert_allclose(values[name], parameter.detach().numpy(), rtol=1e-6, atol=1e-6)
    assert state.step == 50
    for name, parameter in parameters.items():
        kept = theirs.state[parameter]
        np.testing.assert_allclose(state.m[name], kept["exp_avg"].numpy(), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(state.v[name], kept["exp_avg_sq"].numpy(), rtol=1e-5, atol=1e-7)
        assert values[name].dtype == np.float32 == state.m[name].dtype


def test_the_first_step_is_bias_corrected():
    """By hand: after correction m = g and v = g², so the first step moves by the learning rate against the sign."""
    values = {"x": np.array([1.0, -2.0])}
    new, _ = adamw(values, {"x": np.array([0.5, -1e-3])}, AdamWState.start(values), 0.1, weight_decay=0.0)
    np.testing.assert_allclose(new["x"], [0.9, -1.9], rtol=1e-4)


def test_weight_decay_is_decoupled_from_the_gradient():
    values = {"x": np.array([3.0])}
    new, _ = adamw(values, {"x": np.array([0.0])}, AdamWState.start(values), 0.1, weight_decay=0.5)
    assert new["x"].tolist() == pytest.approx([3.0 - 0.1 * 0.5 * 3.0])


def test_nothing_is_changed_in_place():
    values, gradients = {"x": np.ones(3)}, {"x": np.full(3, 10.0)}
    state = AdamWState.start(values)
    adamw(values, gradients, state, 0.1)
    clip_norm(gradients, 1.0)
    assert (
        values["x"].tolist() == [1.0] * 3
        and gradients["x"].tolist() == [10.0] * 3
        and state.m["x"].tolist() == [0.0] * 3
    )


def test_a_norm_that_is_not_finite_is_reported_and_nothing_scaled():
    gradients = {"x": np.array([1.0, np.nan], np.float32), "y": np.array([np.inf], np.float32)}
    clipped, norm = clip_norm(gradients, 1.0)
    assert not np.isfinite(norm)
    np.testing.assert_array_equal(clipped["x"], gradients["x"])


def test_the_norm_of_nothing_is_zero_and_large_values_do_not_overflow():
    assert global_norm({}) == 0.0
    assert global_norm({"x": np.full(4, 1e30, np.float32)}) == pytest.approx(2e30)


def test_arrays_that_do_not_belong_together_are_refused():
    values = {"x": np.ones(1)}
    with pytest.raises(ValueError, match="same arrays"):
        adamw(values, {"y": np.ones(1)}, AdamWState.start(values), 0.1)
