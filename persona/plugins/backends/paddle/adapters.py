"""An opened Paddle base, as merging adapters sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle
from paddle import nn

from persona.plugins.backends.paddle.layout import Parameter, find_layer
from persona.plugins.backends.paddle.lowrank import Decomposed, LowRankConv, LowRankLinear, trainable
from persona.plugins.backends.paddle.trainables import grow
from persona.plugins.backends.shared.merging import Array, Kind


class OpenedPaddleModel:
    """`persona.plugins.backends.shared.merging.OpenedModel` over a session's components."""

    def __init__(self, components: Mapping[str, nn.Layer]) -> None:
        self._components = components

    def shape(self, name: str, kind: Kind) -> tuple[int, ...] | None:
        """The shape of the frozen weight or bias of the module called `name`."""
        found = self._parameter(name, kind)
        return None if found is None else found.shape

    def weight(self, name: str) -> Array:
        """The frozen weight, float32."""
        found = self._parameter(name, "weight")
        assert found is not None
        return found.read()

    def add(self, name: str, kind: Kind, change: Array) -> None:
        """Add `change`."""
        found = self._parameter(name, kind)
        assert found is not None
        found.write(found.read() + change)

    def embedding_width(self, component: str) -> int | None:
        """The width of a text encoder's token embedding."""
        return grow(self._components[component]).width if component in self._components else None

    def add_rows(self, component: str, rows: Array) -> None:
        """New frozen rows [n, width]."""
        values = trainable(paddle.to_tensor(rows))
        values.stop_gradient = True
        grow(self._components[component]).added.append(values)

    def _parameter(self, name: str, kind: Kind) -> Parameter | None:
        component, _, path = name.partition(".")
        model = self._components.get(component)
        if model is None:
            return None
        if path == "text_projection" and kind == "weight" and hasattr(model, "text_projection"):
            return Parameter(model.text_projection, transposed=True)
        layer: Any = find_layer(model, path)
        if isinstance(layer, Decomposed):
            layer = layer.layer
        if isinstance(layer, (LowRankLinear, LowRankConv)):
            layer = layer.base
        tensor = getattr(layer, kind, None)
        if tensor is None:
            return None
        return Parameter(tensor, kind == "weight" and isinstance(layer, nn.Linear))
