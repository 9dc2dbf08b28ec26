"""AdamW with clipping and loss scaling: gradients to new values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from persona.core.host.errors import TrainingError, UsageError
from persona.core.training import plan as plans
from persona.plugins.backends.torch.device import Device

START_SCALE = 65536.0  # torch.amp.GradScaler's own figures
GROWTH_INTERVAL = 2000


class LossScale:
    """What a loss is multiplied by, so that fp16 gradients do not vanish: doubled after 2,000 good updates, halved
    after one with gradients that overflowed (arXiv 1710.03740 §3.2). 1 for other precisions."""

    def __init__(self, active: bool) -> None:
        self.active = active
        self.value = START_SCALE if active else 1.0
        self.good_updates = 0

    def learn(self, finite: bool) -> None:
        """Adjust after an update whose gradients were finite, or not."""
        if not finite:
            self.value, self.good_updates = max(self.value / 2, 1.0), 0
            return
        self.good_updates += 1
        if self.active and self.good_updates % GROWTH_INTERVAL == 0:
            self.value *= 2


class AdamW:
    """torch's AdamW, one parameter group per entry of the plan."""

    def __init__(
        self, groups: Sequence[Mapping[str, nn.Parameter]], options: plans.Optimizer, device: Device, precision: str
    ) -> None:
        if options.name != "adamw":
            raise UsageError(f'The torch backend has no optimizer "{options.name}".', hint="Known: adamw.")
        self.names = {name: parameter for group in groups for name, parameter in group.items()}
        self.loss_scale = LossScale(precision == "fp16")
        self._device = device
        self._adamw = torch.optim.AdamW(
            [{"params": list(group.values())} for group in groups],
            lr=0.0,
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
            weight_decay=options.weight_decay,
            fused=device.fused_adamw or None,
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, scaled."""
        (loss * self.loss_scale.value if self.loss_scale.active else loss).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self, learning_rates: Sequence[float], max_norm: float) -> tuple[float, bool]:
        """One step; the gradient norm before clipping, and whether the step was skipped for an overflow.

        Clipping as torch.nn.utils.clip_grad_norm_: by max_norm / (norm + 1e-6), none for max_norm 0. Gradients that
        are not finite change nothing; that counts as skipped while a loss scale can still be lowered."""
        gradients = [parameter.grad for parameter in self.names.values() if parameter.grad is not None]
        if not gradients:
            raise TrainingError("There are no gradients: update was called before accumulate.")
        scale = self.loss_scale.value
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))) / scale
        finite = math.isfinite(norm)
        if finite:
            factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
            if factor / scale != 1.0:
                torch._foreach_mul_(gradients, factor / scale)
            for group, rate in zip(self._adamw.param_groups, learning_rates, strict=True):
                group["lr"] = float(rate)
            self._adamw.step()
        self.loss_scale.learn(finite)
        self.clear()
        return norm, not finite and scale > 1.0

    def clear(self) -> None:
        """Forget the gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, np.ndarray]:
        """adam_m/<name> and adam_v/<name> of every value that was ever updated, step, loss_scale."""
        state = {"loss_scale": np.array([self.loss_scale.value, self.loss_scale.good_updates], np.float64)}
        step = 0.0
        for name, parameter in self.names.items():
            known = self._adamw.state.get(parameter)
            if known:
                state[f"adam_m/{name}"] = known["exp_avg"].cpu().numpy().copy()
                state[f"adam_v/{name}"] = known["exp_avg_sq"].cpu().numpy().copy()
                step = float(known["step"])
        return state | {"step": np.array(step, np.float64)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Inverse of `state`."""
        scale, good = np.asarray(state["loss_scale"]).tolist()
        self.loss_scale.value, self.loss_scale.good_updates = float(scale), int(good)
        self._adamw.state.clear()
        on_device = self._device.name if self._device.fused_adamw else "cpu"
        for name, parameter in self.names.items():
            if f"adam_m/{name}" in state:
                self._adamw.state[parameter] = {
                    "step": torch.tensor(float(state["step"]), dtype=torch.float32, device=on_device),
                    "exp_avg": _like(state[f"adam_m/{name}"], parameter),
                    "exp_avg_sq": _like(state[f"adam_v/{name}"], parameter),
                }


def _like(values: np.ndarray, parameter: nn.Parameter) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=parameter.dtype, device=parameter.device)
