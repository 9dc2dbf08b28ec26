"""An opened base in MindSpore's cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from persona.core.training.lora_values import scale_of
from persona.core.training.plan import LowRank
from persona.plugins.backends.mindspore.cells import (
    Array,
    array_of,
    bias_of,
    find,
    parameters_of,
    replace,
    weight_of,
    write,
)
from persona.plugins.backends.mindspore.dropout import Dropout
from persona.plugins.backends.mindspore.embedding import GrownEmbedding
from persona.plugins.backends.mindspore.lowrank import Decomposed, LowRankConv, LowRankDense
from persona.plugins.backends.shared import opened
from persona.plugins.backends.shared.names import TOKEN_EMBEDDING
from persona.plugins.backends.shared.opened import Delta, Factors, Kind


class OpenedModel(opened.OpenedModel):
    """`persona.plugins.backends.shared.opened.OpenedModel` of cells; values are Parameters. `dropout` gives the masks
    of all its LoRA layers."""

    low_rank = (LowRankDense, LowRankConv)
    decomposed = Decomposed

    def __init__(self, components: Mapping[str, nn.Cell]) -> None:
        super().__init__(components)
        self.dropout = Dropout()

    def module(self, component: str, path: str) -> nn.Cell | None:
        """The cell at a published path, or None."""
        return find(self.components[component], path)

    def paths(self, component: str) -> Iterator[tuple[str, nn.Cell]]:
        """(published path, cell) of all cells of a component."""
        yield from self.components[component].cells_and_names()

    def can_have_delta(self, module: Any) -> bool:
        """Whether it is a linear layer or an ungrouped convolution."""
        return isinstance(module, nn.Dense) or (isinstance(module, nn.Conv2d) and module.group == 1)

    def put_delta(self, component: str, path: str, told: LowRank, factors: Factors, starts: bool) -> Delta:
        """Put a LoRA layer with these first factors around the cell there."""
        cell = self.module(component, path)
        kind = LowRankConv if isinstance(cell, nn.Conv2d) else LowRankDense
        start = factors if starts else None
        pair = kind(cell, factors, scale_of(told, path), told.dropout, self.dropout, start)
        delta = Delta({"down": pair.down, "up": pair.up})
        if pair.has_start:
            delta.starts = {"down": pair.start_down, "up": pair.start_up}
        layer = Decomposed(pair) if told.decomposed else pair
        if isinstance(layer, Decomposed):
            delta.values["magnitude"] = layer.magnitude
        replace(self.components[component], path, layer)
        return delta

    def value(self, name: str, kind: Kind) -> Parameter | None:
        """The frozen weight or bias of the cell called `name`, below any LoRA layer; None where there is none."""
        cell = self._frozen(name)
        return weight_of(cell) if kind == "weight" else bias_of(cell)

    def values(self, component: str) -> Mapping[str, Parameter]:
        """Every parameter of a component by its published name."""
        return dict(parameters_of(self.components[component]))

    def train(self, name: str, value: Parameter) -> None:
        """Let `value` have gradients. MindSpore wants the names of what it derives to differ."""
        value.name, value.requires_grad = name, True

    def read(self, value: Tensor) -> Array:
        """A copy of a value."""
        return array_of(value)

    def write(self, value: Parameter, array: Array) -> None:
        """Take over an array of its shape, rounded once to the dtype it has."""
        write(value, np.array(array, np.float32))

    def word_rows(self, component: str) -> Array:
        """The token embedding of a text encoder, [vocabulary, dim], without new rows."""
        return array_of(self._words(component).base.embedding_table)

    def add_rows(self, component: str, rows: Array) -> Parameter:
        """New rows [n, dim] behind the token embedding, frozen until `train`."""
        return self._words(component).add(rows)

    def _words(self, component: str) -> GrownEmbedding:
        """The token embedding, with room for new rows."""
        model = self.components[component]
        embedding = find(model, TOKEN_EMBEDDING)
        if not isinstance(embedding, GrownEmbedding):
            assert isinstance(embedding, nn.Embedding)
            embedding = GrownEmbedding(embedding)
            replace(model, TOKEN_EMBEDDING, embedding)
        return embedding
