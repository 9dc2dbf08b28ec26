"""The autoencoder: pictures to latent moments, latents to pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from persona.core.host.errors import NotFinite, TrainingError
from persona.plugins.backends.mindspore.cells import array_of
from persona.plugins.backends.shared.pixels import latent_slices, picture_slices, to_pixels

Array = np.ndarray[Any, np.dtype[Any]]


class Autoencoder:
    """An AutoencoderKL in fp32, which is what it is loaded in whatever a run's precision (SDXL's overflows in fp16)."""

    def __init__(self, model: nn.Cell) -> None:
        self._model: Any = model

    def encode(self, pictures: Array) -> tuple[Array, Array]:
        """[n, 3, h, w] float32 in −1..1 to mean and log-variance [n, c, h/f, w/f] float32, unscaled."""
        mean, logvar = np.split(_computed(self._moments, picture_slices(pictures)), 2, axis=1)
        return mean, np.clip(logvar, -30.0, 20.0)  # DiagonalGaussianDistribution's own limits

    def decode(self, latents: Array, factor: int) -> Array:
        """Latents [n, c, h, w] as the denoiser has them to pictures [n, h·f, w·f, 3] uint8."""
        config = self._model.config
        shift = float(getattr(config, "shift_factor", None) or 0.0)
        if not np.isfinite(latents).all():
            raise NotFinite("What the denoiser made is not finite.", hint="Try --precision fp32.")
        parts = latent_slices(latents / config.scaling_factor + shift, factor)
        return to_pixels(_computed(lambda part: self._model.decode(part, return_dict=False)[0], parts))

    def _moments(self, pictures: Tensor) -> Tensor:
        hidden = self._model.encoder(pictures)
        return hidden if self._model.quant_conv is None else self._model.quant_conv(hidden)


def _computed(work: Callable[[Tensor], Tensor], parts: list[Array]) -> Array:
    result = np.concatenate([array_of(work(Tensor(part))) for part in parts])
    if not np.isfinite(result).all():
        raise TrainingError("The autoencoder's result is not finite, even in fp32.",
                            hint="Its weights are damaged: download the base again.")  # fmt: skip
    return result
