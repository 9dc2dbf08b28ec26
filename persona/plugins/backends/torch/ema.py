"""Exponential moving averages of trained values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from persona.plugins.backends.shared.opened import Array, OpenedModel


class Averages:
    """One average for each trained value; they start as the values themselves."""

    def __init__(self, values: Mapping[str, nn.Parameter], model: OpenedModel) -> None:
        self._values, self._model = dict(values), model
        self._averages: dict[str, Tensor] = {name: value.detach().clone() for name, value in values.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """average ← decay · average + (1 − decay) · value."""
        torch._foreach_lerp_(list(self._averages.values()), list(self._values.values()), 1.0 - decay)

    def read(self, name: str) -> Array:
        """A copy of an average."""
        return self._model.read(self._averages[name])

    def write(self, name: str, values: Array) -> None:
        """Take over an average."""
        self._model.write(self._averages[name], values)

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
        for name, value in self._values.items():  # their contents: FSDP looks at the memory a value had at first
            kept = value.detach().clone()
            value.copy_(self._averages[name])
            self._averages[name].copy_(kept)
