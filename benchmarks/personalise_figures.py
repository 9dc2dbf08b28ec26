"""The arithmetic of the table, from embeddings [n, d] of pictures and texts: no model in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def unit(rows: Array) -> Array:
    """Each row divided by its length, float64."""
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def similarity(these: Array, those: Array) -> float:
    """Mean cosine of every row of `these` with every row of `those` (CLIP-I of arXiv 2208.12242, §4.2)."""
    return float((unit(these) @ unit(those).T).mean())


def pairwise(these: Array, those: Array) -> float:
    """Mean cosine of row n of `these` with row n of `those` (CLIP-T, when those are the texts)."""
    return float((unit(these) * unit(those)).sum(axis=1).mean())


def drift(before: Array, after: Array) -> float:
    """1 - the mean cosine of each picture with the one the base makes of the same prompt and noise; 0: nothing
    changed."""
    return 1.0 - pairwise(before, after)


def reached(after: float, before: float, real: float) -> float:
    """How much of the way from the base's pictures to real ones was made: 0 as before, 1 as like as real ones."""
    return (after - before) / (real - before)


def share_right(found: Sequence[str], asked: Sequence[str]) -> float:
    """Share of pictures whose background is the one asked for."""
    return float(np.mean([one == other for one, other in zip(found, asked, strict=True)]))


def shuffled(tensors: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """Each tensor with its own values in another order: sizes and lengths stay, what was learned does not. Tensors of
    one value stay as they are."""
    random = np.random.default_rng(seed)
    return {name: random.permutation(values.ravel()).reshape(values.shape) for name, values in tensors.items()}


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, smallest and largest."""
    return float(np.mean(values)), min(values), max(values)
