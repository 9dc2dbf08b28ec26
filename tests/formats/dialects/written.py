"""Adapters made by hand for the tests of dialects: seeded factors, no file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from persona.core.adapters.entry import Adapter, Entry, Magnitude, Scale
from persona.core.adapters.tensor import in_memory
from persona.core.host.contracts import Output, State


def lora_entry(
    component: str,
    path: str,
    out: int,
    into: int,
    *,
    rank: int = 2,
    alpha: float | None = None,
    kernel: int = 0,
    dtype: str = "float32",
    dora: str | None = None,
    seed: int = 0,
) -> Entry:
    """A LoRA entry with normal factors; `kernel` makes it a convolution, `dora` gives it a magnitude on that axis."""
    rng = np.random.default_rng([seed, out, into, len(path)])
    window = (kernel, kernel) if kernel else ()
    point = (1, 1) if kernel else ()
    down = rng.standard_normal((rank, into, *window)).astype(dtype)
    up = rng.standard_normal((out, rank, *point)).astype(dtype)
    vector = None
    if dora is not None:
        size = out if dora == "out" else into
        vector = Magnitude(in_memory(rng.standard_normal(size).astype(dtype)), dora)  # type: ignore[arg-type]
    origin = "assumed" if alpha is None else "told"
    factors = {"down": in_memory(down), "up": in_memory(up)}
    return Entry(component, path, "lora", factors, Scale(alpha, rank, "rank", origin), magnitude=vector, kernel=window)


def adapter_of(entries: Sequence[Entry], family: str | None = "sd1") -> Adapter:
    """An adapter of these entries."""
    return Adapter(family, {(entry.component, entry.path): entry for entry in entries})


def state_of(output: Output, container: str = "safetensors") -> State:
    """What a container would give back for a written file."""
    return State(dict(output.tensors), dict(output.metadata), (), container)


def expected_delta(entry: Entry) -> np.ndarray:
    """s·Σ_k up[:, k] ⊗ down[k], one rank at a time: written differently from the oracle."""
    up, down = np.float64(entry.factors["up"].read()), np.float64(entry.factors["down"].read())
    scale = 1.0 if entry.scale.alpha is None else entry.scale.alpha / down.shape[0]
    total = sum(np.multiply.outer(up[:, k].reshape(-1), down[k]) for k in range(down.shape[0]))
    return np.asarray(scale * total)
