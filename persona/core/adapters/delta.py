"""The oracle: what an entry adds to a weight. The one place that does arithmetic for meaning; every test and every
certificate compares with it (dialects.md §4).

Everything is computed in float64 and rounded once to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from persona.core.adapters.entry import Entry
from persona.core.adapters.fusion import is_fused, members, row_sizes
from persona.core.adapters.rotation import turned
from persona.core.host.errors import ConversionError

Array = np.ndarray[Any, np.dtype[Any]]
NEEDS_BASE = frozenset({"ia3", "glora", "peft_oft", "peft_boft"})


def needs_base(entry: Entry) -> bool:
    """Whether the delta depends on the weight it is added to: DoRA, IA3, GLoRA, PEFT's OFT and BOFT."""
    return entry.magnitude is not None or entry.algorithm in NEEDS_BASE


def called(entry: Entry) -> str:
    """What an entry is, in words."""
    if entry.magnitude is not None:
        return "DoRA"
    return {"peft_oft": "PEFT's OFT", "peft_boft": "PEFT's BOFT"}.get(entry.algorithm, entry.algorithm)


def delta(entry: Entry, base_weight: Any = None) -> Array:
    """What `entry` adds at strength 1: float32, [out, in] or [out, in, kh, kw].

    `base_weight` is the weight it is added to, where `needs_base` says so. Raises ConversionError when it is missing,
    and for algorithms that are kept opaque (LyCORIS' OFT and BOFT).
    """
    if entry.algorithm not in _DELTAS:
        raise ConversionError(f"{entry.name}: {entry.algorithm} is carried as it is; its ΔW is not computed.")
    if needs_base(entry) and base_weight is None:
        raise ConversionError(f"{entry.name}: {called(entry)} needs the base model's weight.", hint="--base MODEL")
    base = None if base_weight is None else np.asarray(base_weight).astype(np.float64)
    change = _in_kernel_shape(entry, _DELTAS[entry.algorithm](entry, base))
    if "scalar" in entry.factors:  # LyCORIS use_scalar, normally multiplied in when saved
        change = change * float(_factor(entry, "scalar").reshape(-1)[0])
    if entry.magnitude is not None and base is not None:
        change = _decomposed(entry, change, base.reshape(change.shape))
    return change.astype(np.float32)


def bias_delta(entry: Entry) -> Array | None:
    """What the entry adds to the module's bias, float32 [out], or None. LoRA's own bias is scaled (PEFT lora_bias),
    a stored difference (LyCORIS `diff_b`) is not."""
    parts = [_wide(entry.bias) * entry.scale.value] if entry.bias is not None else []
    if "diff_b" in entry.factors:
        parts.append(_factor(entry, "diff_b"))
    return np.asarray(sum(parts), np.float32) if parts else None


class Deltas(Mapping[str, Array]):
    """Lazy mapping `component.path` -> ΔW; a fused entry appears under each of its parts."""

    def __init__(self, entries: Iterable[Entry], base: Mapping[str, Any] | None = None) -> None:
        self._base = base
        self._entries: dict[str, Entry] = {}
        for entry in entries:
            if entry.factors.keys() == {"diff_b"}:  # LyCORIS can keep a bias alone: no weight changes
                continue
            for path in members(entry.path):
                self._entries[f"{entry.component}.{path}"] = entry

    def __getitem__(self, name: str) -> Array:
        entry = self._entries[name]
        if not is_fused(entry.path):
            return delta(entry, None if self._base is None else self._base.get(name))
        names = [f"{entry.component}.{path}" for path in members(entry.path)]
        base = None if self._base is None else np.concatenate([np.asarray(self._base[part]) for part in names])
        change = delta(entry, base)
        sizes = row_sizes(entry.path, change.shape[0], change.shape[1])
        start = sum(sizes[: names.index(name)])
        return change[start : start + sizes[names.index(name)]]

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would calculate the delta to see

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _wide(values: Any) -> Array:
    return np.asarray(np.asarray(values), np.float64)


def _factor(entry: Entry, name: str) -> Array:
    return _wide(entry.factors[name])


def _lora(entry: Entry, _: Array | None) -> Array:
    """s·up·down, for a convolution over the flattened kernel; Tucker: Σ up[i,m]·mid[m,n,h,w]·down[n,j] (§4.1)."""
    up, down = _factor(entry, "up"), _factor(entry, "down")
    scale = entry.scale.value
    up = up.reshape(up.shape[0], -1)
    if "mid" in entry.factors:
        mid = _factor(entry, "mid")
        return np.asarray(
            scale * np.einsum("im,mnhw,nj->ijhw", up, mid, down.reshape(down.shape[0], -1), optimize=True)
        )
    return np.asarray(scale * (up @ down.reshape(down.shape[0], -1)).reshape(up.shape[0], *down.shape[1:]))


def _loha(entry: Entry, _: Array | None) -> Array:
    """s·(W1 ∘ W2), each W = w_a·w_b, or with t: Σ t[m,n,h,w]·w_a[m,i]·w_b[n,j] (§4.2)."""

    def half(k: int) -> Array:
        a, b = _factor(entry, f"w{k}_a"), _factor(entry, f"w{k}_b")
        if f"t{k}" in entry.factors:
            return np.asarray(np.einsum("mnhw,mi,nj->ijhw", _factor(entry, f"t{k}"), a, b, optimize=True))
        return (a @ b.reshape(b.shape[0], -1)).reshape(a.shape[0], *b.shape[1:])

    return entry.scale.value * half(1) * half(2)


def _lokr(entry: Entry, _: Array | None) -> Array:
    """s·(w1 ⊗ w2) over the first two axes (§4.3)."""
    if "w1" in entry.factors:
        first = _factor(entry, "w1")
    else:
        first = np.asarray(_factor(entry, "w1_a") @ _factor(entry, "w1_b"))
    second = _lokr_second(entry)
    rows, columns = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    product = np.einsum("ac,bd...->abcd...", first, second)
    return np.asarray(entry.scale.value * product.reshape(rows, columns, *second.shape[2:]))


def _lokr_second(entry: Entry) -> Array:
    if "w2" in entry.factors:
        return _factor(entry, "w2")
    a, b = _factor(entry, "w2_a"), _factor(entry, "w2_b")
    if "t2" in entry.factors:
        return np.asarray(np.einsum("mnhw,mb,nd->bdhw", _factor(entry, "t2"), a, b, optimize=True))
    second = a @ b.reshape(b.shape[0], -1)
    if b.ndim == 2 and entry.kernel and len(entry.kernel) == 2:  # [rank, d·kh·kw]: the kernel is inside the columns
        second = second.reshape(second.shape[0], -1, *entry.kernel)
        return second
    return second.reshape(second.shape[0], *b.shape[1:])


def _difference(entry: Entry, _: Array | None) -> Array:
    """A stored difference is added as it is; alpha does not apply (§4.7)."""
    if "diff" not in entry.factors:
        raise ConversionError(f"{entry.name} changes a bias alone; it has no ΔW.")
    return _factor(entry, "diff")


def _ia3(entry: Entry, base: Array | None) -> Array:
    """W∘(1+w) − W, along the input when `on_input` says so (§4.5)."""
    assert base is not None
    on_input = bool(_factor(entry, "on_input").reshape(-1)[0]) if "on_input" in entry.factors else False
    if "ia3_l" in entry.factors:  # PEFT: starts at 1, [1, in] on feed-forward layers, [out, 1] elsewhere
        line = _factor(entry, "ia3_l")
        on_input = on_input or (line.ndim == 2 and line.shape[0] == 1 < line.shape[1])
        factor = line.reshape(-1) - 1
    else:
        factor = _factor(entry, "weight").reshape(-1)
    shape = (1, -1) if on_input else (-1, 1)
    return np.asarray(base * factor.reshape(*shape, *([1] * (base.ndim - 2))))


def _glora(entry: Entry, base: Array | None) -> Array:
    """s·(b1·b2 + W·a1·a2) in LyCORIS' present order, a1·a2 over the channels of a convolution (§4.7); with bm, b1·b2
    is a Tucker product. Source: LyCORIS modules/glora.py, make_weight."""
    assert base is not None
    a1, a2, b1, b2 = (_factor(entry, name) for name in ("a1", "a2", "b1", "b2"))
    a1, a2, b1, b2 = (value.reshape(value.shape[0], -1) for value in (a1, a2, b1, b2))
    if "bm" in entry.factors:
        product = np.einsum("im,mnhw,nj->ijhw", b1, _factor(entry, "bm"), b2, optimize=True)
    else:
        product = (b1 @ b2).reshape(base.shape)
    return np.asarray(entry.scale.value * (product + np.einsum("oi...,ij->oj...", base, a1 @ a2)))


def _turned(entry: Entry, base: Array | None) -> Array:
    assert base is not None
    return turned(entry, base)


_DELTAS: dict[str, Callable[[Entry, Array | None], Array]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "full": _difference,
    "norm": _difference,
    "ia3": _ia3,
    "glora": _glora,
    "peft_oft": _turned,
    "peft_boft": _turned,
}


def _in_kernel_shape(entry: Entry, change: Array) -> Array:
    """Columns that hold a flattened kernel unfolded; 1x1 kernels shown or hidden as the module has them."""
    if change.ndim == 2 and entry.kernel:
        return change.reshape(change.shape[0], -1, *entry.kernel)
    if change.ndim == 4 and entry.kernel == () and change.shape[2:] == (1, 1):
        return change[:, :, 0, 0]
    return change


def _decomposed(entry: Entry, change: Array, base: Array) -> Array:
    """DoRA: m∘V/‖V‖ − W with V = W + ΔW, the norm over every axis but the kept one (§4.4)."""
    assert entry.magnitude is not None
    merged = base + change
    kept = 0 if entry.magnitude.axis == "out" else 1
    axes = tuple(axis for axis in range(merged.ndim) if axis != kept)
    shape = [1] * merged.ndim
    shape[kept] = -1
    vector = _wide(entry.magnitude.vector).reshape(shape)
    norm = np.sqrt((merged**2).sum(axis=axes, keepdims=True))
    return np.asarray(vector * merged / norm - base)
