"""Exponential moving averages of trained values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from persona.core.training.averages import average_decay


class Averages:
    """average ← decay · average + (1 − decay) · value after every update, with the core's decay; starts as the values
    themselves. `updates` counts them."""

    def __init__(self, values: Mapping[str, nn.Parameter], decay: float) -> None:
        self._values, self._decay, self.updates = dict(values), decay, 0
        self.averages: dict[str, Tensor] = {name: value.detach().clone() for name, value in values.items()}

    @torch.no_grad()
    def follow(self) -> None:
        """Move every average towards its value."""
        self.updates += 1
        weight = 1.0 - average_decay(self._decay, self.updates)
        torch._foreach_lerp_(list(self.averages.values()), list(self._values.values()), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Averages and values change places, for sampling."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._values.items():
            value.data, self.averages[name] = self.averages[name], value.data
