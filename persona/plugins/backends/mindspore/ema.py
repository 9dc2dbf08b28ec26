"""Exponential moving averages of trained values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from mindspore import Parameter, Tensor

from persona.plugins.backends.mindspore.cells import Array, array_of, write


class Averages:
    """average ← decay · average + (1 − decay) · value; starts as the values themselves."""

    def __init__(self, values: Mapping[str, Parameter]) -> None:
        self._values = dict(values)
        self._averages: dict[str, Tensor] = {name: Tensor(value.asnumpy().copy()) for name, value in values.items()}

    def follow(self, decay: float) -> None:
        """Move every average towards its value."""
        for name, value in self._values.items():
            self._averages[name] = self._averages[name] * decay + value * (1.0 - decay)

    def read(self, name: str) -> Array:
        """A copy of an average."""
        return array_of(self._averages[name])

    def write(self, name: str, values: Array) -> None:
        """Take over an average."""
        self._averages[name] = Tensor(np.array(values, np.float32))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages stand in for the values."""
        kept = {name: value.asnumpy().copy() for name, value in self._values.items()}
        for name, value in self._values.items():
            write(value, self._averages[name].asnumpy())
        try:
            yield
        finally:
            for name, value in self._values.items():
                write(value, kept[name])
