"""Adapters added up: Σ strength·ΔW, exactly, by putting the low-rank factors side by side.

    up = [c₁·up₁ | c₂·up₂ | …]     down = [down₁ ; down₂ ; …]     rank = Σ ranks

so up·down is the weighted sum and nothing is approximated (a truncation is another step, svd.truncate). Averaging the
factors themselves, as many scripts do, gives something else: cross terms up₁·down₂.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from persona.core.adapters.delta import called, needs_base
from persona.core.adapters.entry import Adapter, Embedding, Entry, Scale
from persona.core.adapters.expansion import as_lora, wide
from persona.core.adapters.folding import scaled
from persona.core.adapters.fusion import is_fused
from persona.core.adapters.reshaping import reshaped, same_bits, widest
from persona.core.adapters.splitting import split
from persona.core.adapters.tensor import TensorRef
from persona.core.host.errors import ConversionError

Array = np.ndarray[Any, np.dtype[Any]]
Weighted = tuple[Adapter, float]
DIFFERENCES = frozenset({"full", "norm"})


def merge(adapters: Sequence[Weighted]) -> Adapter:
    """The adapter whose ΔW is Σ strength·ΔW of `adapters`. The factors keep the widest dtype among the sources.
    Raises ConversionError for different families, for DoRA and other modules whose ΔW depends on the base, and for one
    word with two meanings."""
    families = _common_family([adapter for adapter, _ in adapters])
    grouped: dict[tuple[str, str], list[tuple[Entry, float]]] = {}
    for adapter, strength in _comparable(adapters):
        for key, entry in adapter.entries.items():
            grouped.setdefault(key, []).append((entry, strength))
    entries = {key: _sum(parts) for key, parts in grouped.items()}
    family = next(iter(families)) if len(families) == 1 else None
    return Adapter(family, entries, _words([adapter for adapter, _ in adapters]), families=families)


def _common_family(adapters: Sequence[Adapter]) -> frozenset[str]:
    known = [adapter.families for adapter in adapters if adapter.families]
    common = frozenset.intersection(*known) if known else frozenset()
    if known and not common:
        named = " and ".join("/".join(sorted(families)) for families in dict.fromkeys(known))
        raise ConversionError(f"Adapters of different base models cannot be added up: {named}.")
    return common


def _comparable(adapters: Sequence[Weighted]) -> list[Weighted]:
    """Joined modules divided, when not every adapter joins the same ones."""
    joined = [{key for key in adapter.entries if is_fused(key[1])} for adapter, _ in adapters]
    if all(one == joined[0] for one in joined):
        return list(adapters)
    divided = []
    for adapter, strength in adapters:
        parts = [part for e in adapter.entries.values() for part in (split(e) if is_fused(e.path) else [e])]
        divided.append((replace(adapter, entries={(part.component, part.path): part for part in parts}), strength))
    return divided


def _sum(parts: Sequence[tuple[Entry, float]]) -> Entry:
    for entry, _ in parts:
        if needs_base(entry):
            raise ConversionError(
                f"{entry.name}: what {called(entry)} adds depends on the base model: it cannot be added up as it is.",
                hint="Rewrite it as LoRA first: persona convert IN OUT --to diffusers-legacy --base MODEL",
            )
        if entry.algorithm in ("oft", "boft", "opaque"):
            raise ConversionError(f"{entry.name}: {entry.algorithm} turns the weight and cannot be added up.")
    if len(parts) == 1:
        return strengthened(*parts[0])
    if any(entry.algorithm in DIFFERENCES for entry, _ in parts):
        return _summed_differences(parts)
    return _side_by_side([(as_lora(entry), strength) for entry, strength in parts])


def strengthened(entry: Entry, strength: float) -> Entry:
    """`entry` with ΔW multiplied by `strength`: in alpha where there is one, else in a factor."""
    if strength == 1.0:
        return entry
    if entry.algorithm in DIFFERENCES:
        return replace(entry, factors={name: scaled(ref, strength) for name, ref in entry.factors.items()})
    if entry.scale.mode == "none":
        entry = as_lora(entry)
    scale = Scale(entry.scale.value * strength * entry.scale.rank, entry.scale.rank, "rank", "computed")
    factors = dict(entry.factors)
    if "diff_b" in factors:
        factors["diff_b"] = scaled(factors["diff_b"], strength)
    return replace(entry, scale=scale, factors=factors)


def _side_by_side(parts: Sequence[tuple[Entry, float]]) -> Entry:
    """Plain low-rank entries in one; where their scales agree, the common one is kept, else each goes into its up."""
    scales = [entry.scale.value * strength for entry, strength in parts]
    common = scales[0] if len(set(scales)) == 1 else 1.0
    first = parts[0][0]
    window = next((e.factors["down"].shape[2:] for e, _ in parts if len(e.factors["down"].shape) == 4), ())
    downs = [_with_window(entry.factors["down"], window) for entry, _ in parts]
    ups = [entry.factors["up"] for entry, _ in parts]
    if len({(ref.shape[1:]) for ref in downs}) > 1 or len({ref.shape[0] for ref in ups}) > 1:
        raise ConversionError(f"{first.name} has different sizes in the adapters: they belong to different models.")
    ranks = [ref.shape[0] for ref in downs]
    rank, out = sum(ranks), ups[0].shape[0]
    dtype = widest([ref.dtype for ref in (*ups, *downs)])
    factors = [scale / common if common else 0.0 for scale in scales]

    def up() -> Array:
        columns = [wide(ref).reshape(out, -1) * factor for ref, factor in zip(ups, factors, strict=True)]
        return np.concatenate(columns, axis=1).reshape(out, rank, *((1, 1) if window else ())).astype(dtype)

    def down() -> Array:
        return np.concatenate([np.asarray(ref).astype(dtype) for ref in downs], axis=0)

    made = {
        "up": TensorRef(dtype, (out, rank, *((1, 1) if window else ())), up),
        "down": TensorRef(dtype, (rank, *downs[0].shape[1:]), down),
    }
    shifts = [scaled(e.factors["diff_b"], strength) for e, strength in parts if "diff_b" in e.factors]
    if shifts:
        made["diff_b"] = TensorRef(dtype, shifts[0].shape, lambda: np.asarray(sum(map(wide, shifts))).astype(dtype))
    bias = _summed_bias(parts, common or 1.0, dtype)
    return replace(
        first,
        algorithm="lora",
        factors=made,
        scale=Scale(common * rank, rank, "rank", "computed"),
        bias=bias,
        origin={},
    )


def _with_window(down: TensorRef, window: tuple[int, ...]) -> TensorRef:
    if not window or len(down.shape) == 4:
        return down
    return reshaped(down, (down.shape[0], down.shape[1] // math.prod(window), *window))


def _summed_bias(parts: Sequence[tuple[Entry, float]], common: float, dtype: np.dtype[Any]) -> TensorRef | None:
    """Σ strength·s·bias, over the common scale that will be multiplied in again."""
    biases = [(entry.bias, entry.scale.value * strength) for entry, strength in parts if entry.bias is not None]
    if not biases:
        return None
    shape = biases[0][0].shape
    return TensorRef(
        dtype, shape, lambda: np.asarray(sum(wide(ref) * (scale / common) for ref, scale in biases)).astype(dtype)
    )


def _summed_differences(parts: Sequence[tuple[Entry, float]]) -> Entry:
    """A stored difference absorbs the others: the sum is stored whole."""
    from persona.core.adapters.delta import bias_delta, delta

    stored = next(entry for entry, _ in parts if entry.algorithm in DIFFERENCES)
    factors: dict[str, TensorRef] = {}
    if any("diff" in e.factors or e.algorithm not in DIFFERENCES for e, _ in parts):
        shape = next((e.factors["diff"].shape for e, _ in parts if "diff" in e.factors), None)
        dtype = widest([ref.dtype for e, _ in parts for ref in e.factors.values()])
        changes = [(e, w) for e, w in parts if "diff" in e.factors or e.algorithm not in DIFFERENCES]
        shape = shape if shape is not None else delta(changes[0][0]).shape
        factors["diff"] = TensorRef(
            dtype, shape, lambda: np.asarray(sum(w * wide(delta(e)).reshape(shape) for e, w in changes)).astype(dtype)
        )
    shifts = [(change, w) for e, w in parts if (change := bias_delta(e)) is not None]
    if shifts:
        total = np.asarray(sum(w * wide(change) for change, w in shifts)).astype(np.float32)
        factors["diff_b"] = TensorRef(total.dtype, total.shape, lambda: total)
    return replace(stored, factors=factors, origin={}, bias=None)


def _words(adapters: Sequence[Adapter]) -> list[Embedding]:
    """Every word once. Raises ConversionError when two adapters mean different things by one word."""
    found: dict[str, Embedding] = {}
    for adapter in adapters:
        for one in adapter.embeddings:
            before = found.setdefault(one.token, one)
            same = before.vectors.keys() == one.vectors.keys() and all(
                same_bits(before.vectors[name], one.vectors[name]) for name in one.vectors
            )
            if not same:
                raise ConversionError(f"The word {one.token} is in two adapters, with different vectors.")
    return list(found.values())
