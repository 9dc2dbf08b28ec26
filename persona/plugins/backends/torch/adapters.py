"""Putting adapters into an opened base: every ΔW is added to its weight, every new token gets its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from persona.core.adapters.delta import Deltas, bias_delta
from persona.core.adapters.entry import Adapter, Embedding
from persona.core.host.errors import ConversionError
from persona.plugins.backends.shared.words import Words
from persona.plugins.backends.torch.lowrank import Decomposed, LowRankConv, LowRankLinear
from persona.plugins.backends.torch.names import inside
from persona.plugins.backends.torch.trainables import grow


class BaseWeights(Mapping[str, np.ndarray]):
    """`component.path` to the base's weight there, float32, read when asked for."""

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._components = components

    def module(self, name: str) -> nn.Module | None:
        """The frozen module called `name`, below any LoRA layer, or None."""
        component, _, path = name.partition(".")
        model = self._components.get(component)
        try:
            found = model.get_submodule(inside(model, path)) if model is not None else None
        except AttributeError:
            return None
        if isinstance(found, Decomposed):
            found = found.layer
        return found.base if isinstance(found, (LowRankLinear, LowRankConv)) else found

    def __getitem__(self, name: str) -> np.ndarray:
        module = self.module(name)
        weight = getattr(module, "weight", None)
        if weight is None:
            raise KeyError(name)
        values: np.ndarray = weight.detach().float().cpu().numpy()
        return values

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError("base weights are asked for by name")

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True


@torch.no_grad()
def merge(
    adapter: Adapter, strength: float, components: Mapping[str, nn.Module], words: Mapping[str, Words]
) -> list[str]:
    """Add `adapter` at `strength` to the components, computed in float32 and rounded once to the weight's dtype.

    Raises ConversionError when entries have no home here, naming up to five, before anything is changed; for a shape
    that does not fit when it comes to it, and the session is then good for nothing. Returns notes."""
    if not adapter.entries and not adapter.embeddings:
        raise ConversionError("The adapter is empty: no module and no token was found in it.",
                              hint="persona inspect says what the file holds.")  # fmt: skip
    base = BaseWeights(components)
    deltas = Deltas(adapter.entries.values(), base)
    _refuse_homeless([name for name in deltas if getattr(base.module(name), "weight", None) is None], len(deltas))
    for name in deltas:
        module = base.module(name)
        assert module is not None
        _add(name, module.get_parameter("weight"), deltas[name], strength)
    for entry in adapter.entries.values():
        change = bias_delta(entry)
        if change is not None:
            bias = getattr(base.module(entry.name), "bias", None)
            if bias is None:
                raise ConversionError(f"{entry.name} has a bias in the adapter and none in this base.")
            _add(f"{entry.name}'s bias", bias, change, strength)
    notes = [_learn_word(embedding, components, words) for embedding in adapter.embeddings]
    return [f"{len(deltas)} modules changed at strength {strength:g}.", *notes] if len(deltas) else notes


def _add(name: str, weight: Tensor, change: np.ndarray, strength: float) -> None:
    if tuple(change.shape) != tuple(weight.shape) and change.size == weight.numel():
        change = change.reshape(tuple(weight.shape))  # a 1x1 convolution written as a matrix
    if tuple(change.shape) != tuple(weight.shape):
        raise ConversionError(f"{name} is {list(weight.shape)} here, and the adapter's change is {list(change.shape)}.",
                              hint="The adapter was made for another base model.")  # fmt: skip
    weight.copy_(weight.float() + torch.from_numpy(np.ascontiguousarray(change)).to(weight.device) * strength)


def _learn_word(embedding: Embedding, components: Mapping[str, nn.Module], words: Mapping[str, Words]) -> str:
    for component, reference in embedding.vectors.items():
        if component not in components or component not in words:
            raise ConversionError(f"{embedding.token} has vectors for {component}, which this base does not have.",
                                  hint="The embedding was made for another base model.")  # fmt: skip
        if words[component].knows(embedding.token):
            raise ConversionError(f"{embedding.token} is a new word twice.", hint="Load only one of its files.")
        table = grow(components[component])
        vectors = np.atleast_2d(np.asarray(reference.read(), np.float32))
        if vectors.shape[1] != table.base.embedding_dim:
            raise ConversionError(f"{embedding.token}'s vectors are {vectors.shape[1]} wide, and {component}'s are "
                                  f"{table.base.embedding_dim}.",
                                  hint="The embedding was made for another base model.")  # fmt: skip
        words[component].add(embedding.token, len(vectors))
        rows = torch.tensor(vectors, device=table.base.weight.device)
        table.added.append(nn.Parameter(rows, requires_grad=False))
    missing = sorted(set(words) - set(embedding.vectors))
    if missing:
        raise ConversionError(f"{embedding.token} has no vectors for {', '.join(missing)}.",
                              hint="The embedding was made for another base model.")  # fmt: skip
    return f"{embedding.token} is a word of {len(vectors)} vector{'s' if len(vectors) > 1 else ''}."


def _refuse_homeless(names: list[str], count: int) -> None:
    if names:
        rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ConversionError(
            f"{len(names)} of the adapter's {count} modules are not in this base: "
            f"{', '.join(sorted(names)[:5])}{rest}.",
            hint="The adapter was made for another base model.",
        )
