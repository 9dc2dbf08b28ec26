"""Pictures from prompts: classifier-free guidance around a sampler, whatever computes the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from persona.core.host.contracts import SampleRequest
from persona.core.host.errors import UsageError
from persona.core.sampling.samplers import make_sampler
from persona.core.training.base import Base
from persona.core.training.noise import normal

Array = np.ndarray[Any, np.dtype[Any]]
Conditioning = Mapping[str, Array]  # as Session.encode_text gives it, with time_ids for SDXL
Encode = Callable[[list[str], bool], Conditioning]  # prompts; whether they are the negative ones
Denoise = Callable[[Array, float, Conditioning], Array]  # noisy latents, timestep, conditioning → prediction, float32


def sample_latents(base: Base, request: SampleRequest, encode: Encode, denoise: Denoise) -> Iterator[Array]:
    """Finished latents [≤ batch, c, h, w] float32, batch by batch.

    Request n starts from the noise of its seed, and samplers that add noise on the way draw it for that seed and step,
    so a picture does not depend on its batch. With guidance, `denoise` gets the negative half first."""
    if len(request.prompts) != len(request.seeds):
        raise UsageError(f"{len(request.prompts)} prompts and {len(request.seeds)} seeds: one seed each is needed.")
    if request.steps < 1:
        raise UsageError(f"{request.steps} sampling steps are too few.", hint="--steps 30")
    width, height = picture_size(base, request)
    shape = (base.latent_channels, height // base.latent_factor, width // base.latent_factor)
    guided = request.guidance_scale > 1.0
    size = max(1, request.batch)
    make_sampler(request.sampler, base.schedule, request.steps)  # what cannot work is refused before any work
    for first in range(0, len(request.prompts), size):
        prompts, seeds = request.prompts[first : first + size], request.seeds[first : first + size]
        given = dict(encode(list(prompts), False))
        if guided:
            negative = encode([request.negative_prompt] * len(prompts), True)
            given = {key: np.concatenate([negative[key], given[key]]) for key in given}
        if "pooled" in given:
            given["time_ids"] = np.array([time_ids(width, height)] * len(given["pooled"]), np.float32)
        yield _one_batch(base, request, seeds, shape, given, denoise if not guided else _guided(denoise, request))


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


def _one_batch(
    base: Base,
    request: SampleRequest,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    given: Conditioning,
    denoise: Denoise,
) -> Array:
    sampler = make_sampler(request.sampler, base.schedule, request.steps)
    latents = sampler.start(np.stack([normal(seed, "sample", 0, 0, shape) for seed in seeds]))
    for index, timestep in enumerate(sampler.timesteps):

        def draw(step: int = index) -> Array:
            return np.stack([normal(seed, "sampler", step, 0, shape) for seed in seeds])

        prediction = denoise(sampler.model_input(index, latents), float(timestep), given)
        latents = np.asarray(sampler.step(index, latents, prediction, draw), np.float32)
    return latents


def _guided(denoise: Denoise, request: SampleRequest) -> Denoise:
    """Classifier-free guidance (arXiv 2207.12598) around a denoiser."""

    def both(noisy: Array, timestep: float, given: Conditioning) -> Array:
        without, with_prompt = np.split(denoise(np.concatenate([noisy, noisy]), timestep, given), 2)
        return np.asarray(without + np.float32(request.guidance_scale) * (with_prompt - without), np.float32)

    return both
