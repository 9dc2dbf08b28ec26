"""The best LoRA of a given rank: truncated singular value decomposition (dialects.md §4.9).

For factors it goes through two small QR decompositions and never builds ΔW; the cost is O((out + in)·rank²). Nothing is
centred and nothing is clamped, which is where other tools lose the exactness at full rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from persona.core.adapters.entry import Entry, Scale
from persona.core.adapters.expansion import wide
from persona.core.adapters.folding import scaled
from persona.core.adapters.tensor import in_memory

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Truncated:
    """A reduced entry, and the Frobenius norm that is left of ΔW (1: all of it)."""

    entry: Entry
    kept: float


def truncate(entry: Entry, rank: int | None = None, *, energy: float | None = None) -> Truncated:
    """Plain LoRA `entry` at `rank`, or at the smallest rank that keeps `energy` of the squared norm."""
    up, down = entry.factors["up"], entry.factors["down"]
    left = wide(up).reshape(up.shape[0], -1) * entry.scale.value
    right = wide(down).reshape(down.shape[0], -1)
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    return _made(entry, q_left @ u, s, vt @ q_right.T, rank, energy)


def from_difference(entry: Entry, change: Array, rank: int | None = None, *, energy: float | None = None) -> Truncated:
    """The best LoRA for a whole ΔW [out, in(, kh, kw)], placed at `entry`'s module."""
    u, s, vt = np.linalg.svd(wide(change).reshape(change.shape[0], -1), full_matrices=False)
    return _made(entry, u, s, vt, rank, energy, change.shape[2:])


def rank_for(singular: Array, energy: float) -> int:
    """The smallest rank whose squared singular values make up `energy` of the whole."""
    total = np.cumsum(singular**2)
    if total[-1] == 0:
        return 1
    return int(np.searchsorted(total / total[-1], energy - 1e-12)) + 1


def _made(
    entry: Entry, u: Array, s: Array, vt: Array, rank: int | None, energy: float | None, window: tuple[int, ...] = ()
) -> Truncated:
    keep = min(rank if rank is not None else rank_for(s, energy or 1.0), len(s))
    root = np.sqrt(s[:keep])
    dtype = next(iter(entry.factors.values())).dtype
    dtype = dtype if dtype.itemsize <= 4 else np.dtype(np.float32)
    window = window or (entry.factors["down"].shape[2:] if "down" in entry.factors else ())
    up = (u[:, :keep] * root).astype(dtype)
    down = (root[:, None] * vt[:keep]).astype(dtype)
    if window:
        up, down = up.reshape(*up.shape, 1, 1), down.reshape(keep, -1, *window)
    whole = float((s**2).sum())
    kept = 1.0 if whole == 0 else float(np.sqrt((s[:keep] ** 2).sum() / whole))
    scale = Scale(float(keep), keep, "rank", "computed")
    factors = {"up": in_memory(up), "down": in_memory(down)}
    factors |= {"diff_b": entry.factors["diff_b"]} if "diff_b" in entry.factors else {}
    bias = scaled(entry.bias, entry.scale.value) if entry.bias is not None else None  # alpha has gone into the factors
    made = replace(entry, algorithm="lora", factors=factors, scale=scale, magnitude=None, bias=bias)
    return Truncated(made, kept)
