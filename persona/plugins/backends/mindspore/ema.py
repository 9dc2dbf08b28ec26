"""Exponential moving averages of trained values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mindspore import Parameter, Tensor


class Averages:
    """average ← decay · average + (1 − decay) · value; starts as the values themselves."""

    def __init__(self, values: Mapping[str, Parameter]) -> None:
        self._values = dict(values)
        self.averages: dict[str, Tensor] = {name: Tensor(value.asnumpy().copy()) for name, value in values.items()}

    def follow(self, decay: float) -> None:
        """Move every average towards its value."""
        for name, value in self._values.items():
            self.averages[name] = self.averages[name] * decay + value * (1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages stand in for the values."""
        kept = {name: Tensor(value.asnumpy().copy()) for name, value in self._values.items()}
        for name, value in self._values.items():
            value.set_data(self.averages[name].copy())
        try:
            yield
        finally:
            for name, value in self._values.items():
                value.set_data(kept[name])
