"""The values a LoRA starts from: `down` is drawn, `up` is zero, so that the first step starts from the base itself.

Values belong to the seed and the module's name, not to the order modules are visited in, so every backend and every
choice of targets gives a module the same start.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from persona.core.host.errors import UsageError, did_you_mean
from persona.core.training.noise import normal, uniform

INITIALISATIONS = ("kaiming", "gaussian", "orthogonal")


def initial_down(seed: int, name: str, shape: tuple[int, ...], initialisation: str = "kaiming") -> NDArray[np.float32]:
    """The start of `down` [rank, in] or [rank, in, kh, kw], float32, of the module `name` ("unet.…attn1.to_q").

    kaiming: uniform within ±1/√fan_in, which is what torch's kaiming_uniform_(a=√5) comes to and what kohya and PEFT
    start from (peft/tuners/lora/layer.py). gaussian: normal with standard deviation 1/rank (PEFT's and the diffusers
    scripts' init_lora_weights="gaussian"). orthogonal: rows at right angles, as long as kaiming's are on average
    (√⅓), so that no two of them begin alike (the idea of PEFT's init_lora_weights="orthogonal"); with more rows than
    columns they can only be so in groups. Raises UsageError for another initialisation.
    """
    if initialisation == "kaiming":
        fan_in = math.prod(shape[1:])
        spread = uniform(seed, f"lora down {name}", 0, 0, shape) * 2.0 - 1.0
        return (spread / math.sqrt(fan_in)).astype(np.float32)
    if initialisation == "gaussian":
        return (normal(seed, f"lora down {name}", 0, 0, shape) / shape[0]).astype(np.float32)
    if initialisation == "orthogonal":
        rows = normal(seed, f"lora down {name}", 0, 0, (shape[0], math.prod(shape[1:]))).astype(np.float64)
        return (orthonormal(rows) * math.sqrt(1.0 / 3.0)).reshape(shape).astype(np.float32)
    raise UsageError(
        f"There is no LoRA initialisation {initialisation!r}.", hint=did_you_mean(initialisation, INITIALISATIONS)
    )


def orthonormal(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows [n, width] made orthogonal and of length 1, one after the other (Gram and Schmidt, twice for accuracy;
    not LAPACK's QR, whose last bits and signs depend on the machine). Rows beyond the width begin anew."""
    width = rows.shape[1]
    found = np.empty_like(rows)
    for number, row in enumerate(rows):
        before = found[number - number % width : number]
        for _ in range(2):
            row = row - (before * (before * row).sum(1, keepdims=True)).sum(0)
        found[number] = row / np.sqrt((row * row).sum())
    return found


def initial_up(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The start of `up` [out, rank] or [out, rank, 1, 1]: zeros, float32."""
    return np.zeros(shape, np.float32)
