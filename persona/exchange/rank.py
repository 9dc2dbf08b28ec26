"""Adapters at another rank, and adapters out of the difference of two models: truncated singular values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from persona.core.adapters import svd
from persona.core.adapters.delta import called, needs_base
from persona.core.adapters.entry import Adapter, Entry, Scale
from persona.core.adapters.expansion import as_lora
from persona.core.adapters.reshaping import same_bits
from persona.core.adapters.tensor import TensorRef
from persona.core.host.errors import ConversionError
from persona.exchange.base_weights import BaseWeights
from persona.exchange.figures import lora_norm


@dataclass(frozen=True)
class Resized:
    """An adapter at another rank, and for each module the share of ‖ΔW‖ that is left (1: all of it)."""

    adapter: Adapter
    kept: dict[str, float]
    notes: tuple[str, ...] = ()


def resize(adapter: Adapter, rank: int | None = None, energy: float | None = None) -> Resized:
    """Every module at `rank` or less, or at the smallest rank that keeps `energy` of its squared norm. Two small QR
    decompositions and one singular value decomposition of rank × rank; ΔW is not built. Modules that are not low-rank
    (norms) stay. Raises ConversionError for DoRA, whose ΔW depends on the base."""
    entries, kept = {}, {}
    for key, entry in adapter.entries.items():
        if entry.algorithm in ("norm", "oft", "boft", "opaque") or "diff_b" in entry.factors:
            entries[key] = entry
            continue
        if needs_base(entry):
            raise ConversionError(
                f"{entry.name}: the rank of {called(entry)} cannot be changed without the base model."
            )
        reduced = _truncated(as_lora(entry), rank, energy)
        entries[key] = reduced.entry
        kept[entry.name] = 1.0 if _vanishes(entry) else reduced.kept
    return Resized(replace(adapter, entries=entries), kept)


def _vanishes(entry: Entry) -> bool:
    """Whether ΔW is nothing but the rounding of terms that cancel out."""
    norm = lora_norm(entry)
    if norm is None:
        return False
    factors = [np.linalg.norm(np.asarray(entry.factors[name]).astype(np.float64)) for name in ("up", "down")]
    return norm <= 1e-6 * abs(entry.scale.value) * float(factors[0] * factors[1])


def _truncated(entry: Entry, rank: int | None, energy: float | None) -> svd.Truncated:
    """At `rank`, or the rank that keeps `energy`, whichever is smaller."""
    if energy is None:
        return svd.truncate(entry, rank)
    found = svd.truncate(entry, energy=energy)
    return found if rank is None or found.entry.scale.rank <= rank else svd.truncate(entry, rank)


def extract(
    tuned: BaseWeights, base: BaseWeights, rank: int | None, energy: float | None, *, dtype: np.dtype[np.generic]
) -> Resized:
    """The low-rank adapter that turns `base` into `tuned` as nearly as its rank allows. Weights that are equal bit for
    bit give no module. Changes that are not matrices (norms, biases) have no place in a LoRA and are told. Raises
    ConversionError when the models do not have the same weights, or when nothing differs."""
    _require_same_names(tuned, base)
    entries, kept, left_out = {}, {}, []
    for name, ref in base.refs.items():
        other = tuned.refs[name]
        if ref.shape != other.shape:
            raise ConversionError(
                f"{name} is {list(other.shape)} in {tuned.name} and {list(ref.shape)} in {base.name}: they are not the "
                "same architecture."
            )
        if same_bits(ref, other) or (change := _difference(ref, other)) is None:
            continue
        module = name.removesuffix(".weight")
        if len(ref.shape) not in (2, 4) or not name.endswith(".weight") or "embedding" in name:
            left_out.append(name)
            continue
        component, _, path = module.partition(".")
        pattern = Entry(
            component, path, "lora", {"diff": TensorRef(dtype, ref.shape, ref.load)}, Scale(None, 1, "none")
        )
        reduced = svd.from_difference(pattern, change, rank, energy=energy)
        entries[(component, path)] = replace(reduced.entry, kernel=ref.shape[2:])
        kept[module] = reduced.kept
    if not entries:
        raise ConversionError(f"{tuned.name} and {base.name} do not differ in any matrix: there is nothing to extract.")
    return Resized(Adapter(None, entries), kept, tuple(_left_out_notes(left_out)))


def _require_same_names(tuned: BaseWeights, base: BaseWeights) -> None:
    missing = [name for name in base.refs if name not in tuned.refs]
    added = [name for name in tuned.refs if name not in base.refs]
    whole = {name.split(".")[0] for name in tuned.refs} & {name.split(".")[0] for name in base.refs}
    missing = [name for name in missing if name.split(".")[0] in whole]
    if missing or [name for name in added if name.split(".")[0] in whole] or not whole:
        example = (missing or added or ["weights"])[0]
        raise ConversionError(
            f"{tuned.name} and {base.name} do not have the same weights: {example} is in one of them only.",
            hint="Give a model and the base it was trained from, both as diffusers folders.",
        )
    for refs in (tuned.refs, base.refs):
        for name in [name for name in refs if name.split(".")[0] not in whole]:
            del refs[name]  # type: ignore[attr-defined]


def _difference(first: TensorRef, second: TensorRef) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None:
    """second − first in float64, or None when it is zero (two dtypes of one value)."""
    change = np.asarray(second).astype(np.float64) - np.asarray(first).astype(np.float64)
    if not np.isfinite(change).all():
        raise ConversionError("One of the models has values that are not finite.", hint="persona inspect MODEL")
    return change if change.any() else None


def _left_out_notes(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [f"left out, because a LoRA has no place for norms, biases and word tables: {shown}"]


def kept_notes(resized: Resized) -> list[str]:
    """How much of ΔW is left, over all modules and in the worst three."""
    if not resized.kept:
        return list(resized.notes)
    shares = sorted(resized.kept.items(), key=lambda item: item[1])
    ranks = sorted({entry.scale.rank for entry in resized.adapter.entries.values()})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    middle = shares[len(shares) // 2][1]
    notes = [f"rank {span}: {middle:.2%} of ‖ΔW‖ kept in the middle, {shares[0][1]:.2%} in the worst module"]
    notes += [f"  {share:.2%}  {name}" for name, share in shares[:3] if share < 0.9999]
    return [*notes, *resized.notes]
