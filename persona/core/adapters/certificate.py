"""What a conversion changed, measured: ΔW of every module before and after, by the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from persona.core.adapters.delta import needs_base
from persona.core.adapters.entry import Adapter

Measured = dict[str, Any]


def relative_error(before: Any, after: Any) -> float:
    """‖after − before‖ / ‖before‖ in the Frobenius norm, float64; 0 when both are zero, infinite when one is."""
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    difference, norm = float(np.linalg.norm(second.reshape(first.shape) - first)), float(np.linalg.norm(first))
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / norm


def certify(before: Adapter, after: Adapter, base: Mapping[str, Any] | None = None) -> Measured:
    """Compare two adapters module by module: relative error of ΔW, where each alpha came from, what is missing.

    Modules whose ΔW needs the base model are compared when `base` has their weight, and listed as unmeasured otherwise.
    """
    first, second = before.deltas(base), after.deltas(base)
    origins = {entry.name: entry.scale.origin for entry in before.entries.values()}
    unmeasured = [name for name in first if _unmeasurable(before, name, base)]
    modules = {
        name: {"relative_error": relative_error(first[name], second[name])}
        for name in first
        if name in second and name not in unmeasured
    }
    errors = [module["relative_error"] for module in modules.values()]
    return {
        "modules": modules,
        "worst_relative_error": max(errors, default=0.0),
        "alpha": origins,
        "missing": sorted(name for name in first if name not in second),
        "added": sorted(name for name in second if name not in first),
        "unmeasured": sorted(unmeasured),
    }


def _unmeasurable(adapter: Adapter, name: str, base: Mapping[str, Any] | None) -> bool:
    component, _, path = name.partition(".")
    entry = adapter.entries.get((component, path))
    if entry is None:
        return False
    if entry.algorithm in ("oft", "boft", "opaque"):
        return True
    return needs_base(entry) and (base is None or name not in base)
