"""An opened base as `shared.merging` wants it: where ΔW and new rows go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from persona.plugins.backends.mindspore.cells import bias_of, find, weight_of
from persona.plugins.backends.mindspore.embedding import grow
from persona.plugins.backends.mindspore.lowrank import Decomposed, LowRankConv, LowRankDense
from persona.plugins.backends.shared.merging import Kind

Array = np.ndarray[Any, np.dtype[Any]]


class OpenedComponents:
    """`persona.plugins.backends.shared.merging.OpenedModel` of a session's components."""

    def __init__(self, components: Mapping[str, nn.Cell]) -> None:
        self._components = components

    def shape(self, name: str, kind: Kind) -> tuple[int, ...] | None:
        """The shape of the frozen weight or bias called `name`, below any LoRA layer, or None."""
        found = self._parameter(name, kind)
        return None if found is None else tuple(found.shape)

    def weight(self, name: str) -> Array:
        """That weight, float32."""
        return _array(self._there(name, "weight"))

    def add(self, name: str, kind: Kind, change: Array) -> None:
        """Add `change` to it, rounded once to its dtype."""
        parameter = self._there(name, kind)
        parameter.set_data(Tensor(_array(parameter) + change).astype(parameter.dtype))

    def embedding_width(self, component: str) -> int | None:
        """The width of the token embedding of a text encoder, or None."""
        model = self._components.get(component)
        return int(grow(model).base.embedding_size) if model is not None else None

    def add_rows(self, component: str, rows: Array) -> None:
        """New frozen rows behind the token embedding."""
        table = grow(self._components[component])
        table.add(f"{component}.loaded.{len(table.added)}", rows).requires_grad = False

    def _there(self, name: str, kind: Kind) -> Parameter:
        found = self._parameter(name, kind)
        assert found is not None
        return found

    def _parameter(self, name: str, kind: Kind) -> Parameter | None:
        component, _, path = name.partition(".")
        model = self._components.get(component)
        cell = find(model, path) if model is not None else None
        if isinstance(cell, Decomposed):
            cell = cell.layer
        if isinstance(cell, (LowRankDense, LowRankConv)):
            cell = cell.base
        return weight_of(cell) if kind == "weight" else bias_of(cell)


def _array(parameter: Parameter) -> Array:
    values: Array = parameter.astype(ms.float32).asnumpy()
    return values
