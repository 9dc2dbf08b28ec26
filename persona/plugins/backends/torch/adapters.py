"""An opened torch base, as merging adapters sees it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from persona.plugins.backends.shared.merging import Array, Kind
from persona.plugins.backends.torch.lowrank import Decomposed, LowRankConv, LowRankLinear
from persona.plugins.backends.torch.names import inside
from persona.plugins.backends.torch.trainables import grow


class OpenedTorchModel:
    """`persona.plugins.backends.shared.merging.OpenedModel` over a session's components."""

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._components = components

    def shape(self, name: str, kind: Kind) -> tuple[int, ...] | None:
        """The shape of the frozen weight or bias of the module called `name`."""
        found = self._parameter(name, kind)
        return None if found is None else tuple(found.shape)

    def weight(self, name: str) -> Array:
        """The frozen weight, float32."""
        parameter = self._parameter(name, "weight")
        assert parameter is not None
        values: Array = parameter.detach().float().cpu().numpy()
        return values

    @torch.no_grad()
    def add(self, name: str, kind: Kind, change: Array) -> None:
        """Add `change` in float32, rounded once."""
        parameter = self._parameter(name, kind)
        assert parameter is not None
        parameter.copy_(parameter.float() + torch.from_numpy(change).to(parameter.device))

    def embedding_width(self, component: str) -> int | None:
        """The width of a text encoder's token embedding."""
        return grow(self._components[component]).base.embedding_dim if component in self._components else None

    def add_rows(self, component: str, rows: Array) -> None:
        """New frozen rows [n, width]."""
        table = grow(self._components[component])
        values = torch.tensor(np.asarray(rows), device=table.base.weight.device)
        table.added.append(nn.Parameter(values, requires_grad=False))

    def _parameter(self, name: str, kind: Kind) -> Tensor | None:
        component, _, path = name.partition(".")
        model = self._components.get(component)
        try:
            module = model.get_submodule(inside(model, path)) if model is not None else None
        except AttributeError:
            return None
        if isinstance(module, Decomposed):
            module = module.layer
        if isinstance(module, (LowRankLinear, LowRankConv)):
            module = module.base
        found = getattr(module, kind, None)
        return found if isinstance(found, Tensor) else None
