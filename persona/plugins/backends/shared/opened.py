"""An opened base, one framework's modules behind names: where deltas, new words and changed weights go.

Names are `component.path`, published spelling (names.py). Arrays are float32 in torch layout. A *value* is whatever the
framework keeps a parameter in; it has a `shape`, in torch layout, and is read and written through the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from persona.core.training.plan import LowRank

Array = np.ndarray[Any, np.dtype[Any]]
Factors = tuple[Array, Array]
"""down [rank, in, …] and up [out, rank, …]."""
Kind = Literal["weight", "bias"]


@dataclass
class Delta:
    """A LoRA layer's trained values by their last names (down, up, magnitude), and the first factors of one that starts
    from its weight."""

    values: dict[str, Any]
    starts: dict[str, Any] = field(default_factory=dict)


class OpenedModel(ABC):
    """The components of an opened base. A framework says how its modules are found, replaced and read."""

    low_rank: tuple[type, ...]
    """The classes of its LoRA layers, which have their frozen module as `base`."""
    decomposed: type
    """The class around one of those, as `layer`, which gives it a magnitude (DoRA)."""

    def __init__(self, components: Mapping[str, Any]) -> None:
        self.components = components

    # -- modules ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def module(self, component: str, path: str) -> Any:
        """The module at a published path, or None."""

    @abstractmethod
    def paths(self, component: str) -> Iterator[tuple[str, Any]]:
        """(published path, module) of all modules of a component."""

    @abstractmethod
    def can_have_delta(self, module: Any) -> bool:
        """Whether it is a linear layer or an ungrouped convolution."""

    @abstractmethod
    def put_delta(self, component: str, path: str, told: LowRank, factors: Factors, starts: bool) -> Delta:
        """Put a LoRA layer with these first factors around the module there; `starts` when they are taken off again."""

    def has_delta(self, module: Any) -> bool:
        """Whether it is a LoRA layer."""
        return isinstance(module, (*self.low_rank, self.decomposed))

    def _frozen(self, name: str) -> Any:
        """The module called `component.path`, below any LoRA layer, or None."""
        component, _, path = name.partition(".")
        module = self.module(component, path) if component in self.components else None
        if isinstance(module, self.decomposed):
            module = module.layer  # type: ignore[attr-defined]
        return module.base if isinstance(module, self.low_rank) else module  # type: ignore[attr-defined]

    # -- values ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def value(self, name: str, kind: Kind) -> Any:
        """The frozen weight or bias of the module called `name`, below any LoRA layer; None where there is none."""

    @abstractmethod
    def values(self, component: str) -> Mapping[str, Any]:
        """Every parameter of a component by its published name."""

    @abstractmethod
    def train(self, name: str, value: Any) -> None:
        """Let `value`, called `name` in states, have gradients."""

    @abstractmethod
    def read(self, value: Any) -> Array:
        """A copy of a value."""

    @abstractmethod
    def write(self, value: Any, array: Array) -> None:
        """Take over an array of its shape, rounded once to the dtype it has."""

    def shape(self, name: str, kind: Kind) -> tuple[int, ...] | None:
        """The shape of that weight or bias; None where there is none."""
        found = self.value(name, kind)
        return None if found is None else tuple(found.shape)

    def weight(self, name: str) -> Array:
        """The frozen weight of the module called `name`."""
        return self.read(self.value(name, "weight"))

    def add(self, name: str, kind: Kind, change: Array) -> None:
        """Add `change` to that weight or bias, in float32, rounded once."""
        value = self.value(name, kind)
        self.write(value, self.read(value) + change)

    # -- words -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def word_rows(self, component: str) -> Array:
        """The token embedding of a text encoder, [vocabulary, dim], without new rows."""

    @abstractmethod
    def add_rows(self, component: str, rows: Array) -> Any:
        """New rows [n, dim] behind the token embedding, frozen until `train`; their value."""

    def embedding_width(self, component: str) -> int | None:
        """The width of the token embedding of a text encoder; None when there is no such component."""
        return self.word_rows(component).shape[1] if component in self.components else None
