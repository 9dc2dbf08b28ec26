"""What a session trained, as the core's types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from persona.core.adapters.entry import Adapter, Checkpoint, Embedding, Entry, Magnitude, Scale
from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.training.base import Base
from persona.core.training.plan import LowRank, NewTokens, TrainingPlan
from persona.plugins.backends.torch.names import outside
from persona.plugins.backends.torch.trainables import Group

Value = Callable[[str], np.ndarray]  # a trained value (or its average) by its name


def product_of(
    base: Base, plan: TrainingPlan, groups: Sequence[Group], components: Mapping[str, nn.Module], value: Value
) -> Adapter | Checkpoint:
    """An Adapter of copies for low-rank deltas and new tokens; for whole weights a Checkpoint of the changed
    components, whose tensors are read from the session when they are written."""
    if any(group.trained.kind == "weights" for group in groups):
        names = sorted(plan.trained_components())
        return Checkpoint(
            family=base.family,
            components={name: dict(_parameters(name, components[name], groups, value)) for name in names},
            configs={name: dict(base.components[name]) for name in names},
            metadata=dict(plan.metadata),
        )
    adapter = Adapter(family=base.family, entries={}, metadata=dict(plan.metadata))
    for group in groups:
        if isinstance(group.trained, LowRank):
            for path in group.layers:
                adapter.entries[group.trained.component, path] = _entry(group.trained, path, value)
        elif isinstance(group.trained, NewTokens):
            adapter.embeddings += _embeddings(group.trained, value)
    return adapter


def _entry(trained: LowRank, path: str, value: Value) -> Entry:
    name = f"{trained.component}.{path}"
    rank, alpha = trained.ranks.get(path, trained.rank), trained.alphas.get(path, trained.alpha)
    return Entry(
        component=trained.component,
        path=path,
        algorithm="lora",
        factors={factor: in_memory(value(f"{name}.{factor}")) for factor in ("down", "up")},
        scale=Scale(float(alpha), rank, "sqrt_rank" if trained.rank_stabilised else "rank", origin="trained"),
        magnitude=Magnitude(in_memory(value(f"{name}.magnitude")), "out") if trained.decomposed else None,
    )


def _embeddings(trained: NewTokens, value: Value) -> list[Embedding]:
    return [
        Embedding(
            token.placeholder,
            {component: in_memory(value(f"{component}.{token.placeholder}")) for component in trained.components},
        )
        for token in trained.tokens
    ]


def _parameters(component: str, model: nn.Module, groups: Sequence[Group], value: Value) -> dict[str, TensorRef]:
    trained = {name for group in groups for name in group.values}
    found = {}
    for own, parameter in model.named_parameters():
        name = outside(model, own)
        full = f"{component}.{name}"
        read = (lambda full=full: value(full)) if full in trained else (lambda p=parameter: _array(p))
        found[name] = TensorRef(np.dtype(np.float32), tuple(parameter.shape), read)
    return found


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
