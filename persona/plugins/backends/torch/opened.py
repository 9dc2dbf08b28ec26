"""An opened base in torch's modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from persona.core.training.lora_values import scale_of
from persona.core.training.plan import LowRank
from persona.plugins.backends.shared import opened
from persona.plugins.backends.shared.names import TOKEN_EMBEDDING
from persona.plugins.backends.shared.opened import Array, Delta, Factors, Kind
from persona.plugins.backends.torch.lowrank import Decomposed, LowRankConv, LowRankLinear
from persona.plugins.backends.torch.names import inside, outside
from persona.plugins.backends.torch.sharding import like, whole
from persona.plugins.backends.torch.words import GrownEmbedding


class OpenedModel(opened.OpenedModel):
    """`persona.plugins.backends.shared.opened.OpenedModel` of modules; values are tensors."""

    low_rank = (LowRankLinear, LowRankConv)
    decomposed = Decomposed
    keeps = True
    """Whether this process wants what is read of values in parts, and does not only help the others to read them."""

    def module(self, component: str, path: str) -> nn.Module | None:
        """The module at a published path, or None."""
        model = self.components[component]
        try:
            found: nn.Module = model.get_submodule(inside(model, path))
        except AttributeError:
            return None
        return found

    def paths(self, component: str) -> Iterator[tuple[str, nn.Module]]:
        """(published path, module) of all modules of a component."""
        model = self.components[component]
        yield from ((outside(model, own) if own else "", module) for own, module in model.named_modules())

    def can_have_delta(self, module: Any) -> bool:
        """Whether it is a linear layer or an ungrouped convolution."""
        return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)

    def put_delta(self, component: str, path: str, told: LowRank, factors: Factors, starts: bool) -> Delta:
        """Put a LoRA layer with these first factors around the module there."""
        module: Any = self.module(component, path)
        down, up = (torch.from_numpy(array).to(module.weight.device) for array in factors)
        start = (down.clone(), up.clone()) if starts else None
        kind: Any = LowRankConv if isinstance(module, nn.Conv2d) else LowRankLinear
        pair = kind(module, down, up, scale_of(told, path), told.dropout, start)
        delta = Delta({"down": pair.down, "up": pair.up})
        if start is not None:
            delta.starts = {"down": pair.start_down, "up": pair.start_up}
        layer = Decomposed(pair) if told.decomposed else pair
        if isinstance(layer, Decomposed):
            delta.values["magnitude"] = layer.magnitude
        model = self.components[component]
        _replace(model, inside(model, path), layer)
        return delta

    def value(self, name: str, kind: Kind) -> Tensor | None:
        """The frozen weight or bias of the module called `name`, below any LoRA layer; None where there is none."""
        found = getattr(self._frozen(name), kind, None)
        return found if isinstance(found, Tensor) else None

    def values(self, component: str) -> Mapping[str, nn.Parameter]:
        """Every parameter of a component by its published name."""
        model = self.components[component]
        return {outside(model, own): parameter for own, parameter in model.named_parameters()}

    def train(self, name: str, value: Tensor) -> None:
        """Let `value` have gradients."""
        value.requires_grad_(True)

    def read(self, value: Tensor) -> Array:
        """A copy of a value."""
        return whole(value, is_kept=self.keeps)

    @torch.no_grad()
    def write(self, value: Tensor, array: Array) -> None:
        """Take over an array of its shape, rounded once to the dtype it has."""
        value.copy_(like(value, array))

    def word_rows(self, component: str) -> Array:
        """The token embedding of a text encoder, [vocabulary, dim], without new rows."""
        return self.read(self._words(component).base.weight)

    def add_rows(self, component: str, rows: Array) -> nn.Parameter:
        """New rows [n, dim] behind the token embedding, frozen until `train`."""
        table = self._words(component)
        values = torch.from_numpy(np.array(rows, np.float32)).to(table.base.weight.device)
        added = nn.Parameter(values, requires_grad=False)
        table.added.append(added)
        return added

    def _words(self, component: str) -> GrownEmbedding:
        """The token embedding, with room for new rows."""
        model = self.components[component]
        path = inside(model, TOKEN_EMBEDDING)
        embedding = model.get_submodule(path)
        if not isinstance(embedding, GrownEmbedding):
            assert isinstance(embedding, nn.Embedding)
            embedding = GrownEmbedding(embedding)
            _replace(model, path, embedding)
        return embedding


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
