"""Another dtype for the weights of an adapter, rounded once, never to infinity unnoticed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from persona.core.adapters.entry import Adapter, Embedding, Entry
from persona.core.adapters.tensor import BFLOAT16, TensorRef
from persona.core.host.errors import ConversionError, UsageError, did_you_mean

NAMES: Mapping[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "fp16": np.dtype(np.float16),
    "half": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "bf16": BFLOAT16,
    "float32": np.dtype(np.float32),
    "fp32": np.dtype(np.float32),
    "float": np.dtype(np.float32),
}


def dtype_called(name: str) -> np.dtype[Any]:
    """The dtype of `--dtype`. Raises UsageError."""
    if name.lower() not in NAMES:
        raise UsageError(
            f"There is no dtype {name!r}. {did_you_mean(name, NAMES)}", hint="--dtype float16 | bfloat16 | float32"
        )
    return NAMES[name.lower()]


def with_dtype(adapter: Adapter, dtype: np.dtype[Any]) -> Adapter:
    """The same adapter with its factors, vectors and differences in `dtype`; alphas stay as they are."""
    entries = {key: _entry(entry, dtype) for key, entry in adapter.entries.items()}
    embeddings = [
        Embedding(one.token, {name: rounded(ref, dtype, one.token) for name, ref in one.vectors.items()}, one.origin)
        for one in adapter.embeddings
    ]
    return replace(adapter, entries=entries, embeddings=embeddings)


def _entry(entry: Entry, dtype: np.dtype[Any]) -> Entry:
    factors = {name: rounded(ref, dtype, f"{entry.name} {name}") for name, ref in entry.factors.items()}
    magnitude = entry.magnitude
    if magnitude is not None:
        magnitude = replace(magnitude, vector=rounded(magnitude.vector, dtype, f"{entry.name} magnitude"))
    bias = rounded(entry.bias, dtype, f"{entry.name} bias") if entry.bias is not None else None
    return replace(entry, factors=factors, magnitude=magnitude, bias=bias)


def rounded(ref: TensorRef, dtype: np.dtype[Any], name: str) -> TensorRef:
    """`ref` in `dtype` when it is read; whole numbers and truth values stay. Raises ConversionError (when read) for a
    finite value that `dtype` cannot hold."""
    is_float = ref.dtype.kind == "f" or ref.dtype.kind == "V"  # ml_dtypes' types are of kind V
    if ref.dtype == dtype or not is_float or ref.python is not None:
        return ref

    def load() -> np.ndarray[Any, Any]:
        values = ref.read()
        with np.errstate(over="ignore"):
            result = values.astype(dtype)
        lost = np.isfinite(values.astype(np.float32)) & ~np.isfinite(result.astype(np.float32))
        if lost.any():
            largest = float(np.abs(values.astype(np.float64)).max())
            raise ConversionError(
                f"{name} holds {largest:g}, more than {dtype} can.", hint="Keep its range: --dtype bfloat16"
            )
        return result

    return TensorRef(dtype, ref.shape, load)
