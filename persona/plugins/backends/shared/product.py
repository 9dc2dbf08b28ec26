"""What a session trained, as the core's types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from persona.core.adapters.entry import Adapter, Checkpoint
from persona.core.adapters.tensor import TensorRef
from persona.core.training.base import Base
from persona.core.training.plan import TrainingPlan
from persona.core.training.product import adapter_of
from persona.plugins.backends.shared.opened import Array, OpenedModel
from persona.plugins.backends.shared.trainables import Group


def product_of(
    base: Base, plan: TrainingPlan, groups: Sequence[Group], model: OpenedModel, trained: Callable[[str], Array]
) -> Adapter | Checkpoint:
    """An Adapter of copies for low-rank deltas and new tokens; for whole weights a Checkpoint of the changed
    components, whose tensors are read from the session when they are written. `trained` gives a trained value (or its
    average) by its name."""
    if any(group.trained.kind == "weights" for group in groups):
        changed = {name for group in groups for name in group.values}

        def reference(name: str, value: Any) -> TensorRef:
            read = (lambda: trained(name)) if name in changed else (lambda: model.read(value))
            return TensorRef(np.dtype(np.float32), tuple(value.shape), read)

        names = sorted(plan.trained_components())
        return Checkpoint(
            family=base.family,
            components={
                component: {name: reference(f"{component}.{name}", value)
                            for name, value in model.values(component).items()}
                for component in names
            },
            configs={name: dict(base.components[name]) for name in names},
            metadata=dict(plan.metadata),
        )  # fmt: skip
    starts = {name: value for group in groups for name, value in group.starts.items()}
    return adapter_of(plan, base.family, trained, lambda name: model.read(starts[name]))
