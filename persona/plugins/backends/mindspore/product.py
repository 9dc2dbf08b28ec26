"""What a session trained, as the core's types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from persona.core.adapters.entry import Adapter, Checkpoint
from persona.core.adapters.tensor import TensorRef
from persona.core.training.base import Base
from persona.core.training.plan import TrainingPlan
from persona.core.training.product import Value, adapter_of
from persona.plugins.backends.mindspore.cells import parameters_of
from persona.plugins.backends.mindspore.trainables import Group

Array = np.ndarray[Any, np.dtype[Any]]


def product_of(
    base: Base, plan: TrainingPlan, groups: Sequence[Group], components: Mapping[str, nn.Cell], value: Value
) -> Adapter | Checkpoint:
    """An Adapter of copies for low-rank deltas and new tokens; for whole weights a Checkpoint of the changed
    components, whose tensors are read from the session when they are written. `value` gives a trained value (or its
    average) by its name."""
    if any(group.trained.kind == "weights" for group in groups):
        names = sorted(plan.trained_components())
        trained = {name for group in groups for name in group.values}
        return Checkpoint(
            family=base.family,
            components={name: dict(_parameters(name, components[name], trained, value)) for name in names},
            configs={name: dict(base.components[name]) for name in names},
            metadata=dict(plan.metadata),
        )
    starts = {name: tensor for group in groups for name, tensor in group.starts.items()}
    return adapter_of(plan, base.family, value, lambda name: array_of(starts[name]))


def _parameters(component: str, model: nn.Cell, trained: set[str], value: Value) -> Iterator[tuple[str, TensorRef]]:
    for name, parameter in parameters_of(model):
        full = f"{component}.{name}"
        read = (lambda full=full: value(full)) if full in trained else (lambda p=parameter: array_of(p))
        yield name, TensorRef(np.dtype(np.float32), tuple(parameter.shape), read)


def array_of(tensor: Tensor) -> Array:
    """A copy, float32. (On a cpu `asnumpy` alone gives the tensor's own memory.)"""
    values: Array = tensor.astype(ms.float32).asnumpy().copy()
    return values
