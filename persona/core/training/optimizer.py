"""The AdamW that every backend's must match: bias-corrected, with decoupled weight decay, in plain numpy.

It is the reference, not what a run computes with: a backend updates on its own device. (MindSpore's own AdamW has no
bias correction, so matching this is not a matter of course.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class AdamWState:
    """What AdamW remembers: `m` and `v`, running means of gradients and of their squares, and steps made so far."""

    m: Arrays
    v: Arrays
    step: int = 0

    @classmethod
    def start(cls, values: Arrays) -> AdamWState:
        """The state before the first step: zeros, shaped as `values`."""
        return cls(
            {name: np.zeros_like(value) for name, value in values.items()},
            {name: np.zeros_like(value) for name, value in values.items()},
        )


def adamw(
    values: Arrays,
    gradients: Arrays,
    state: AdamWState,
    learning_rate: float,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 1e-2,
) -> tuple[dict[str, Array], AdamWState]:
    """One step of AdamW (arXiv 1711.05101, algorithm 2, without a schedule multiplier): new values and new state.

    m = β1·m + (1−β1)·g;  v = β2·v + (1−β2)·g²
    value = value·(1 − lr·decay) − lr·(m / (1−β1^t)) / (√(v / (1−β2^t)) + epsilon)
    Arrays keep their dtype; nothing is changed in place. Raises ValueError when names differ.
    """
    if values.keys() != gradients.keys() or values.keys() != state.m.keys():
        raise ValueError("values, gradients and optimizer state do not name the same arrays")
    step = state.step + 1
    first, second = 1.0 - beta1**step, 1.0 - beta2**step
    new: dict[str, Array] = {}
    m: dict[str, Array] = {}
    v: dict[str, Array] = {}
    for name, value in values.items():
        gradient = gradients[name]
        m[name] = beta1 * state.m[name] + (1.0 - beta1) * gradient
        v[name] = beta2 * state.v[name] + (1.0 - beta2) * gradient * gradient
        moved = (learning_rate / first) * m[name] / (np.sqrt(v[name]) / math.sqrt(second) + epsilon)
        new[name] = value * (1.0 - learning_rate * weight_decay) - moved
    return new, AdamWState(m, v, step)


def global_norm(gradients: Arrays) -> float:
    """The Euclidean norm of all gradients taken together, summed in float64; 0.0 when there are none."""
    return math.sqrt(sum(float(np.sum(np.square(gradient, dtype=np.float64))) for gradient in gradients.values()))


def clip_norm(gradients: Arrays, max_norm: float) -> tuple[dict[str, Array], float]:
    """Gradients scaled down together to a norm of at most `max_norm`, and the norm before that.

    The factor is max_norm / (norm + 1e-6) where that is below 1, as in torch.nn.utils.clip_grad_norm_.
    A norm that is not finite is returned with the gradients as they are: what to do then is the run's affair.
    """
    norm = global_norm(gradients)
    factor = min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0
    return {name: gradient * gradient.dtype.type(factor) for name, gradient in gradients.items()}, norm
