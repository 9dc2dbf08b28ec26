"""One micro-batch as it goes to a backend: numpy arrays and the numbers that turn them into a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Batch:
    """n samples. x_t = a·x0 + s·ε; target = p·x0 + q·ε; loss = Σ w·mean((prediction − target)²).

    `latents` is x0, already drawn from the cached moments and scaled, [n, c, h, w] float32; `noise` is ε, the same
    shape; `timesteps` [n] as the denoiser takes them; `a, s, p, q, w` [n] float32 (w holds min-SNR, the stream's
    weight and 1/(samples per update)). `captions` are given when a text encoder is trained or new tokens exist, else
    `embeddings` are the cached outputs of `Session.encode_text`. `time_ids` [n, 6] for SDXL. `mask` [n, 1, h, w]
    multiplies the squared error when given.
    """

    latents: Array
    noise: Array
    timesteps: Array
    a: Array
    s: Array
    p: Array
    q: Array
    w: Array
    captions: tuple[str, ...] = ()
    embeddings: Mapping[str, Array] = field(default_factory=dict)
    time_ids: Array | None = None
    mask: Array | None = None

    def __len__(self) -> int:
        return int(self.latents.shape[0])

    def of_no_weight(self) -> Batch:
        """Its first sample, which counts for nothing: for a process that has to compute and has nothing to."""
        values: dict[str, Any] = {name: value if value is None else value[:1] for name, value in vars(self).items()
                                  if name != "embeddings"}  # fmt: skip
        values["w"] = np.zeros(1, np.float32)
        values["embeddings"] = {name: value[:1] for name, value in self.embeddings.items()}
        return Batch(**values)
