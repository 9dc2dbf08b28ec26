"""Gradients between backward and step: their norm, clipping, unscaling, forgetting; as torch does it, and as the fused
optimizers of torch_npu want it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from persona.plugins.backends.torch.sharding import in_parts


class Clipping:
    """By torch's foreach kernels, for any optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer: Any = optimizer

    def norm(self, gradients: list[Tensor], scale: float, max_norm: float) -> float:
        """Make gradients that are `scale` times too large right and clip them to `max_norm` (0: not at all) as
        torch.nn.utils.clip_grad_norm_ does, by max_norm / (norm + 1e-6); their norm before that. When it is not finite
        they stay as they are."""
        total: Any = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        norm = float(total.full_tensor() if in_parts(total) else total) / scale
        if math.isfinite(norm):
            factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
            if factor / scale != 1.0:
                torch._foreach_mul_(gradients, factor / scale)
        return norm

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def loaded(self) -> None:
        """The optimizer's state was replaced."""


class NpuFusedClipping(Clipping):
    """For torch_npu's fused optimizers, which keep all values, gradients and moments in one tensor each: gradients may
    only be changed and set to zero in place, and the moments are gathered again after they were replaced."""

    def norm(self, gradients: list[Tensor], scale: float, max_norm: float) -> float:
        """As in Clipping, by the optimizer's own fused clipping."""
        limit = max_norm * scale if max_norm > 0 else math.inf
        norm = float(self.optimizer.clip_grad_norm_fused_(limit)) / scale
        if math.isfinite(norm) and scale != 1.0:
            for together in self.optimizer.get_combined_grads():
                if together is not None:
                    together.mul_(1.0 / scale)
        return norm

    def clear(self) -> None:
        """Set the gradients to zero."""
        self.optimizer.zero_grad()

    def loaded(self) -> None:
        """Steps are whole numbers there, and the moments have to be gathered again."""
        for state in self.optimizer.state.values():
            state["step"] = int(state["step"])
        self.optimizer.is_states_combined = False
