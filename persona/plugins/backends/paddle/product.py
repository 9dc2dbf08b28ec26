"""What a session trained, as the core's types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from paddle import nn

from persona.core.adapters.entry import Adapter, Checkpoint
from persona.core.adapters.tensor import TensorRef
from persona.core.training.base import Base
from persona.core.training.plan import TrainingPlan
from persona.core.training.product import Value, adapter_of
from persona.plugins.backends.paddle.layout import parameters
from persona.plugins.backends.paddle.trainables import Group


def product_of(
    base: Base, plan: TrainingPlan, groups: Sequence[Group], components: Mapping[str, nn.Layer], value: Value
) -> Adapter | Checkpoint:
    """An Adapter of copies for low-rank deltas and new tokens; for whole weights a Checkpoint of the changed
    components, whose tensors are read from the session when they are written. `value` gives a trained value (or its
    average) by its name."""
    if any(group.trained.kind == "weights" for group in groups):
        names = sorted(plan.trained_components())
        trained = {name for group in groups for name in group.values}
        return Checkpoint(
            family=base.family,
            components={name: _tensors(name, components[name], trained, value) for name in names},
            configs={name: dict(base.components[name]) for name in names},
            metadata=dict(plan.metadata),
        )
    starts = {name: start for group in groups for name, start in group.starts.items()}
    return adapter_of(plan, base.family, value, lambda name: starts[name].read())


def _tensors(component: str, model: nn.Layer, trained: set[str], value: Value) -> dict[str, TensorRef]:
    found = {}
    for name, parameter in parameters(model).items():
        full = f"{component}.{name}"
        read = (lambda full=full: value(full)) if full in trained else parameter.read
        found[name] = TensorRef(np.dtype(np.float32), parameter.shape, read)
    return found
