"""The autoencoder: pictures to latent moments, latents to pictures; in fp32 whatever the precision of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from persona.core.host.errors import NotFinite
from persona.plugins.backends.paddle.layout import Array
from persona.plugins.backends.shared.pixels import latent_slices, picture_slices, to_pixels


class Autoencoder:
    """An AutoencoderKL of ppdiffusers."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @paddle.no_grad()
    def encode(self, pictures: Array) -> tuple[Array, Array]:
        """[n, 3, h, w] float32 in −1..1 to mean and log-variance [n, c, h/f, w/f] float32, unscaled."""
        moments = [self._moments(part) for part in picture_slices(pictures)]
        mean, logvar = np.split(np.concatenate(moments), 2, axis=1)
        return mean, np.clip(logvar, -30.0, 20.0)  # DiagonalGaussianDistribution's own limits

    @paddle.no_grad()
    def decode(self, latents: Array, factor: int) -> Array:
        """Latents [n, c, h, w] as the denoiser has them to pictures [n, h·f, w·f, 3] uint8."""
        if not np.isfinite(latents).all():
            raise NotFinite("What the denoiser made is not finite.", hint="Try --precision fp32.")
        config = self._model.config
        scaled = latents / np.float32(config.scaling_factor) + np.float32(getattr(config, "shift_factor", None) or 0.0)
        parts = [self._model.decode(paddle.to_tensor(part), return_dict=False)[0].numpy()
                 for part in latent_slices(scaled, factor)]  # fmt: skip
        return to_pixels(np.concatenate(parts))

    def _moments(self, pictures: Array) -> Array:
        hidden = self._model.encoder(paddle.to_tensor(pictures))
        values: Array = (hidden if self._model.quant_conv is None else self._model.quant_conv(hidden)).numpy()
        return values
