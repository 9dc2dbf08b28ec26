"""Pictures from prompts: classifier-free guidance with diffusers' own schedulers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from persona.core.host.contracts import SampleRequest
from persona.core.host.errors import UsageError, one_of
from persona.core.training.base import Base
from persona.core.training.noise import normal


@dataclass(frozen=True)
class Sampler:
    """A scheduler class of diffusers by module and name, with the options that make it this sampler."""

    module: str
    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)


_KEEP = {"clip_sample": False, "thresholding": False}  # diffusers' DDIM clips by default, which latents do not survive
SAMPLERS = {
    "ddim": Sampler("scheduling_ddim", "DDIMScheduler", _KEEP),
    "dpm++": Sampler(
        "scheduling_dpmsolver_multistep",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"},
    ),
    "euler": Sampler("scheduling_euler_discrete", "EulerDiscreteScheduler", {"final_sigmas_type": "zero"}),
    "euler-a": Sampler("scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteScheduler"),
    "unipc": Sampler(
        "scheduling_unipc_multistep", "UniPCMultistepScheduler", {"solver_type": "bh2", "solver_order": 2}
    ),
    "lcm": Sampler("scheduling_lcm", "LCMScheduler", _KEEP),
}
_SCHEDULE = (  # what a base's scheduler config decides whatever the sampler; the rest is the sampler's own
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "rescale_betas_zero_snr",
)

Conditioning = dict[str, Tensor]
Denoise = Callable[[Tensor, Tensor, Conditioning], Tensor]  # noisy latents, timesteps, conditioning → prediction


def make_scheduler(name: str, schedule: Mapping[str, Any]) -> Any:
    """The scheduler for sampler `name` over the base's noise `schedule`. Raises UsageError for an unknown name."""
    if name not in SAMPLERS:
        raise UsageError(f'There is no sampler "{name}".', hint=one_of(name, SAMPLERS))
    sampler = SAMPLERS[name]
    cls = getattr(importlib.import_module(f"diffusers.schedulers.{sampler.module}"), sampler.scheduler)
    accepted = inspect.signature(cls.__init__).parameters
    given = {key: schedule[key] for key in _SCHEDULE if key in schedule} | dict(sampler.options)
    return cls(**{key: value for key, value in given.items() if key in accepted})


def picture_size(base: Base, request: SampleRequest) -> tuple[int, int]:
    """Width and height of the pictures. Raises UsageError for a side the autoencoder cannot make."""
    width, height = request.width or base.native_size, request.height or base.native_size
    factor = base.latent_factor
    if min(width, height) < factor or width % factor or height % factor:
        raise UsageError(f"{base.id} makes pictures with sides of multiples of {factor}, not {width}x{height}.",
                         hint=f"--width {max(1, round(width / factor)) * factor} --height "
                              f"{max(1, round(height / factor)) * factor}")  # fmt: skip
    return width, height


def time_ids(width: int, height: int) -> list[float]:
    """SDXL's size conditioning of a picture made whole: original size, crop corner, target size (heights first)."""
    return [height, width, 0, 0, height, width]


def sample_latents(
    base: Base,
    request: SampleRequest,
    conditioning: Callable[[list[str], bool], Conditioning],
    denoise: Denoise,
    device: torch.device,
) -> Iterator[Tensor]:
    """Finished latents [≤ batch, c, h, w] float32, batch by batch.

    `conditioning(prompts, negative)` encodes prompts. Request n starts from the core's noise for its seed; samplers
    that add noise on the way draw it from a torch generator of that seed, so a picture does not depend on its batch.
    """
    if len(request.prompts) != len(request.seeds):
        raise UsageError(f"{len(request.prompts)} prompts and {len(request.seeds)} seeds: one seed each is needed.")
    if request.steps < 1:
        raise UsageError(f"{request.steps} sampling steps are too few.", hint="--steps 30")
    width, height = picture_size(base, request)
    shape = (base.latent_channels, height // base.latent_factor, width // base.latent_factor)
    guided = request.guidance_scale > 1.0
    size = max(1, request.batch)
    make_scheduler(request.sampler, base.schedule)  # an unknown name is refused before any work
    for first in range(0, len(request.prompts), size):
        prompts, seeds = request.prompts[first : first + size], request.seeds[first : first + size]
        given = conditioning(list(prompts), False)
        if guided:
            negative = conditioning([request.negative_prompt] * len(prompts), True)
            given = {key: torch.cat([negative[key], given[key]]) for key in given}
        if "pooled" in given:
            ids = torch.tensor([time_ids(width, height)], dtype=torch.float32, device=device)
            given["time_ids"] = ids.expand(len(given["pooled"]), -1)
        noise = np.stack([normal(seed, "sample", 0, 0, shape) for seed in seeds])
        yield _one_batch(request, base, torch.from_numpy(noise).to(device), seeds, given, denoise, guided)


def _one_batch(
    request: SampleRequest,
    base: Base,
    noise: Tensor,
    seeds: tuple[int, ...],
    given: Conditioning,
    denoise: Denoise,
    guided: bool,
) -> Tensor:
    scheduler = make_scheduler(request.sampler, base.schedule)
    scheduler.set_timesteps(request.steps, device=noise.device)
    extra: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = [torch.Generator("cpu").manual_seed(seed % 2**63) for seed in seeds]
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        if guided:
            scaled = torch.cat([scaled, scaled])
        prediction = denoise(scaled, timestep.expand(len(scaled)), given).float()
        if guided:
            without, with_prompt = prediction.chunk(2)
            prediction = without + request.guidance_scale * (with_prompt - without)
        latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
    return cast(Tensor, latents)
