"""Every sampler against diffusers' scheduler of the same name, over schedules as published and odd ones."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from persona.core.host.errors import UsageError
from persona.core.sampling.samplers import SAMPLERS, make_sampler
from tests.narrow_models import scheduler_config

SOLVERS = {"final_sigmas_type": "zero", "solver_order": 2}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", SOLVERS | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}),
    "euler": ("EulerDiscreteScheduler", {"final_sigmas_type": "zero"}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", SOLVERS | {"solver_type": "bh2"}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "sd1": scheduler_config("sd1"),
    "sd2": scheduler_config("sd2"),
    "trailing": scheduler_config("sd1") | {"timestep_spacing": "trailing", "set_alpha_to_one": True},
    "linspace": scheduler_config("sd2") | {"timestep_spacing": "linspace", "steps_offset": 0},
    "zero snr": scheduler_config("sd2") | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
}
SHAPE = (2, 4, 6, 6)


def denoise(noisy: Any, timestep: float) -> Any:
    """A made-up denoiser that depends on everything it is given."""
    return np.float32(0.7) * np.tanh(noisy + np.float32(timestep / 900.0)) - np.float32(0.1) * noisy.mean()


def theirs(name: str, schedule: dict[str, Any], steps: int, noise: Any, drawn: list[Any]) -> Any:
    cls, options = THEIRS[name]
    known = {k: v for k, v in schedule.items() if not k.startswith("_") and k != "clip_sample"}
    accepted = getattr(diffusers, cls).__init__.__wrapped__.__code__.co_varnames
    scheduler = getattr(diffusers, cls)(**({k: v for k, v in known.items() if k in accepted} | options))
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, timestep).float()
        prediction = torch.from_numpy(denoise(shown.numpy(), float(timestep)))
        x = scheduler.step(prediction, timestep, x, return_dict=False)[0]
    return x.numpy()


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_are_those_of_diffusers(name: str, schedule: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SCHEDULES[schedule]
    if name == "lcm" and schedule == "zero snr":
        pytest.skip("LCM divides by the signal, which is zero at the first timestep there")
    random = np.random.default_rng(steps)
    noise = random.standard_normal(SHAPE, np.float32)
    fresh = [random.standard_normal(SHAPE, np.float32) for _ in range(steps)]
    queue = iter(fresh)
    for module in ("scheduling_lcm", "scheduling_euler_ancestral_discrete"):
        monkeypatch.setattr(
            f"diffusers.schedulers.{module}.randn_tensor", lambda *_, **__: torch.from_numpy(next(queue))
        )
    expected = theirs(name, config, steps, noise, fresh)
    own = iter(fresh)
    sampler = make_sampler(name, config, steps)
    x = sampler.start(noise)
    for index, timestep in enumerate(sampler.timesteps):
        shown = np.asarray(sampler.model_input(index, x), np.float32)
        x = sampler.step(index, x, denoise(shown, float(timestep)), lambda: next(own))
        assert x.dtype == np.float32
    np.testing.assert_allclose(x, expected, rtol=2e-3, atol=2e-3 * float(np.abs(expected).max()))
    assert float(np.abs(x - expected).mean()) < 2e-4 * float(np.abs(expected).mean())


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UsageError, match='no sampler "dpm"') as unknown:
        make_sampler("dpm", SCHEDULES["sd1"], 5)
    assert "dpm++" in unknown.value.hint
    with pytest.raises(UsageError, match="at most 50"):
        make_sampler("lcm", SCHEDULES["sd1"], 51)
    with pytest.raises(UsageError, match="timestep_spacing"):
        make_sampler("ddim", {"timestep_spacing": "tight"}, 5)
    with pytest.raises(UsageError, match="flow"):
        make_sampler("euler", {"prediction_type": "flow"}, 5)
