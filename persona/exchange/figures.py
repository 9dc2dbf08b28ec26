"""Figures of an adapter that need its values: what is not finite, how large the deltas are. In bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from persona.core.adapters.entry import Adapter, Entry
from persona.core.adapters.tensor import TensorRef
from persona.formats.containers.byte_ranges import iterate_bytes


@dataclass(frozen=True)
class NotFinite:
    """How many values of some tensors are NaN or infinite, and which tensors (at most 10)."""

    nan: int
    infinite: int
    tensors: tuple[str, ...]


def not_finite(tensors: Mapping[str, TensorRef]) -> NotFinite:
    """Counts over all tensors of real numbers, a piece at a time."""
    nan = infinite = 0
    found: list[str] = []
    for name, ref in tensors.items():
        if ref.python is not None or ref.dtype.kind not in "fV":
            continue
        nans, infinities = _count(ref)
        nan, infinite = nan + nans, infinite + infinities
        if nans or infinities:
            found.append(name)
    return NotFinite(nan, infinite, tuple(found[:10]))


def _count(ref: TensorRef) -> tuple[int, int]:
    nans = infinities = 0
    for piece in iterate_bytes(ref):
        values: np.ndarray[Any, Any] = np.frombuffer(piece, ref.dtype)
        if np.isfinite(values).all():
            continue
        wide = values.astype(np.float32) if ref.dtype.itemsize < 4 else values
        nans += int(np.isnan(wide).sum())
        infinities += int(np.isinf(wide).sum())
    return nans, infinities


def delta_norms(adapter: Adapter) -> dict[str, dict[str, float]]:
    """For each component the smallest, middle and largest Frobenius norm of its plain LoRA deltas, and how many modules
    change nothing at all; other algorithms are passed over. Costs rank² · width, ΔW is not built."""
    by_component: dict[str, list[float]] = {}
    for entry in adapter.entries.values():
        norm = lora_norm(entry)
        if norm is not None:
            by_component.setdefault(entry.component, []).append(norm)
    return {component: _spread(norms) for component, norms in by_component.items()}


def _spread(norms: Iterable[float]) -> dict[str, float]:
    listed = sorted(norms)
    return {
        "smallest": listed[0],
        "middle": listed[len(listed) // 2],
        "largest": listed[-1],
        "zero_modules": sum(norm == 0 for norm in listed),
    }


def lora_norm(entry: Entry) -> float | None:
    """‖ΔW‖_F = |s|·√tr((BᵀB)(AAᵀ)) of a plain low-rank entry; None for any other."""
    if entry.algorithm != "lora" or "mid" in entry.factors or not {"down", "up"} <= entry.factors.keys():
        return None
    down = np.asarray(entry.factors["down"]).astype(np.float64)
    up = np.asarray(entry.factors["up"]).astype(np.float64)
    if not np.isfinite(down).all() or not np.isfinite(up).all():
        return float("nan")
    down, up = down.reshape(down.shape[0], -1), up.reshape(up.shape[0], -1)
    squared = float(np.sum((up.T @ up) * (down @ down.T)))
    return float(abs(entry.scale.value) * max(squared, 0.0) ** 0.5)
