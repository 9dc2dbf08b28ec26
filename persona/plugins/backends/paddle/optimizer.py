"""AdamW with clipping and loss scaling: gradients to new values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from persona.core.host.errors import TrainingError, UsageError
from persona.core.training import plan as plans
from persona.plugins.backends.paddle.layout import Array, Parameter
from persona.plugins.backends.shared.loss_scale import LossScale
from persona.plugins.backends.shared.trainables import Group


class Optimizer:
    """The core's AdamW (core/training/optimizer.py) in Paddle, with one learning rate per entry of the plan.

    Not paddle.optimizer.AdamW: it keeps its moments under names that differ from run to run and its bias correction as
    a float32 product, which a checkpoint of another backend cannot give it."""

    def __init__(self, groups: Sequence[Group], options: plans.Optimizer, precision: str) -> None:
        if options.name != "adamw":
            raise UsageError(
                f'The paddle backend has no optimizer "{options.name}".', hint="The built-in one: --optimizer adamw"
            )
        self.names: dict[str, Parameter] = {name: value for group in groups for name, value in group.values.items()}
        self._rates = {name: (n, group.rate_factor(name)) for n, group in enumerate(groups) for name in group.values}
        self.loss_scale = LossScale(precision == "fp16")
        self.updates = 0
        self._options = options
        self._moments: dict[str, tuple[Any, Any]] = {}

    def backward(self, loss: Any) -> None:
        """Add the gradients of `loss`, scaled."""
        (loss * self.loss_scale.value if self.loss_scale.active else loss).backward()

    @paddle.no_grad()
    def update(self, learning_rates: Sequence[float], max_norm: float) -> tuple[float, bool]:
        """One step; the gradient norm before clipping, and whether the step was skipped for an overflow.

        Clipping by max_norm / (norm + 1e-6), none for max_norm 0. Gradients that are not finite change nothing; that
        counts as skipped while a loss scale can still be lowered."""
        gradients = {name: value.tensor.grad for name, value in self.names.items() if value.tensor.grad is not None}
        if not gradients:
            raise TrainingError("There are no gradients: update was called before accumulate.")
        scale = self.loss_scale.value
        squares = paddle.stack([(gradient.astype("float32") ** 2).sum() for gradient in gradients.values()])
        norm = math.sqrt(float(squares.sum())) / scale if bool(paddle.isfinite(squares).all()) else math.inf
        finite = math.isfinite(norm)
        if finite:
            factor = (min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0) / scale
            self.updates += 1
            for name, gradient in gradients.items():
                entry, multiple = self._rates[name]
                self._step(name, gradient * factor if factor != 1.0 else gradient, learning_rates[entry] * multiple)
        self.loss_scale.learn(finite)
        self.clear()
        return norm, not finite and scale > 1.0

    def _step(self, name: str, gradient: Any, learning_rate: float) -> None:
        told, value = self._options, self.names[name].tensor
        if name not in self._moments:
            self._moments[name] = (paddle.zeros_like(value), paddle.zeros_like(value))
        m, v = self._moments[name]
        m.scale_(told.beta1).add_(gradient * (1.0 - told.beta1))
        v.scale_(told.beta2).add_(gradient * gradient * (1.0 - told.beta2))
        first, second = 1.0 - told.beta1**self.updates, 1.0 - told.beta2**self.updates
        moved = m / (paddle.sqrt(v) / math.sqrt(second) + told.epsilon) * (learning_rate / first)
        value.set_value(value * (1.0 - learning_rate * told.weight_decay) - moved)

    def clear(self) -> None:
        """Forget the gradients."""
        for value in self.names.values():
            value.tensor.clear_gradient(set_to_zero=False)

    def state(self) -> dict[str, Array]:
        """adam_m/<name> and adam_v/<name> of every value that was ever updated, step, loss_scale."""
        state = {}
        for name, (m, v) in self._moments.items():
            state[f"adam_m/{name}"], state[f"adam_v/{name}"] = self.names[name].read(m), self.names[name].read(v)
        scale = np.array([self.loss_scale.value, self.loss_scale.good_updates], np.float64)
        return state | {"loss_scale": scale, "step": np.array(float(self.updates), np.float64)}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Inverse of `state`."""
        scale, good = np.asarray(state["loss_scale"]).tolist()
        self.loss_scale.value, self.loss_scale.good_updates = float(scale), int(good)
        self.updates = int(state["step"])
        self._moments = {
            name: (value.made_of(state[f"adam_m/{name}"]), value.made_of(state[f"adam_v/{name}"]))
            for name, value in self.names.items()
            if f"adam_m/{name}" in state
        }
