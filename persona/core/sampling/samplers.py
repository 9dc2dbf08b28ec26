"""Samplers: how noise becomes a latent, step by step, from what a denoiser predicts. Framework-free, so that a seed
draws the same picture on every backend; the denoiser is asked by the loop (core/sampling/loop.py).

Every sampler knows the base's noise schedule at its own `timesteps` and keeps latents in its own scale: `start` makes
them of noise, `model_input` is what the denoiser is shown, `step` goes on to the next. Arrays are [n, c, h, w] float32,
coefficients float64. The timesteps are diffusers' own (the classes named below), so a picture is diffusers' picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from persona.core.host.errors import UsageError, one_of
from persona.core.training.schedule import NoiseSchedule

Array = np.ndarray[Any, np.dtype[Any]]
Draw = Callable[[], Array]  # fresh noise, shaped as the latents

SMALLEST_SIGNAL = 2.0**-24
"""ᾱ of a last timestep that is noise only (zero terminal SNR), where its logarithm is needed; diffusers' own figure."""


class Sampler:
    """What samplers share: the schedule, the grid of timesteps, and x0 out of a prediction."""

    spacing: ClassVar[str] = "linspace"  # where the base's scheduler config says nothing
    reserved: ClassVar[int] = 0  # 1: the grid is made for one more step, and its last point is left out
    rounded: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        schedule = NoiseSchedule.from_config(config)
        if schedule.prediction_type == "flow":
            raise UsageError("This sampler is not for flow matching.")
        self._kind, self._config, self._steps = schedule.prediction_type, config, steps
        self._kept = schedule.signal**2  # ᾱ
        self.timesteps = self._grid(steps)

    def start(self, noise: Array) -> Array:
        """The first latents."""
        return noise

    def model_input(self, index: int, latents: Array) -> Array:
        """What the denoiser is shown at step `index`."""
        return latents

    def step(self, index: int, latents: Array, prediction: Array, draw: Draw) -> Array:
        """The latents after step `index`, from the denoiser's prediction."""
        raise NotImplementedError

    def _grid(self, steps: int) -> Array:
        """[steps] float64, falling: linspace, leading or trailing (arXiv 2305.08891, table 2)."""
        count, wanted = len(self._kept), steps + self.reserved
        spacing = str(self._config.get("timestep_spacing", self.spacing))
        if spacing == "linspace":
            grid = np.linspace(0, count - 1, wanted)[::-1]
        elif spacing == "leading":
            grid = (np.arange(wanted) * (count // wanted))[::-1].astype(np.float64)
        elif spacing == "trailing":
            grid = np.arange(count, 0, -count / steps).round() - 1
        else:
            raise UsageError(f'The base\'s scheduler config has a timestep_spacing "{spacing}".',
                             hint="It has to be linspace, leading or trailing.")  # fmt: skip
        grid = grid.round() if self.rounded else grid
        if spacing == "leading":
            grid = grid + int(self._config.get("steps_offset", 0))
        return np.asarray(grid[:steps], np.float64)

    def _x0(self, shown: Array, prediction: Array, kept: float) -> Array:
        """The clean latents that a prediction means, from what the denoiser was shown at ᾱ = `kept`."""
        signal, noise = math.sqrt(kept), math.sqrt(1.0 - kept)
        if self._kind == "epsilon":
            return (shown - noise * prediction) / signal
        return prediction if self._kind == "sample" else signal * shown - noise * prediction


class Ddim(Sampler):
    """DDIM without noise on the way, η = 0 (arXiv 2010.02502, equation 12); diffusers' DDIMScheduler without its
    clipping, which latents do not survive."""

    spacing = "leading"

    def step(self, index: int, latents: Array, prediction: Array, draw: Draw) -> Array:
        """√ᾱ' · x0 + √(1−ᾱ') · ε."""
        now = int(self.timesteps[index])
        before = now - len(self._kept) // self._steps
        kept, after = float(self._kept[now]), self._final()
        if before >= 0:
            after = float(self._kept[before])
        signal, noise = math.sqrt(kept), math.sqrt(1.0 - kept)
        if self._kind == "epsilon":
            x0, epsilon = (latents - noise * prediction) / signal, prediction
        elif self._kind == "v_prediction":
            x0, epsilon = signal * latents - noise * prediction, signal * prediction + noise * latents
        else:
            x0, epsilon = prediction, (latents - signal * prediction) / noise
        return math.sqrt(after) * x0 + math.sqrt(1.0 - after) * epsilon

    def _final(self) -> float:
        return 1.0 if self._config.get("set_alpha_to_one", True) else float(self._kept[0])


class _Sigmas(Sampler):
    """Samplers that count in σ = √((1−ᾱ)/ᾱ), the noise of latents whose signal is 1; the last σ is 0."""

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        kept = np.maximum(self._kept, SMALLEST_SIGNAL)
        known = np.sqrt((1.0 - kept) / kept)
        sigmas = np.interp(self.timesteps, np.arange(len(known)), known)
        self._sigmas = [*(float(sigma) for sigma in sigmas), 0.0]

    def _kept_at(self, index: int) -> float:
        return 1.0 / (1.0 + self._sigmas[index] ** 2)


class Euler(_Sigmas):
    """Euler's method in σ (arXiv 2206.00364, algorithm 2 without its noise); diffusers' EulerDiscreteScheduler."""

    rounded = False

    def start(self, noise: Array) -> Array:
        """Noise as strong as the first σ; on a grid that does not begin at the end, with the signal's share."""
        largest = self._sigmas[0]
        leading = self._config.get("timestep_spacing", self.spacing) == "leading"
        return noise * (math.sqrt(largest**2 + 1.0) if leading else largest)

    def model_input(self, index: int, latents: Array) -> Array:
        """Latents scaled to variance 1."""
        return latents / math.sqrt(self._sigmas[index] ** 2 + 1.0)

    def step(self, index: int, latents: Array, prediction: Array, draw: Draw) -> Array:
        """x0 + σ'/σ · (x − x0)."""
        x0 = self._x0(self.model_input(index, latents), prediction, self._kept_at(index))
        return x0 + (latents - x0) * (self._sigmas[index + 1] / self._sigmas[index])


class EulerAncestral(Euler):
    """Euler's method with fresh noise in every step (k-diffusion, sample_euler_ancestral); diffusers'
    EulerAncestralDiscreteScheduler."""

    def step(self, index: int, latents: Array, prediction: Array, draw: Draw) -> Array:
        """Down to less than σ', and up to it with noise."""
        x0 = self._x0(self.model_input(index, latents), prediction, self._kept_at(index))
        now, after = self._sigmas[index], self._sigmas[index + 1]
        up = math.sqrt(after**2 * (now**2 - after**2) / now**2)
        down = math.sqrt(after**2 - up**2)
        moved = x0 + (latents - x0) * (down / now)
        return moved + draw() * up if up else moved


class _Multistep(_Sigmas):
    """Solvers in λ = −ln σ that remember the x0 of the step before."""

    reserved = 1

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        self._x0s: list[Array] = []

    def _signal(self, index: int) -> float:
        return math.sqrt(self._kept_at(index))

    def _noise(self, index: int) -> float:
        return self._sigmas[index] * self._signal(index)

    def _lambda(self, index: int) -> float:
        return -math.log(self._sigmas[index]) if self._sigmas[index] > 0 else math.inf

    def _remember(self, index: int, latents: Array, prediction: Array) -> Array:
        x0 = self._x0(latents, prediction, self._kept_at(index))
        self._x0s = [*self._x0s[-1:], x0]
        return x0


class DpmSolver(_Multistep):
    """DPM-Solver++ (2M), midpoint (arXiv 2211.01095, algorithm 2); diffusers' DPMSolverMultistepScheduler. The first
    and the last step are of first order."""

    def step(self, index: int, latents: Array, prediction: Array, draw: Draw) -> Array:
        """One step of second order where there is a step before."""
        x0 = self._remember(index, latents, prediction)
        width = self._lambda(index + 1) - self._lambda(index)
        grown = -self._signal(index + 1) * math.expm1(-width)
        moved = latents * (self._noise(index + 1) / self._noise(index)) + grown * x0
        if index == 0 or index == self._steps - 1:
            return moved
        ratio = (self._lambda(index) - self._lambda(index - 1)) / width
        return moved + (x0 - self._x0s[0]) * (0.5 * grown / ratio)


class UniPc(_Multistep):
    """UniPC of order 2 with B(h) = e^h − 1 (arXiv 2302.04867, algorithm 1); diffusers' UniPCMultistepScheduler. A step
    corrects the latents with what was just predicted there, and then goes on."""

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        self._before: Array | None = None  # the latents that the last prediction step started from

    def step(self, index: int, latents: Array, prediction: Array, draw: Draw) -> Array:
        """Correct, then predict."""
        x0s = list(self._x0s)
        x0 = self._remember(index, latents, prediction)
        if self._before is not None:
            latents = self._corrected(index, self._before, x0s, x0)
        self._before = latents
        base, grown, width = self._first_order(index + 1, latents, x0)
        if self._order(index) == 1:
            return base
        ratio = (self._lambda(index - 1) - self._lambda(index)) / width
        return base + (self._x0s[0] - x0) * (0.5 * grown / ratio)

    def _order(self, index: int) -> int:
        return min(2, self._steps - index, index + 1)

    def _first_order(self, to: int, latents: Array, x0: Array) -> tuple[Array, float, float]:
        """The step from to−1 to `to` with a constant x0; −α·(e^−h − 1); h."""
        width = self._lambda(to) - self._lambda(to - 1)
        grown = -self._signal(to) * math.expm1(-width)
        return latents * (self._noise(to) / self._noise(to - 1)) + grown * x0, grown, width

    def _corrected(self, index: int, before: Array, x0s: list[Array], x0: Array) -> Array:
        base, grown, width = self._first_order(index, before, x0s[-1])
        if self._order(index - 1) == 1:
            return base + (x0 - x0s[-1]) * (0.5 * grown)
        ratio = (self._lambda(index - 2) - self._lambda(index - 1)) / width
        once = math.expm1(-width) / -width - 1.0
        twice = once / -width - 0.5
        factors = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], np.array([once, 2.0 * twice]) / math.expm1(-width))
        return base + grown * (float(factors[0]) / ratio * (x0s[0] - x0s[1]) + float(factors[1]) * (x0 - x0s[1]))


class Lcm(Sampler):
    """Latent consistency models (arXiv 2310.04378, algorithm 3) with their 50 original steps; diffusers' LCMScheduler
    without clipping."""

    def _grid(self, steps: int) -> Array:
        original = 50
        if steps > original:
            raise UsageError(f"lcm has at most {original} steps, not {steps}.", hint="--steps 8")
        known = (np.arange(1, original + 1) * (len(self._kept) // original) - 1)[::-1]
        chosen: Array = known[np.floor(np.linspace(0, original, num=steps, endpoint=False)).astype(np.int64)]
        return chosen.astype(np.float64)

    def step(self, index: int, latents: Array, prediction: Array, draw: Draw) -> Array:
        """x0 with the boundary condition's share of the latents, and fresh noise up to the next timestep."""
        now = int(self.timesteps[index])
        x0 = self._x0(latents, prediction, float(self._kept[now]))
        scaled = now * 10.0  # timestep_scaling
        denoised = x0 * (scaled / math.sqrt(scaled**2 + 0.25)) + latents * (0.25 / (scaled**2 + 0.25))
        if index == self._steps - 1:
            return denoised
        kept = float(self._kept[int(self.timesteps[index + 1])])
        return math.sqrt(kept) * denoised + math.sqrt(1.0 - kept) * draw()


SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": Ddim,
    "dpm++": DpmSolver,
    "euler": Euler,
    "euler-a": EulerAncestral,
    "unipc": UniPc,
    "lcm": Lcm,
}


def make_sampler(name: str, schedule: Mapping[str, Any], steps: int) -> Sampler:
    """The sampler `name` over the base's noise `schedule`. Raises UsageError for an unknown name."""
    if name not in SAMPLERS:
        raise UsageError(f'There is no sampler "{name}".', hint=one_of(name, SAMPLERS))
    return SAMPLERS[name](schedule, steps)
