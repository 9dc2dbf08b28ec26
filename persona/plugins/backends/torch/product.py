"""What a session trained, as the core's types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from persona.core.adapters.entry import Adapter, Checkpoint
from persona.core.adapters.tensor import TensorRef
from persona.core.training.base import Base
from persona.core.training.plan import TrainingPlan
from persona.core.training.product import Value, adapter_of
from persona.plugins.backends.torch.names import outside
from persona.plugins.backends.torch.trainables import Group


def product_of(
    base: Base, plan: TrainingPlan, groups: Sequence[Group], components: Mapping[str, nn.Module], value: Value
) -> Adapter | Checkpoint:
    """An Adapter of copies for low-rank deltas and new tokens; for whole weights a Checkpoint of the changed
    components, whose tensors are read from the session when they are written. `value` gives a trained value (or its
    average) by its name."""
    if any(group.trained.kind == "weights" for group in groups):
        names = sorted(plan.trained_components())
        return Checkpoint(
            family=base.family,
            components={name: dict(_parameters(name, components[name], groups, value)) for name in names},
            configs={name: dict(base.components[name]) for name in names},
            metadata=dict(plan.metadata),
        )
    starts = {name: tensor for group in groups for name, tensor in group.starts.items()}
    return adapter_of(plan, base.family, value, lambda name: _array(starts[name]))


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
