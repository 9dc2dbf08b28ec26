"""The autoencoder: pictures to latent moments, latents to pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from persona.core.host.errors import NotFinite, TrainingError
from persona.plugins.backends.shared.pixels import latent_slices, picture_slices, to_pixels


class Autoencoder:
    """An AutoencoderKL with a guard against fp16: where a result is not finite, the weights are read again in fp32
    and the work is done again (SDXL's VAE overflows in fp16).

    `read_again` loads the component in fp32; `note` is told when that happened."""

    def __init__(self, model: nn.Module, read_again: Callable[[], nn.Module], note: Callable[[str], None]) -> None:
        self.model: Any = model
        self._read_again, self._note = read_again, note

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n, 3, h, w] float32 in −1..1 to mean and log-variance [n, c, h/f, w/f] float32, unscaled."""
        moments = [self._guarded(self._moments, torch.from_numpy(part)) for part in picture_slices(pictures)]
        both = torch.cat(moments).cpu().numpy()
        mean, logvar = np.split(both, 2, axis=1)
        return mean, np.clip(logvar, -30.0, 20.0)  # DiagonalGaussianDistribution's own limits

    @torch.no_grad()
    def decode(self, latents: np.ndarray, factor: int) -> np.ndarray:
        """Latents [n, c, h, w] as the denoiser has them to pictures [n, h·f, w·f, 3] uint8."""
        config = self.model.config
        shift = float(getattr(config, "shift_factor", None) or 0.0)
        scaled = latents / np.float32(config.scaling_factor) + np.float32(shift)
        parts = [self._guarded(self._decoded, torch.from_numpy(part)) for part in latent_slices(scaled, factor)]
        return to_pixels(torch.cat(parts).cpu().numpy())

    def _guarded(self, work: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        if not torch.isfinite(given).all():
            raise NotFinite("What the denoiser made is not finite.", hint="Try --precision fp32.")
        result = work(given)
        if torch.isfinite(result).all():
            return result
        if self.model.dtype == torch.float32:
            raise TrainingError("The autoencoder's result is not finite, even in fp32.",
                                hint="Its weights are damaged: download the base again.")  # fmt: skip
        self.model = self._read_again()
        self._note("The autoencoder overflowed in fp16, so it runs in fp32 from here on.")
        return self._guarded(work, given)

    def _moments(self, pictures: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        hidden = self.model.encoder(pictures.to(weight.device, weight.dtype))
        return cast(Tensor, (hidden if self.model.quant_conv is None else self.model.quant_conv(hidden)).float())

    def _decoded(self, latents: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        return cast(Tensor, self.model.decode(latents.to(weight.device, weight.dtype), return_dict=False)[0].float())
