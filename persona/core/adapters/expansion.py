"""Other algorithms as plain LoRA: exact algebra that changes the rank and the size, never the meaning (dialects.md §4).

Products of half-precision factors do not fit half precision, so the new factors are float32. The scale is kept: alpha
grows with the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from persona.core.adapters.delta import delta, needs_base
from persona.core.adapters.entry import Entry, Magnitude, Scale
from persona.core.adapters.evidence import weight_shape
from persona.core.adapters.tensor import TensorRef
from persona.core.host.errors import ConversionError

Array = np.ndarray[Any, np.dtype[Any]]
FLOAT32 = np.dtype(np.float32)


def wide(values: Any) -> Array:
    """An array of any dtype as float64."""
    return np.asarray(np.asarray(values), np.float64)


def computed(shape: tuple[int, ...], values: Callable[[], Array], dtype: np.dtype[Any] = FLOAT32) -> TensorRef:
    """A tensor that is calculated when it is read, in float64, and rounded once to `dtype`."""
    return TensorRef(dtype, shape, lambda: np.ascontiguousarray(values()).reshape(shape).astype(dtype))


def as_lora(entry: Entry, base_weight: Any = None) -> Entry:
    """The same ΔW as plain LoRA, exactly; the base weight is needed where `needs_base` says so. Raises ConversionError
    for algorithms that are opaque, and for norms, which are not matrices."""
    entry = without_scalar(entry)
    if needs_base(entry):
        return difference_as_lora(as_difference(entry, base_weight))
    if entry.algorithm == "lora":
        return without_middle(entry) if "mid" in entry.factors else entry
    if entry.algorithm == "loha":
        return _loha_as_lora(entry)
    if entry.algorithm == "lokr":
        return _lokr_as_lora(entry)
    if entry.algorithm == "full":
        return difference_as_lora(entry)
    raise ConversionError(f"{entry.name}: {entry.algorithm} cannot be written as LoRA.")


def as_difference(entry: Entry, base_weight: Any = None) -> Entry:
    """The same ΔW stored whole, float32. Raises ConversionError when the base weight is needed and not given."""
    change = delta(entry, base_weight)
    made = computed(change.shape, lambda: np.asarray(change))
    factors = {"diff": made, **({"diff_b": entry.factors["diff_b"]} if "diff_b" in entry.factors else {})}
    return replace(entry, algorithm="full", factors=factors, scale=_plain(entry, 1), magnitude=None)


def with_neutral_magnitude(entry: Entry, base_weight: Any) -> Entry:
    """A plain module as DoRA that does the same: its vector is the length of every row of W + ΔW."""
    rows = weight_shape(entry)
    assert rows is not None and entry.magnitude is None

    def lengths() -> Array:
        change = wide(delta(entry))
        return np.asarray(np.linalg.norm((wide(base_weight).reshape(change.shape) + change).reshape(rows), axis=1))

    return replace(entry, magnitude=Magnitude(computed(rows[:1], lengths), "out"))


def without_scalar(entry: Entry) -> Entry:
    """LyCORIS' `scalar` (use_scalar) multiplied into alpha."""
    if "scalar" not in entry.factors:
        return entry
    factors = {name: ref for name, ref in entry.factors.items() if name != "scalar"}
    number, rank = float(wide(entry.factors["scalar"].read()).reshape(-1)[0]), entry.scale.rank
    return replace(entry, factors=factors, scale=Scale(entry.scale.value * number * rank, rank, "rank", "computed"))


def without_middle(entry: Entry) -> Entry:
    """Tucker LoRA with the middle factor contracted into down: D[m, j, h, w] = Σ_n mid[m, n, h, w]·down[n, j]."""
    down, mid = entry.factors["down"], entry.factors["mid"]
    shape = (mid.shape[0], down.shape[1], *mid.shape[2:])

    def values() -> Array:
        flat = wide(down.read()).reshape(down.shape[:2])
        return np.asarray(np.einsum("mnhw,nj->mjhw", wide(mid.read()), flat, optimize=True))

    factors = {name: ref for name, ref in entry.factors.items() if name != "mid"}
    factors["down"] = computed(shape, values)
    return replace(entry, factors=factors, scale=_rescaled(entry.scale, shape[0]))


def difference_as_lora(entry: Entry) -> Entry:
    """A stored difference at full rank: the smaller side becomes the identity."""
    diff = entry.factors.get("diff")
    if diff is None or len(diff.shape) not in (2, 4) or "diff_b" in entry.factors:
        raise ConversionError(f"{entry.name}: a difference of a norm or a bias cannot be written as LoRA.")
    out, columns = diff.shape[0], int(np.prod(diff.shape[1:]))
    if out <= columns:
        factors = {"down": diff, "up": _identity(out, diff)}
        return _lora(entry, factors, out, 1.0)
    if len(diff.shape) == 4 and diff.shape[2:] != (1, 1):
        window = diff.shape[1:]
        down = computed((columns, *window), lambda: np.eye(columns).reshape(columns, *window), diff.dtype)
    else:
        down = _identity(columns, diff)
    up = TensorRef(diff.dtype, (out, columns), lambda: diff.read().reshape(out, columns))
    return _lora(entry, {"down": down, "up": _pointwise(up, diff)}, columns, 1.0)


def _loha_as_lora(entry: Entry) -> Entry:
    """Khatri-Rao: up[:, (p, q)] = w1_a[:, p]∘w2_a[:, q], down[(p, q)] = w1_b[p]∘w2_b[q]."""
    shape = weight_shape(entry)
    assert shape is not None
    tucker = "t1" in entry.factors
    ranks = [entry.factors[f"w{k}_a"].shape[0 if tucker else 1] for k in (1, 2)]
    rank = ranks[0] * ranks[1]
    window = _window(entry)
    columns = shape[1] // int(np.prod(window)) if window else shape[1]

    def left(k: int) -> Array:
        a = wide(entry.factors[f"w{k}_a"].read())
        return a.T if tucker else a

    def right(k: int) -> Array:
        b = wide(entry.factors[f"w{k}_b"].read())
        if tucker:
            b = np.einsum("mnhw,nj->mjhw", wide(entry.factors[f"t{k}"].read()), b, optimize=True)
        return np.asarray(b.reshape(b.shape[0], -1))

    factors = {
        "up": computed(
            (shape[0], rank, *_point(window)), lambda: np.einsum("ip,iq->ipq", left(1), left(2)).reshape(shape[0], rank)
        ),
        "down": computed(
            (rank, columns, *window), lambda: np.einsum("pj,qj->pqj", right(1), right(2)).reshape(rank, shape[1])
        ),
    }
    return _lora(entry, factors, rank, entry.scale.value)


def _lokr_as_lora(entry: Entry) -> Entry:
    """(w1 ⊗ w2_a)·(I ⊗ w2_b): rank columns(w1)·rank; with w2 whole, its smaller side takes the identity."""
    first = _lokr_first(entry)
    left, right, window = _lokr_second(entry)
    a, c = first.shape
    b, rank = left.shape
    columns = c * right.shape[1]
    inner = int(np.prod(window)) if window else 1
    factors = {
        "up": computed((a * b, c * rank, *_point(window)), lambda: np.kron(first, left)),
        "down": computed(
            (c * rank, columns // inner, *window),
            lambda: np.einsum("xc,rd->xrcd", np.eye(c), right).reshape(c * rank, columns),
        ),
    }
    return _lora(entry, factors, c * rank, entry.scale.value)


def _lokr_first(entry: Entry) -> Array:
    read = {name: wide(ref.read()) for name, ref in entry.factors.items() if name.startswith("w1")}
    return np.asarray(read["w1"] if "w1" in read else read["w1_a"] @ read["w1_b"])


def _lokr_second(entry: Entry) -> tuple[Array, Array, tuple[int, ...]]:
    """w2 as left [b, rank] times right [rank, d·kh·kw], and the kernel."""
    read = {name: wide(ref.read()) for name, ref in entry.factors.items() if name[:2] in ("w2", "t2")}
    window = _window(entry)
    if "t2" in read:
        right = np.einsum("mnhw,nd->mdhw", read["t2"], read["w2_b"], optimize=True)
        return read["w2_a"].T, right.reshape(right.shape[0], -1), window
    if "w2" in read:
        whole = read["w2"].reshape(read["w2"].shape[0], -1)
        return np.eye(whole.shape[0]), whole, window
    return read["w2_a"], read["w2_b"].reshape(read["w2_b"].shape[0], -1), window


def _window(entry: Entry) -> tuple[int, ...]:
    """The kernel an expanded down factor must show: that of the factors, else the module's."""
    for name in ("t1", "t2"):
        if name in entry.factors:
            return entry.factors[name].shape[2:]
    for name in ("w2", "w2_b", "w1_b"):
        if name in entry.factors and len(entry.factors[name].shape) == 4:
            return entry.factors[name].shape[2:]
    return entry.kernel or ()


def _lora(entry: Entry, factors: dict[str, TensorRef], rank: int, scale: float) -> Entry:
    made = Scale(scale * rank, rank, "rank", entry.scale.origin)
    shift = {"diff_b": entry.factors["diff_b"]} if "diff_b" in entry.factors else {}
    return replace(entry, algorithm="lora", factors={**factors, **shift}, scale=made)


def _rescaled(scale: Scale, rank: int) -> Scale:
    if scale.rank == rank and scale.mode == "rank":
        return scale
    return Scale(None if scale.alpha is None else scale.value * rank, rank, "rank", scale.origin)


def _plain(entry: Entry, rank: int) -> Scale:
    return Scale(None, rank, "none", entry.scale.origin)


def _identity(size: int, like: TensorRef) -> TensorRef:
    return _pointwise(computed((size, size), lambda: np.eye(size), like.dtype), like)


def _pointwise(matrix: TensorRef, like: TensorRef) -> TensorRef:
    if len(like.shape) != 4:
        return matrix
    shape = (*matrix.shape, 1, 1)
    return TensorRef(matrix.dtype, shape, lambda: matrix.read().reshape(shape))


def _point(window: tuple[int, ...]) -> tuple[int, ...]:
    return (1, 1) if window else ()
