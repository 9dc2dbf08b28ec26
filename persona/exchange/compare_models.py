"""Are two whole models the same? Parameter by parameter, whatever their spellings; one pair of tensors in memory at a
time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from persona.core.adapters.entry import Checkpoint
from persona.core.adapters.tensor import TensorRef
from persona.exchange.compare import ROUNDING, Comparison

ROWS = 1 << 22
"""Numbers of a tensor that are widened to float64 at once."""


@dataclass(frozen=True)
class ModelComparison(Comparison):
    """`modules` are parameters, `component.name`. A component that one model lacks is named once, as `component`."""

    def components(self) -> dict[str, tuple[int, int, float]]:
        """Component -> (parameters compared, parameters that differ, worst relative error)."""
        counts: Counter[str] = Counter()
        different: Counter[str] = Counter()
        worst: dict[str, float] = {}
        for name, error in self.modules.items():
            component = name.partition(".")[0]
            counts[component] += 1
            different[component] += not error <= self.tolerance
            worst[component] = max(worst.get(component, 0.0), error if np.isfinite(error) else float("inf"))
        return {name: (counts[name], different[name], worst[name]) for name in counts}


def compare_models(first: Checkpoint, second: Checkpoint, *, tolerance: float | None = None) -> ModelComparison:
    """Relative errors (‖B − A‖ / ‖A‖) of every parameter both models have. What has the same bytes counts 0, so that
    values that are not finite can be the same; the default tolerance is one rounding of the coarser dtype."""
    errors: dict[str, float] = {}
    only: tuple[list[str], list[str]] = ([], [])
    for component in dict.fromkeys([*first.components, *second.components]):
        if component not in first.components or component not in second.components:
            only[component not in first.components].append(component)
            continue
        left, right = first.components[component], second.components[component]
        only[0].extend(f"{component}.{name}" for name in left if name not in right)
        only[1].extend(f"{component}.{name}" for name in right if name not in left)
        errors.update({f"{component}.{name}": error(left[name], right[name]) for name in left if name in right})
    allowed = rounding_of((first, second)) if tolerance is None else tolerance
    return ModelComparison(errors, {}, tuple(only[0]), tuple(only[1]), (), allowed)


def rounding_of(models: Iterable[Checkpoint]) -> float:
    """What one rounding of the coarsest dtype among the models can change of a value, relative."""
    dtypes = {ref.dtype for model in models for part in model.components.values() for ref in part.values()}
    return max((ROUNDING.get(dtype, 1e-6) for dtype in dtypes), default=1e-6)


def error(first: TensorRef, second: TensorRef) -> float:
    """‖second − first‖ / ‖first‖ in the Frobenius norm, summed in float64 over a few rows at a time; infinite when the
    shapes differ by more than axes of 1 (a 1x1 convolution is a linear layer)."""
    if [size for size in first.shape if size != 1] != [size for size in second.shape if size != 1]:
        return float("inf")
    left, right = first.read().reshape(-1), second.read().reshape(-1)
    if left.dtype == right.dtype and _same_bytes(left, right):
        return 0.0
    difference = norm = 0.0
    for start in range(0, left.size, ROWS):
        one = np.asarray(left[start : start + ROWS], np.float64)
        other = np.asarray(right[start : start + ROWS], np.float64)
        difference += float(((other - one) ** 2).sum())
        norm += float((one**2).sum())
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float(np.sqrt(difference / norm))


def _same_bytes(left: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.array_equal(np.ascontiguousarray(left).view(np.uint8), np.ascontiguousarray(right).view(np.uint8)))
