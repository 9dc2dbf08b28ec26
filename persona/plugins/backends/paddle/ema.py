"""Exponential moving averages of trained values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import paddle

from persona.plugins.backends.paddle.layout import Array, Parameter


class Averages:
    """One average for each trained value; they start as the values themselves."""

    def __init__(self, values: Mapping[str, Parameter]) -> None:
        self._values = dict(values)
        self._averages: dict[str, Any] = {name: value.tensor.detach().clone() for name, value in values.items()}

    @paddle.no_grad()
    def follow(self, decay: float) -> None:
        """average ← decay · average + (1 − decay) · value."""
        for name, value in self._values.items():
            self._averages[name].scale_(decay).add_(value.tensor * (1.0 - decay))

    def read(self, name: str) -> Array:
        """A copy of an average, in torch's layout."""
        return self._values[name].read(self._averages[name])

    def write(self, name: str, values: Array) -> None:
        """Take over an average."""
        self._averages[name] = self._values[name].made_of(values)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Averages and values change places, for sampling."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @paddle.no_grad()
    def _swap(self) -> None:
        for name, value in self._values.items():
            kept = value.tensor.detach().clone()
            value.tensor.set_value(self._averages[name])
            self._averages[name] = kept
