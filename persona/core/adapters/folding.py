"""Putting the scale into the factors, for targets with no place for alpha: in float32, with one rounding
(dialects.md §4.8)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from persona.core.adapters.entry import Entry, Scale
from persona.core.adapters.tensor import TensorRef

SMALLEST_HALF = 2.0**-10
"""Below this a float16 loses bits to its subnormal range sooner than elsewhere."""


def folds_exactly(scale: float) -> bool:
    """Whether multiplying by `scale` only changes exponents: it is a power of two (or zero)."""
    return scale == 0 or abs(math.frexp(scale)[0]) == 0.5


def folded(entry: Entry) -> Entry:
    """The same ΔW with scale 1: `up` (w1_a, w1 …) takes the scale."""
    scale = entry.scale.value
    plain = Scale(float(entry.scale.rank), entry.scale.rank, "rank", entry.scale.origin)
    if scale == 1.0:
        return replace(entry, scale=plain)
    factors = dict(entry.factors)
    for name, share in _shares(entry, scale).items():
        factors[name] = scaled(factors[name], share)
    bias = scaled(entry.bias, scale) if entry.bias is not None else None
    return replace(entry, factors=factors, scale=plain, bias=bias)


def scaled(ref: TensorRef, scale: float) -> TensorRef:
    """`ref` times `scale`: multiplied in float32 (float64 for float64), rounded once to the dtype it has."""
    working = np.dtype(np.float64 if ref.dtype == np.float64 else np.float32)
    factor = np.asarray(scale, working)
    return TensorRef(ref.dtype, ref.shape, lambda: np.multiply(ref.read().astype(working), factor).astype(ref.dtype))


def _shares(entry: Entry, scale: float) -> dict[str, float]:
    """What each factor is multiplied by: all of it goes into one, unless a half-precision `up` would become so small
    that it loses bits; then `down` takes half of the exponent, which costs it nothing."""
    name = next(name for name in ("up", "w1_a", "w1", "b1", "diff") if name in entry.factors)
    ref = entry.factors[name]
    if name == "up" and ref.dtype == np.float16 and 0 < abs(scale) < 1:
        largest = float(np.abs(ref.read().astype(np.float32)).max(initial=0.0))
        if 0 < largest * abs(scale) < SMALLEST_HALF:
            half = 2.0 ** (math.frexp(scale)[1] // 2)
            return {"down": half, "up": scale / half}
    return {name: scale}
