"""Exponential moving averages of trained values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from persona.plugins.backends.shared.opened import Array


class Averages:
    """One average for each trained value; they start as the values themselves."""

    def __init__(self, values: Mapping[str, nn.Parameter]) -> None:
        self._values = dict(values)
        self._averages: dict[str, Tensor] = {name: value.detach().clone() for name, value in values.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """average ← decay · average + (1 − decay) · value."""
        torch._foreach_lerp_(list(self._averages.values()), list(self._values.values()), 1.0 - decay)

    def read(self, name: str) -> Array:
        """A copy of an average."""
        values: Array = np.array(self._averages[name].float().cpu().numpy())
        return values

    def write(self, name: str, values: Array) -> None:
        """Take over an average."""
        self._averages[name].copy_(torch.from_numpy(np.array(values, np.float32)))

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
            value.data, self._averages[name] = self._averages[name], value.data
