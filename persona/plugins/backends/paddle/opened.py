"""An opened base in Paddle's layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import paddle
from paddle import nn

from persona.core.training.lora_values import scale_of
from persona.core.training.plan import LowRank
from persona.plugins.backends.paddle.layout import Parameter, find_layer, outside, parameters, replace_layer
from persona.plugins.backends.paddle.lowrank import Decomposed, LowRankConv, LowRankLinear, row_norms, trainable
from persona.plugins.backends.paddle.words import GrownEmbedding
from persona.plugins.backends.shared import opened
from persona.plugins.backends.shared.names import TOKEN_EMBEDDING
from persona.plugins.backends.shared.opened import Array, Delta, Factors, Kind


class OpenedModel(opened.OpenedModel):
    """`persona.plugins.backends.shared.opened.OpenedModel` of layers; values are `layout.Parameter`s."""

    low_rank = (LowRankLinear, LowRankConv)
    decomposed = Decomposed

    def module(self, component: str, path: str) -> Any:
        """The layer at a published path, or None."""
        return find_layer(self.components[component], path)

    def paths(self, component: str) -> Iterator[tuple[str, nn.Layer]]:
        """(published path, layer) of all layers of a component."""
        model = self.components[component]
        yield from ((outside(model, own), layer) for own, layer in model.named_sublayers())

    def can_have_delta(self, module: Any) -> bool:
        """Whether it is a linear layer or an ungrouped convolution."""
        return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2D) and module._groups == 1)

    def put_delta(self, component: str, path: str, told: LowRank, factors: Factors, starts: bool) -> Delta:
        """Put a LoRA layer with these first factors around the layer there."""
        layer = self.module(component, path)
        down, up = (paddle.to_tensor(array) for array in factors)
        start = (down.clone(), up.clone()) if starts else None
        kind: Any = LowRankLinear if isinstance(layer, nn.Linear) else LowRankConv
        pair = kind(layer, down, up, scale_of(told, path), told.dropout, start)
        delta = Delta({"down": Parameter(pair.down), "up": Parameter(pair.up)})
        if start is not None:
            delta.starts = {"down": Parameter(pair.start[0]), "up": Parameter(pair.start[1])}
        if told.decomposed:
            pair = Decomposed(pair, row_norms(paddle.to_tensor(self.weight(f"{component}.{path}"))))
            delta.values["magnitude"] = Parameter(pair.magnitude)
        replace_layer(self.components[component], path, pair)
        return delta

    def value(self, name: str, kind: Kind) -> Parameter | None:
        """The frozen weight or bias of the layer called `name`, below any LoRA layer; None where there is none."""
        component, _, path = name.partition(".")
        model = self.components.get(component)
        if model is not None and path == "text_projection" and kind == "weight" and hasattr(model, path):
            return Parameter(model.text_projection, transposed=True)
        layer = self._frozen(name)
        tensor = getattr(layer, kind, None)
        return None if tensor is None else Parameter(tensor, kind == "weight" and isinstance(layer, nn.Linear))

    def values(self, component: str) -> Mapping[str, Parameter]:
        """Every parameter of a component by its published name."""
        return parameters(self.components[component])

    def train(self, name: str, value: Parameter) -> None:
        """Let `value` have gradients."""
        value.tensor.stop_gradient = False

    def read(self, value: Parameter) -> Array:
        """A copy of a value."""
        return value.read()

    def write(self, value: Parameter, array: Array) -> None:
        """Take over an array of its shape."""
        value.write(array)

    def word_rows(self, component: str) -> Array:
        """The token embedding of a text encoder, [vocabulary, dim], without new rows."""
        return Parameter(self._words(component).base.weight).read()

    def add_rows(self, component: str, rows: Array) -> Parameter:
        """New rows [n, dim] behind the token embedding, frozen until `train`."""
        values = trainable(paddle.to_tensor(rows))
        values.stop_gradient = True
        self._words(component).added.append(values)
        return Parameter(values)

    def _words(self, component: str) -> GrownEmbedding:
        """The token embedding, with room for new rows."""
        model = self.components[component]
        embedding = find_layer(model, TOKEN_EMBEDDING)
        if not isinstance(embedding, GrownEmbedding):
            embedding = GrownEmbedding(embedding)
            replace_layer(model, TOKEN_EMBEDDING, embedding)
        return embedding
