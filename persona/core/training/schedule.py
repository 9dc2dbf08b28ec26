"""Noise schedules: how much picture and how much noise a timestep has, and what the denoiser is asked to predict.

x_t = a·x0 + s·ε and target = p·x0 + q·ε, so one loss serves every kind of model. Schedules are read from the scheduler
config of a diffusers folder. Arithmetic is float64; the frameworks' own schedulers are float32 and agree to about 1e-5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from persona.core.host.errors import BaseModelError, did_you_mean
from persona.core.training.noise import uniforms

Floats = NDArray[np.float64]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class NoiseSchedule:
    """Signal and noise at each of the base's training timesteps.

    `signal` and `noise` [timesteps] float64 are a and s; `denoiser_times` [timesteps] float64 is what the denoiser is
    told for each: the timestep's own number, except in flow matching, where it is sigma × the number of timesteps.
    `prediction_type` is one of PREDICTION_TYPES.
    """

    prediction_type: str
    signal: Floats
    noise: Floats
    denoiser_times: Floats

    def __len__(self) -> int:
        return len(self.signal)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule of a diffusers scheduler config (scheduler_config.json).

        What the config leaves out is DDPMScheduler's or FlowMatchEulerDiscreteScheduler's default, as in diffusers.
        Raises BaseModelError for a beta schedule or prediction type that is not known.
        """
        if is_flow(config):
            sigmas = flow_sigmas(config)
            return cls("flow", 1.0 - sigmas, sigmas, sigmas * len(sigmas))
        prediction_type = str(config.get("prediction_type", "epsilon"))
        if prediction_type not in PREDICTION_TYPES:
            raise BaseModelError(
                f"prediction_type {prediction_type!r} in the base's scheduler config is not known.",
                hint=did_you_mean(prediction_type, PREDICTION_TYPES),
            )
        kept = np.cumprod(1.0 - betas(config))  # ᾱ, the share of the signal's variance that is left
        kept = np.clip(kept, 0.0, 1.0)
        return cls(prediction_type, np.sqrt(kept), np.sqrt(1.0 - kept), np.arange(len(kept), dtype=np.float64))

    def coefficients(self, timesteps: ArrayLike) -> tuple[Floats, Floats, Floats, Floats]:
        """(a, s, p, q), each [n] float64, for integer `timesteps` [n]: x_t = a·x0 + s·ε, target = p·x0 + q·ε.

        epsilon: p=0, q=1 · v (arXiv 2202.00512): p=−s, q=a · sample: p=1, q=0 · flow (arXiv 2210.02747): p=−1, q=1.
        """
        index = self._index(timesteps)
        a, s = self.signal[index], self.noise[index]
        zero, one = np.zeros_like(a), np.ones_like(a)
        p, q = {
            "epsilon": (zero, one),
            "v_prediction": (-s, a),
            "sample": (one, zero),
            "flow": (-one, one),
        }[self.prediction_type]
        return a, s, p, q

    def signal_to_noise(self, timesteps: ArrayLike) -> Floats:
        """The signal-to-noise ratio a²/s² at `timesteps` [n], float64."""
        index = self._index(timesteps)
        ratio: Floats = (self.signal[index] / self.noise[index]) ** 2
        return ratio

    def min_snr_weight(self, timesteps: ArrayLike, gamma: float) -> Floats:
        """Min-SNR-γ loss weights at `timesteps` [n], float64 (arXiv 2303.09556, equations of section 3.4).

        The paper weights the error in x0 by min(SNR, γ); for another prediction that is divided by how much its error
        is scaled on the way to x0: epsilon min(SNR, γ)/SNR · v min(SNR, γ)/(SNR + 1) · flow min(SNR, γ)·sigma².
        """
        ratio = self.signal_to_noise(timesteps)
        clipped = np.minimum(ratio, gamma)
        if self.prediction_type == "epsilon":
            # with a terminal SNR of zero the quotient is 0/0; its limit is 1
            return np.divide(clipped, ratio, out=np.ones_like(ratio), where=ratio > 0)
        if self.prediction_type == "v_prediction":
            return clipped / (ratio + 1.0)
        if self.prediction_type == "flow":
            return clipped * self.noise[self._index(timesteps)] ** 2
        return clipped

    def draw_timesteps(self, seed: int, update: int, slots: Sequence[int]) -> NDArray[np.int64]:
        """One timestep in 0..len−1 for each global sample slot, [n] int64, uniform; no state is involved."""
        drawn = uniforms(seed, "timestep", update, slots, ())
        return (drawn * len(self)).astype(np.int64)

    def times(self, timesteps: ArrayLike) -> NDArray[np.float32]:
        """What the denoiser is told at `timesteps` [n]: float32, whole numbers except in flow matching."""
        return self.denoiser_times[self._index(timesteps)].astype(np.float32)

    def _index(self, timesteps: ArrayLike) -> NDArray[np.int64]:
        index = np.asarray(timesteps, np.int64)
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise ValueError(f"timesteps {index.min()}..{index.max()} are not all in 0..{len(self) - 1}")
        return index


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler config is one of flow matching, by its class or its prediction type."""
    return "FlowMatch" in str(config.get("_class_name", "")) or config.get("prediction_type") in (
        "flow",
        "flow_prediction",
    )


def betas(config: Mapping[str, Any]) -> Floats:
    """β of each training timestep, [timesteps] float64 (diffusers, schedulers/scheduling_ddpm.py).

    Raises BaseModelError when the config names a `beta_schedule` that is not known.
    """
    count = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    name = str(config.get("beta_schedule", "linear"))
    if config.get("trained_betas") is not None:
        found = np.array(config["trained_betas"], np.float64)
    elif name == "linear":
        found = np.linspace(start, end, count)
    elif name == "scaled_linear":
        found = np.linspace(math.sqrt(start), math.sqrt(end), count) ** 2
    elif name == "squaredcos_cap_v2":
        found = squared_cosine_betas(count)
    else:
        raise BaseModelError(
            f"beta_schedule {name!r} in the base's scheduler config is not known.",
            hint=did_you_mean(name, BETA_SCHEDULES),
        )
    return zero_terminal_snr(found) if config.get("rescale_betas_zero_snr") else found


def squared_cosine_betas(count: int, largest: float = 0.999) -> Floats:
    """β of the squared-cosine schedule, [count] float64, none above `largest` (arXiv 2102.09672, section 3.2)."""
    kept = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    return np.array([min(1.0 - after / before, largest) for before, after in itertools.pairwise(kept)])


def zero_terminal_snr(values: Floats) -> Floats:
    """β rescaled so that the last timestep is noise only (arXiv 2305.08891, algorithm 1); [timesteps] float64."""
    root = np.sqrt(np.cumprod(1.0 - values))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    kept = root**2
    return 1.0 - np.concatenate([kept[:1], kept[1:] / kept[:-1]])


def flow_sigmas(config: Mapping[str, Any]) -> Floats:
    """Noise share sigma of each training timestep of flow matching, rising, [timesteps] float64.

    A `shift` other than 1 moves timesteps towards noise (arXiv 2403.03206, section 5.3.2). With `use_dynamic_shifting`
    the shift belongs to the picture's size and sampling only, and training is unshifted, as in diffusers.
    """
    count = int(config.get("num_train_timesteps", 1000))
    sigmas = np.arange(1, count + 1, dtype=np.float64) / count
    if config.get("use_dynamic_shifting"):
        return sigmas
    shift = float(config.get("shift", 1.0))
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)
