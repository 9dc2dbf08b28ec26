"""Modules that the original code keeps as one weight and diffusers as several: q, k, v (and the MLP) stacked by rows.

A fused path names its parts in brackets: `transformer_blocks.0.attn.[to_q,to_k,to_v]` (dialects.md §2.6).
"""

from __future__ import annotations

import re

_FUSED = re.compile(r"^(?P<head>.*)\[(?P<parts>[^\]]+)\]$")


def members(path: str) -> tuple[str, ...]:
    """Diffusers' paths that a path stands for: itself, or the parts of a fused one, in row order."""
    match = _FUSED.match(path) if is_fused(path) else None
    if not match:
        return (path,)
    return tuple(match["head"] + part for part in match["parts"].split(","))


def is_fused(path: str) -> bool:
    """Whether a path stands for several modules."""
    return path.endswith("]")


def row_sizes(path: str, out: int, into: int) -> tuple[int, ...]:
    """Rows of each part of a weight [out, into]: equal thirds of q, k, v; Flux' linear1 is q, k, v of the hidden
    width each and the rest for the MLP. Raises ValueError when the rows do not divide."""
    parts = members(path)
    sizes: tuple[int, ...]
    if parts[-1].endswith("proj_mlp"):
        width = into if out > 3 * into else 0
        sizes = (width, width, width, out - 3 * width)
    else:
        sizes = (out // len(parts),) * len(parts)
    if sum(sizes) != out or min(sizes) <= 0:
        raise ValueError(f"{path}: {out} rows cannot be divided into {len(parts)} parts")
    return sizes
