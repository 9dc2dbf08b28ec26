"""A named tensor of a file, read when it is wanted: dtype and shape from the header, bytes by range."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8_E5M2 = np.dtype(ml_dtypes.float8_e5m2)


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie in a file as they would be written: C order, little endian, nothing in between."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class TensorRef:
    """One tensor (or scalar, or string) of a file.

    `dtype` is a numpy dtype (`ml_dtypes` types for bfloat16 and float8), `shape` its shape, `load` reads it.
    `span` tells where the same bytes lie in a file, when they lie there in one piece, so that they can be copied
    without passing through this process. `python` is the Python scalar or string a file held in place of a tensor.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray[Any, Any]]
    span: Span | None = None
    python: object | None = None

    def read(self) -> np.ndarray[Any, Any]:
        """The values, an array of `dtype` and `shape`."""
        return self.load()

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        values = self.read()
        return values if dtype is None else values.astype(dtype)


def in_memory(values: Any) -> TensorRef:
    """A TensorRef over values that are in memory already."""
    array = np.asarray(values)
    return TensorRef(array.dtype, tuple(array.shape), lambda: array)
