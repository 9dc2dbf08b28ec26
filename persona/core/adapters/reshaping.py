"""Lazy renamings of tensors: nothing here does arithmetic, so every bit of the source is kept.

Each function takes a TensorRef and returns another that reads the same values in another order or shape, when it is
read. A reshape keeps the span, so that the bytes can still be copied without passing through this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from persona.core.adapters.tensor import TensorRef

Array = np.ndarray[Any, np.dtype[Any]]


def mapped(ref: TensorRef, shape: Sequence[int], values: Callable[[Array], Array]) -> TensorRef:
    """`ref` passed through `values` when it is read; `shape` is the result's."""
    return TensorRef(ref.dtype, tuple(shape), lambda: np.ascontiguousarray(values(ref.read())).reshape(tuple(shape)))


def reshaped(ref: TensorRef, shape: Sequence[int]) -> TensorRef:
    """The same bytes under another shape."""
    wanted = tuple(shape)
    if wanted == ref.shape:
        return ref
    return replace(ref, shape=wanted, load=lambda: ref.read().reshape(wanted))


def squeezed(ref: TensorRef) -> TensorRef:
    """[a, b, 1, 1] as [a, b]; anything else unchanged."""
    return reshaped(ref, ref.shape[:2]) if len(ref.shape) == 4 and ref.shape[2:] == (1, 1) else ref


def unsqueezed(ref: TensorRef) -> TensorRef:
    """[a, b] as [a, b, 1, 1]; anything else unchanged."""
    return reshaped(ref, (*ref.shape, 1, 1)) if len(ref.shape) == 2 else ref


def transposed(ref: TensorRef) -> TensorRef:
    """The two axes of a matrix exchanged; a matrix with a side of 1 keeps its bytes."""
    if len(ref.shape) != 2:
        return ref
    wanted = ref.shape[::-1]
    return reshaped(ref, wanted) if 1 in ref.shape else mapped(ref, wanted, lambda values: values.T)


def rows(ref: TensorRef, start: int, stop: int) -> TensorRef:
    """Rows start..stop of the first axis."""
    return mapped(ref, (stop - start, *ref.shape[1:]), lambda values: values[start:stop])


def stacked(refs: Sequence[TensorRef]) -> TensorRef:
    """Tensors joined along the first axis, in the widest dtype among them."""
    dtype, shape = widest(ref.dtype for ref in refs), (sum(ref.shape[0] for ref in refs), *refs[0].shape[1:])
    return TensorRef(dtype, shape, lambda: np.concatenate([ref.read().astype(dtype, copy=False) for ref in refs]))


def widest(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """The common dtype, or one that holds the values of all: float32 where two kinds of sixteen bits meet."""
    different = set(dtypes)
    if len(different) == 1:
        return different.pop()
    found = max(different, key=lambda dtype: dtype.itemsize)
    return found if found.itemsize >= 4 else np.dtype(np.float32)


def swapped_halves(ref: TensorRef) -> TensorRef:
    """The two halves of the first axis exchanged: shift and scale of a modulation (dialects.md §2.4, §2.5)."""
    half = ref.shape[0] // 2
    return mapped(ref, ref.shape, lambda values: np.concatenate([values[half:], values[:half]], axis=0))


def cast(ref: TensorRef, dtype: np.dtype[Any]) -> TensorRef:
    """`ref` rounded once to `dtype` when it is read."""
    if ref.dtype == dtype:
        return ref
    return TensorRef(dtype, ref.shape, lambda: ref.read().astype(dtype))


def same_bits(first: TensorRef, second: TensorRef) -> bool:
    """Whether two tensors are bit for bit equal."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return first is second or first.read().tobytes() == second.read().tobytes()
