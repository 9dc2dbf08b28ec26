"""PEFT's OFT and BOFT: the inputs of a layer are turned, W' = W·Rᵀ, block by block (LyCORIS turns its outputs, R·W, so
that neither can be kept as the other).

Each block is (I − Q)·(I + Q)⁻¹ of a skew-symmetric Q; OFT has by default the first terms of a series, I + 2Q + 2Q² + …,
which is that of the transposed block. BOFT scales the outputs as well. Source: huggingface/peft 0.21
tuners/oft/layer.py `_cayley_batch`, tuners/boft/layer.py `cayley_batch` and `merge`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from persona.core.adapters.entry import Entry
from persona.core.host.errors import ConversionError

Array = np.ndarray[Any, np.dtype[Any]]


def turned(entry: Entry, base: Array) -> Array:
    """W' − W for PEFT's OFT (`oft_R` [blocks, b·(b−1)/2] or one block for all, `neumann_terms`, 0 for the exact form)
    or BOFT (`boft_R` [1, blocks, b, b], `boft_s`). Raises ConversionError when the blocks do not make up the inputs."""
    values = {name: np.asarray(np.asarray(ref), np.float64) for name, ref in entry.factors.items()}
    flat = base.reshape(base.shape[0], -1)
    if entry.algorithm == "peft_oft":
        blocks = _oft_blocks(values["oft_R"], int(values["neumann_terms"]))
    else:
        skew = (values["boft_R"][0] - values["boft_R"][0].swapaxes(1, 2)) / 2
        blocks = _cayley(skew)
    count, size = len(blocks), blocks.shape[1]
    if flat.shape[1] % size or count not in (1, flat.shape[1] // size):
        raise ConversionError(
            f"{entry.name}: {count} blocks of {size} do not make up the {flat.shape[1]} inputs of the base's weight.",
            hint="--base MODEL, the one it was trained on",
        )
    parts = flat.reshape(len(flat), -1, size)
    result = np.einsum("nij,onj->oni", np.broadcast_to(blocks, (parts.shape[1], size, size)), parts)
    result = result.reshape(flat.shape)
    if "boft_s" in values:
        result = result * values["boft_s"].reshape(-1, 1)
    return np.asarray((result - flat).reshape(base.shape))


def block_size(elements: int) -> int | None:
    """The b of b·(b−1)/2 elements above a diagonal, or None where there is none."""
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return size if size * (size - 1) // 2 == elements and size > 1 else None


def _oft_blocks(upper: Array, terms: int) -> Array:
    size = block_size(upper.shape[1])
    assert size is not None, "its shape was checked when it was read"
    skew = np.zeros((len(upper), size, size))
    rows, columns = np.triu_indices(size, 1)
    skew[:, rows, columns] = upper
    skew = skew - skew.swapaxes(1, 2)
    return _neumann(skew, terms) if terms else _cayley(skew)


def _cayley(skew: Array) -> Array:
    identity = np.eye(skew.shape[1])
    return np.asarray((identity - skew) @ np.linalg.inv(identity + skew))


def _neumann(skew: Array, terms: int) -> Array:
    """I + 2Q + 2Q² + … + Qⁿ⁻¹ for n terms. As PEFT has it, two terms end with 2Q, and three are four."""
    highest = max(terms - 1, 3) if terms > 2 else terms - 1
    result = power = np.broadcast_to(np.eye(skew.shape[1]), skew.shape)
    for exponent in range(1, highest + 1):
        power = power @ skew
        result = result + (1 if exponent == highest > 1 else 2) * power
    return np.asarray(result)
