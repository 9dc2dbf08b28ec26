"""AdamW with clipping and loss scaling: gradients to new values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from persona.core.host.errors import TrainingError, UsageError
from persona.core.training import plan as plans
from persona.core.training.optimizer import global_norm
from persona.plugins.backends.mindspore.cells import write
from persona.plugins.backends.shared.loss_scale import LossScale
from persona.plugins.backends.shared.trainables import Group

Array = np.ndarray[Any, np.dtype[Any]]


class Optimizer:
    """Bias-corrected AdamW as the core's (core/training/optimizer.py), with one learning rate per group of values.

    Computed in numpy, in main memory, where the moments stay: on a cpu MindSpore's elementary operations take about
    40 µs each to start, and LoRA has hundreds of small values. MindSpore's own AdamWeightDecay has no bias correction,
    and its Adam kernel takes 1 − β2 in float32, which is 5e-5 off."""

    def __init__(
        self, groups: Sequence[Group], options: plans.Optimizer, precision: str, unread: tuple[str, ...] = ()
    ) -> None:
        """Values whose names begin with one of `unread` never have a gradient, and stay what they are: weight decay,
        too, is for what is trained."""
        if options.name != "adamw":
            raise UsageError(f'The MindSpore backend has no optimizer "{options.name}".',
                             hint="The built-in one is adamw: leave --optimizer out.")  # fmt: skip
        self.groups, self.options = groups, options
        self.names = {name: parameter for group in groups for name, parameter in group.values.items()}
        self.moving = {name: value for name, value in self.names.items() if not name.startswith(unread)}
        if not self.moving:
            raise UsageError("No picture depends on what is to be trained.", hint="Choose another --target.")
        self.loss_scale = LossScale(precision == "fp16")
        self.updates = 0
        self.gradients: dict[str, Array] = {}
        self._m: dict[str, Array] = {}
        self._v: dict[str, Array] = {}

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Add gradients of the scaled loss, in the order of `moving`."""
        for name, gradient in zip(self.moving, gradients, strict=True):
            values = gradient.astype(ms.float32).asnumpy()
            if name in self.gradients:
                self.gradients[name] += values
            else:
                self.gradients[name] = values.copy()  # on a cpu `values` is the tensor's own memory

    def clear(self) -> None:
        """Forget the gradients."""
        self.gradients = {}

    def update(self, learning_rates: Sequence[float], max_norm: float) -> tuple[float, bool]:
        """One step; the gradient norm before clipping, and whether the step was skipped for an overflow.

        Clipping by max_norm / (norm + 1e-6), none for max_norm 0. Gradients that are not finite change nothing; that
        counts as skipped while a loss scale can still be lowered."""
        if not self.gradients:
            raise TrainingError("There are no gradients: update was called before accumulate.")
        scale = self.loss_scale.value
        norm = global_norm(self.gradients) / scale
        finite = math.isfinite(norm)
        if finite:
            factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
            self.updates += 1
            for group, rate in zip(self.groups, learning_rates, strict=True):
                for name in group.values:
                    if name in self.gradients:
                        self.gradients[name] *= factor / scale
                        self._step(name, float(rate) * group.rate_factor(name))
        self.loss_scale.learn(finite)
        self.clear()
        return norm, not finite and scale > 1.0

    def _step(self, name: str, rate: float) -> None:
        told, gradient, parameter = self.options, self.gradients[name], self.names[name]
        first, second = 1.0 - told.beta1**self.updates, 1.0 - told.beta2**self.updates
        m = self._m.setdefault(name, np.zeros_like(gradient))
        v = self._v.setdefault(name, np.zeros_like(gradient))
        m *= told.beta1
        m += (1.0 - told.beta1) * gradient
        v *= told.beta2
        v += (1.0 - told.beta2) * np.square(gradient)
        below = np.sqrt(v)
        below /= math.sqrt(second)
        below += told.epsilon
        kept = parameter.asnumpy() * (1.0 - rate * told.weight_decay)
        write(parameter, kept - (rate / first) * m / below)

    def state(self) -> dict[str, Array]:
        """adam_m/<name> and adam_v/<name> of every value that was ever updated, step, loss_scale."""
        kept = {f"adam_m/{name}": value.copy() for name, value in self._m.items()}
        kept |= {f"adam_v/{name}": value.copy() for name, value in self._v.items()}
        scale = np.array([self.loss_scale.value, self.loss_scale.good_updates], np.float64)
        return kept | {"loss_scale": scale, "step": np.array(float(self.updates), np.float64)}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Inverse of `state`."""
        scale, good = np.asarray(state["loss_scale"]).tolist()
        self.loss_scale.value, self.loss_scale.good_updates = float(scale), int(good)
        self.updates = int(state["step"])
        known = [name for name in self.names if f"adam_m/{name}" in state]
        self._m = {name: np.array(state[f"adam_m/{name}"], np.float32) for name in known}
        self._v = {name: np.array(state[f"adam_v/{name}"], np.float32) for name in known}
