"""An optimizer with clipping and loss scaling: gradients to new values."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from persona.core.host.errors import TrainingError, UsageError
from persona.core.training import plan as plans
from persona.plugins.backends.shared.loss_scale import LossScale
from persona.plugins.backends.shared.trainables import Group
from persona.plugins.backends.torch import npu
from persona.plugins.backends.torch.clipping import Clipping, NpuFusedClipping
from persona.plugins.backends.torch.device import Device
from persona.plugins.backends.torch.optimizer_state import (
    Read,
    adamw_state,
    any_state,
    group_numbers,
    load_adamw_state,
    load_any_state,
)
from persona.plugins.backends.torch.sharding import whole


class Optimizer:
    """torch's AdamW, or the class a plan names, with one parameter group per entry of the plan; two for an entry whose
    values have two learning rates (LoRA+). `read` is how moments leave it."""

    def __init__(
        self,
        groups: Sequence[Group],
        options: plans.Optimizer,
        device: Device,
        precision: str,
        read: Read = whole,
    ) -> None:
        flat = [(entry, *same) for entry, group in enumerate(groups) for same in _by_rate(group).items()]
        self.names = {name: parameter for *_, values in flat for name, parameter in values.items()}
        self._rates = [(entry, factor) for entry, factor, _ in flat]
        self.loss_scale = LossScale(precision == "fp16")
        self.updates = 0
        self._device, self._read = device, read
        self._is_adamw = options.name == "adamw"
        parameters = [{"params": list(values.values())} for *_, values in flat]
        self.note = ""  # what took the place of torch's own, for the user
        if self._is_adamw and device.kind == "npu":
            self._inner, self._clipping, self.note = _npu_adamw(parameters, options, device)
        else:
            self._inner = _adamw(parameters, options, device) if self._is_adamw else _other(parameters, options)
            self._clipping = Clipping(self._inner)
        self._constants = group_numbers(self._inner)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, scaled."""
        (loss * self.loss_scale.value if self.loss_scale.active else loss).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self, learning_rates: Sequence[float], max_norm: float) -> tuple[float, bool]:
        """One step; the gradient norm before clipping, and whether the step was skipped for an overflow.

        `max_norm` 0 clips nothing. Gradients that are not finite change nothing; that counts as skipped while a loss
        scale can still be lowered."""
        gradients = [parameter.grad for parameter in self.names.values() if parameter.grad is not None]
        if not gradients:
            raise TrainingError("There are no gradients: update was called before accumulate.")
        scale = self.loss_scale.value
        norm = self._clipping.norm(gradients, scale, max_norm)
        finite = math.isfinite(norm)
        if finite:
            for group, (entry, factor) in zip(self._inner.param_groups, self._rates, strict=True):
                group["lr"] = float(learning_rates[entry]) * factor
            self._inner.step()
            self.updates += 1
        self.loss_scale.learn(finite)
        self.clear()
        return norm, not finite and scale > 1.0

    def clear(self) -> None:
        """Forget the gradients."""
        self._clipping.clear()

    def state(self) -> dict[str, np.ndarray]:
        """What the optimizer remembers (see `optimizer_state`), step, loss_scale."""
        scale = np.array([self.loss_scale.value, self.loss_scale.good_updates], np.float64)
        kept = (
            adamw_state(self._inner, self.names, self._read)
            if self._is_adamw
            else any_state(self._inner, self.names, self._constants)
        )
        return kept | {"loss_scale": scale, "step": np.array(float(self.updates), np.float64)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Inverse of `state`."""
        scale, good = np.asarray(state["loss_scale"]).tolist()
        self.loss_scale.value, self.loss_scale.good_updates = float(scale), int(good)
        self.updates = int(state["step"])
        if self._is_adamw:
            on_device = self._device.fused_adamw
            load_adamw_state(self._inner, self.names, state, float(self.updates), on_device=on_device)
        else:
            load_any_state(self._inner, self.names, state)
        self._clipping.loaded()


def _by_rate(group: Group) -> dict[float, dict[str, nn.Parameter]]:
    """An entry's values by what its learning rate is multiplied by."""
    found: dict[float, dict[str, nn.Parameter]] = {}
    for name, value in group.values.items():
        found.setdefault(group.rate_factor(name), {})[name] = value
    return found


def _adamw(parameters: list[dict[str, Any]], options: plans.Optimizer, device: Device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        weight_decay=options.weight_decay,
        fused=device.fused_adamw or None,
    )


def _npu_adamw(
    parameters: list[dict[str, Any]], options: plans.Optimizer, device: Device
) -> tuple[torch.optim.Optimizer, Clipping, str]:
    """torch_npu's fused AdamW with its clipping; torch's own where it is not there; and the note that says so."""
    fused, why_not = npu.fused_adamw()
    if fused is None:
        plain = _adamw(parameters, options, device)
        return plain, Clipping(plain), f"npu: AdamW and clipping are torch's own, the slower way: {why_not}"
    made = fused(
        parameters,
        lr=0.0,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        weight_decay=options.weight_decay,
    )
    return made, NpuFusedClipping(made), "npu: AdamW and clipping are torch_npu's NpuFusedAdamW"


def _other(parameters: list[dict[str, Any]], options: plans.Optimizer) -> torch.optim.Optimizer:
    """The class that the plan names for torch. Raises UsageError when there is none, when it is not an optimizer (a
    plan may come from elsewhere), and for keywords it does not know."""
    module, _, attribute = options.classes.get("torch", "").partition(":")
    if not module:
        raise UsageError(f'The torch backend has no optimizer "{options.name}".', hint="The built-in one is adamw.")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise UsageError(
            f"The optimizer {options.name} cannot be imported: {type(error).__name__}: {error}."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise UsageError(f"{module}:{attribute} is not an optimizer of torch.")
    try:
        make: Any = cls
        with contextlib.redirect_stdout(io.StringIO()):  # Prodigy announces itself there
            made = make(parameters, lr=1.0, **dict(options.options))  # the loop sets the rate
        return cast(torch.optim.Optimizer, made)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"The optimizer {options.name} refuses its options: {error}.", hint="Look at --optimizer-option"
        ) from error
