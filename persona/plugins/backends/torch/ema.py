"""Exponential moving averages of trained values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Averages:
    """One average for each trained value; they start as the values themselves."""

    def __init__(self, values: Mapping[str, nn.Parameter]) -> None:
        self._values = dict(values)
        self.averages: dict[str, Tensor] = {name: value.detach().clone() for name, value in values.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """average ← decay · average + (1 − decay) · value."""
        torch._foreach_lerp_(list(self.averages.values()), list(self._values.values()), 1.0 - decay)

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
