"""The schedules of every kind of base, against the schedulers of diffusers themselves."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from persona.core.host.errors import BaseModelError
from persona.core.training.schedule import NoiseSchedule

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
CONFIGS = {
    "diffusers' defaults": {},
    "sd1": SD,
    "sd2 v": {**SD, "prediction_type": "v_prediction"},
    "kolors": {**SD, "beta_end": 0.014, "num_train_timesteps": 1100},
    "squared cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    "zero terminal snr": {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "own betas": {"trained_betas": [0.01, 0.02, 0.05, 0.1, 0.4], "num_train_timesteps": 5},
}


def noised(schedule, picture, noise, timesteps):
    a, s, _, _ = (c.reshape(-1, 1, 1, 1) for c in schedule.coefficients(timesteps))
    return a * picture + s * noise


def target(schedule, picture, noise, timesteps):
    _, _, p, q = (c.reshape(-1, 1, 1, 1) for c in schedule.coefficients(timesteps))
    return p * picture + q * noise


def sample(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 4, 3, 3, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("name", CONFIGS)
def test_noised_pictures_and_targets_are_those_of_diffusers_at_every_timestep(name):
    config = CONFIGS[name]
    theirs, ours = DDPMScheduler(**config), NoiseSchedule.from_config(config)
    assert len(ours) == theirs.config.num_train_timesteps
    timesteps = torch.arange(len(ours))
    picture, noise = sample(len(ours))
    expected = theirs.add_noise(picture, noise, timesteps)
    np.testing.assert_allclose(noised(ours, picture.numpy(), noise.numpy(), timesteps), expected, atol=5e-5)
    kinds = {
        "epsilon": noise,
        "sample": picture,
        "v_prediction": theirs.get_velocity(picture, noise, timesteps),
    }
    expected = kinds[theirs.config.prediction_type]
    np.testing.assert_allclose(target(ours, picture.numpy(), noise.numpy(), timesteps), expected, atol=5e-5)


@pytest.mark.parametrize("name", ["sd1", "kolors", "squared cosine", "own betas"])
def test_signal_to_noise_is_that_of_diffusers(name):
    theirs, ours = DDPMScheduler(**CONFIGS[name]), NoiseSchedule.from_config(CONFIGS[name])
    timesteps = torch.arange(len(ours))
    expected = compute_snr(theirs, timesteps).numpy()
    solid = expected > 1e-6  # below, float32 has lost the digits of 1 − β
    np.testing.assert_allclose(ours.signal_to_noise(timesteps)[solid], expected[solid], rtol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_matching_is_that_of_diffusers_at_every_timestep(shift):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift, "num_train_timesteps": 1000}
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    ours = NoiseSchedule.from_config(config)
    timesteps = np.arange(1000)
    np.testing.assert_allclose(ours.times(timesteps), theirs.timesteps.numpy()[::-1], rtol=1e-5)
    picture, noise = sample(1000)
    expected = theirs.scale_noise(picture, theirs.timesteps.flip(0), noise)
    np.testing.assert_allclose(noised(ours, picture.numpy(), noise.numpy(), timesteps), expected, atol=1e-5)
    # the field's flow target, v = ε − x0 (diffusers, examples/dreambooth/train_dreambooth_lora_sd3.py)
    np.testing.assert_allclose(target(ours, picture.numpy(), noise.numpy(), timesteps), noise - picture, atol=1e-6)


def test_dynamic_shifting_leaves_training_unshifted():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    ours = NoiseSchedule.from_config(dict(theirs.config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    np.testing.assert_allclose(ours.noise, theirs.sigmas.numpy()[::-1], rtol=1e-5)


def test_the_config_that_a_sampler_saved_will_do():
    theirs = EulerDiscreteScheduler(**SD, prediction_type="epsilon")
    ours = NoiseSchedule.from_config(dict(theirs.config))
    np.testing.assert_allclose(ours.signal**2, theirs.alphas_cumprod.numpy(), rtol=1e-4)
    assert ours.times([0, 999]).tolist() == [0.0, 999.0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_error_in_the_picture_by_the_clipped_ratio(prediction_type, gamma):
    """Written differently: the picture is solved from x_t and the target, x0 = (q·x_t − s·target)/(a·q − s·p), so an
    error in the target counts |s/(a·q − s·p)|² times in x0, where the paper's weight is min(SNR, γ)."""
    schedule = NoiseSchedule.from_config({**SD, "prediction_type": prediction_type})
    timesteps = np.arange(1000)
    a, s, p, q = schedule.coefficients(timesteps)
    expected = np.minimum(a**2 / s**2, gamma) * (s / (a * q - s * p)) ** 2
    np.testing.assert_allclose(schedule.min_snr_weight(timesteps, gamma), expected, rtol=1e-9)


def test_min_snr_weights_are_those_of_the_diffusers_scripts():
    """examples/dreambooth/train_dreambooth.py: base weight min(snr, γ)/snr, with snr + 1 below for v-prediction."""
    timesteps = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(**SD), timesteps)
    clipped = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    for prediction_type, divisor in (("epsilon", snr), ("v_prediction", snr + 1)):
        ours = NoiseSchedule.from_config({**SD, "prediction_type": prediction_type})
        np.testing.assert_allclose(ours.min_snr_weight(timesteps, 5.0), (clipped / divisor).numpy(), rtol=1e-3)


def test_min_snr_of_pure_noise_is_finite():
    schedule = NoiseSchedule.from_config({**SD, "rescale_betas_zero_snr": True})
    assert schedule.signal_to_noise([999]).tolist() == [0.0]
    assert schedule.min_snr_weight([999], 5.0).tolist() == [1.0]


def test_timesteps_are_uniform_and_belong_to_their_slot():
    schedule = NoiseSchedule.from_config(SD)
    drawn = schedule.draw_timesteps(0, 3, range(20_000))
    assert drawn.dtype == np.int64 and drawn.min() == 0 and drawn.max() == 999
    counts = np.bincount(drawn // 100, minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-squared, 9 degrees of freedom, 0.1 %
    assert schedule.draw_timesteps(0, 3, [7, 19_999]).tolist() == [drawn[7], drawn[19_999]]
    assert schedule.draw_timesteps(0, 4, range(50)).tolist() != drawn[:50].tolist()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"beta_schedule": "scaled_liner"}, "Did you mean scaled_linear"),
        ({"prediction_type": "v-prediction"}, "Did you mean v_prediction"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(config, words):
    with pytest.raises(BaseModelError, match=words):
        NoiseSchedule.from_config(config)


def test_timesteps_outside_the_schedule_are_refused():
    with pytest.raises(ValueError, match=r"1000"):
        NoiseSchedule.from_config(SD).coefficients([1000])
