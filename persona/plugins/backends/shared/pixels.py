"""Pictures on their way through an autoencoder, in slices that bound the memory."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

PIXELS_AT_ONCE = 4 * 512 * 512


def picture_slices(pictures: Array) -> list[Array]:
    """[n, 3, h, w] in parts of about PIXELS_AT_ONCE pixels, float32."""
    return _slices(pictures, pictures.shape[2] * pictures.shape[3])


def latent_slices(latents: Array, factor: int) -> list[Array]:
    """[n, c, h, w] in parts that decode to about PIXELS_AT_ONCE pixels, float32; a latent pixel is factor² of them."""
    return _slices(latents, latents.shape[2] * latents.shape[3] * factor**2)


def to_pixels(pictures: Array) -> Array:
    """[n, 3, h, w] in −1..1 to [n, h, w, 3] uint8."""
    values = np.clip(pictures / 2 + 0.5, 0, 1) * 255
    return np.ascontiguousarray(values.round().astype(np.uint8).transpose(0, 2, 3, 1))


def _slices(values: Array, pixels: int) -> list[Array]:
    count = max(1, PIXELS_AT_ONCE // pixels)
    values = np.ascontiguousarray(values, np.float32)
    return [values[first : first + count] for first in range(0, len(values), count)]
