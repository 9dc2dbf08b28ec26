"""How far two adapters' ΔW are apart, without building ΔW where both are low rank."""

from __future__ import annotations

from typing import Any

import numpy as np

from persona.core.adapters.certificate import relative_error
from persona.core.adapters.entry import Adapter
from persona.core.adapters.fusion import members, row_sizes

Array = np.ndarray[Any, np.dtype[Any]]
Factors = tuple[float, Array, Array]


def low_rank(adapter: Adapter) -> dict[str, Factors]:
    """`component.path` -> (scale, up [out, rank], down [rank, in·kh·kw]) as stored; a joined module under each of its
    parts. Raises AssertionError for another algorithm than LoRA."""
    found: dict[str, Factors] = {}
    for entry in adapter.entries.values():
        assert entry.algorithm == "lora" and entry.factors.keys() == {"up", "down"}, entry.name
        up, down = np.asarray(entry.factors["up"]), np.asarray(entry.factors["down"])
        up, down = up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)
        paths, start = members(entry.path), 0
        sizes = row_sizes(entry.path, up.shape[0], down.shape[1]) if len(paths) > 1 else (up.shape[0],)
        for path, rows in zip(paths, sizes, strict=True):
            found[f"{entry.component}.{path}"] = entry.scale.value, up[start : start + rows], down
            start += rows
    return found


def distance(first: Factors, second: Factors) -> float:
    """‖ΔW₂ − ΔW₁‖ / ‖ΔW₁‖ (Frobenius) by Gram matrices: ‖U·D‖² = Σ (UᵀU) ∘ (D·Dᵀ), with U = [s₂U₂, −s₁U₁] and D the
    two downs stacked. 0 exactly when scale and factors are equal; below 1e-8 it is only rounding."""
    if first[0] == second[0] and all(
        np.array_equal(one, other) for one, other in zip(first[1:], second[1:], strict=True)
    ):
        return 0.0
    ups = np.concatenate([second[0] * second[1].astype(np.float64), -first[0] * first[1].astype(np.float64)], axis=1)
    downs = np.concatenate([second[2], first[2]]).astype(np.float64)
    products = (ups.T @ ups) * (downs @ downs.T)
    rank = first[1].shape[1]
    norm = products[-rank:, -rank:].sum()
    return float(np.sqrt(max(products.sum(), 0.0) / norm)) if norm > 0 else float("inf")


def is_zero(factors: Factors) -> bool:
    """Whether ΔW is zero because a factor is."""
    return not factors[1].any() or not factors[2].any()


def witnesses(factors: dict[str, Factors]) -> list[str]:
    """The module of each component whose ΔW is smallest: the ones that the oracle is asked about."""
    smallest: dict[str, tuple[int, str]] = {}
    for name, (_, up, down) in factors.items():
        component, size = name.split(".", 1)[0], up.shape[0] * down.shape[1]
        if component not in smallest or size < smallest[component][0]:
            smallest[component] = size, name
    return [name for _, name in smallest.values()]


def by_oracle(first: Adapter, second: Adapter, names: list[str]) -> dict[str, float]:
    """The same distance from ΔW itself, as the oracle builds it."""
    before, after = first.deltas(), second.deltas()
    return {name: relative_error(before[name], after[name]) for name in names}
