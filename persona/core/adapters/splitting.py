"""Joined modules apart, and separate ones together (dialects.md §2.6). Both exact: rows are copied, never mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from persona.core.adapters.entry import Entry, Magnitude, Scale
from persona.core.adapters.evidence import weight_shape
from persona.core.adapters.expansion import as_lora
from persona.core.adapters.folding import folded
from persona.core.adapters.fusion import members, row_sizes
from persona.core.adapters.reshaping import mapped, rows, same_bits, stacked, widest
from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.host.errors import ConversionError


def split(entry: Entry) -> list[Entry]:
    """One entry per part of a joined module: the whole down factor (its own slice, where up is block-diagonal) and the
    part's rows of up; alpha over rank stays. Raises ConversionError when the rows cannot be divided."""
    if entry.magnitude is not None and entry.magnitude.axis == "in":
        raise ConversionError(f"{entry.name}: a DoRA vector along the input cannot be divided without the base model.")
    if entry.algorithm == "lokr":
        entry = as_lora(entry)
    shape = weight_shape(entry)
    if shape is None or entry.algorithm not in ("lora", "loha", "full"):
        raise ConversionError(f"{entry.name}: {entry.algorithm} cannot be divided.")
    try:
        sizes = row_sizes(entry.path, *shape)
    except ValueError as error:
        raise ConversionError(f"{entry.component}.{error}.") from None
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    slices = _rank_slices(entry, sizes)
    return [
        _part(entry, path, start, start + size, slices[n] if slices else None)
        for n, (path, start, size) in enumerate(zip(members(entry.path), starts, sizes, strict=True))
    ]


def _part(entry: Entry, path: str, start: int, stop: int, ranks: tuple[int, int] | None) -> Entry:
    sliced = {"up", "diff", "diff_b"} if "t1" in entry.factors else {"up", "diff", "diff_b", "w1_a", "w2_a"}
    factors = {name: rows(ref, start, stop) if name in sliced else ref for name, ref in entry.factors.items()}
    if "t1" in entry.factors:  # Tucker LoHa keeps the outputs in columns
        for name in ("w1_a", "w2_a"):
            ref = entry.factors[name]
            factors[name] = mapped(ref, (ref.shape[0], stop - start), lambda v, a=start, b=stop: v[:, a:b])  # type: ignore[misc]
    scale = entry.scale
    if ranks is not None:
        first, last = ranks
        factors["down"] = rows(factors["down"], first, last)
        up = factors["up"]
        factors["up"] = mapped(up, (up.shape[0], last - first, *up.shape[2:]), lambda v: v[:, first:last])
        scale = Scale(scale.value * (last - first), last - first, "rank", scale.origin)
    magnitude = entry.magnitude
    if magnitude is not None:
        magnitude = Magnitude(rows(magnitude.vector, start, stop), "out")
    bias = rows(entry.bias, start, stop) if entry.bias is not None else None
    return replace(entry, path=path, factors=factors, scale=scale, magnitude=magnitude, bias=bias)


def _rank_slices(entry: Entry, sizes: Sequence[int]) -> list[tuple[int, int]] | None:
    """The rank slice of each part when up is block-diagonal over slices that cover the rank, else None."""
    if entry.algorithm != "lora" or "mid" in entry.factors or entry.scale.rank < len(sizes):
        return None
    up = np.asarray(entry.factors["up"].read() != 0).reshape(entry.factors["up"].shape[:2])
    slices, start, column = [], 0, 0
    for n, size in enumerate(sizes):
        used = np.flatnonzero(up[start : start + size].any(axis=0))
        if len(used) == 0 or used[0] < column:
            return None
        end = int(used[-1]) + 1 if n < len(sizes) - 1 else up.shape[1]
        slices.append((column, end))
        start, column = start + size, end
    return slices


def join(parts: Sequence[Entry], path: str) -> Entry:
    """One entry for a joined module. Parts that share down, bit for bit, are stacked; others make up block-diagonal.
    Missing parts become rows of zeros. Raises ConversionError when the parts cannot share a weight."""
    first, complete = parts[0], len(parts) == len(members(path))
    if any(part.bias is not None for part in parts):
        raise ConversionError(f"{first.name} and its neighbours cannot be joined: it has no place for a trained bias.")
    if complete and all(part.algorithm == "full" and part.factors.keys() == first.factors.keys() for part in parts):
        names = first.factors
        return replace(
            first, path=path, factors={name: stacked([part.factors[name] for part in parts]) for name in names}
        )
    plain = [as_lora(part) if part.algorithm in ("lora", "loha", "lokr", "full") else part for part in parts]
    if any(part.algorithm != "lora" for part in plain):
        raise ConversionError(f"{first.name} and its neighbours cannot be joined: {first.algorithm}.")
    magnitude = _joined_magnitude(plain, path)
    shared = complete and all(
        part.scale.value == plain[0].scale.value and same_bits(part.factors["down"], plain[0].factors["down"])
        for part in plain[1:]
    )
    if shared:
        factors = {"down": plain[0].factors["down"], "up": stacked([part.factors["up"] for part in plain])}
        made = replace(plain[0], path=path, factors=factors, magnitude=magnitude)
    else:
        made = _block_diagonal(plain, path, magnitude)
    return replace(made, factors={**made.factors, **_joined_shift(plain, path)})


def _block_diagonal(parts: Sequence[Entry], path: str, magnitude: Magnitude | None) -> Entry:
    scales = {part.scale.value for part in parts}
    scale = scales.pop() if len(scales) == 1 else 1.0
    ready = list(parts) if not scales else [folded(part) for part in parts]
    dtype = widest(part.factors["up"].dtype for part in ready)
    present = {part.path: part for part in ready}
    sizes = _rows_of(present, path)
    rank = sum(part.scale.rank for part in ready)

    def up() -> Any:
        whole = np.zeros((sum(sizes), rank), dtype)
        row = column = 0
        for name, size in zip(members(path), sizes, strict=True):
            if name in present:
                block = present[name].factors["up"].read()
                whole[row : row + size, column : column + block.shape[1]] = block.reshape(block.shape[:2])
                column += block.shape[1]
            row += size
        return whole

    order = [present[name] for name in members(path) if name in present]
    down = stacked([part.factors["down"] for part in order])
    factors = {"down": down, "up": TensorRef(dtype, (sum(sizes), rank), up)}
    made = Scale(scale * rank, rank, "rank", order[0].scale.origin)
    return replace(order[0], path=path, factors=factors, scale=made, magnitude=magnitude)


def _joined_shift(parts: Sequence[Entry], path: str) -> dict[str, TensorRef]:
    """The parts' differences of the bias below each other, zeros where a part has none; nothing when none has one."""
    found = {part.path: part.factors["diff_b"] for part in parts if "diff_b" in part.factors}
    if not found:
        return {}
    sizes = _rows_of({part.path: part for part in parts}, path)
    dtype = widest(ref.dtype for ref in found.values())
    zeros = [in_memory(np.zeros(size, dtype)) for size in sizes]
    return {"diff_b": stacked([found.get(name, zero) for name, zero in zip(members(path), zeros, strict=True)])}


def _rows_of(present: Mapping[str, Entry], path: str) -> list[int]:
    """The rows of each part of a joined module, of those that are missing too."""
    into = next(iter(present.values())).factors["down"].shape[1]
    widths = {name: 4 * into if name.endswith("proj_mlp") else into for name in members(path)}
    return [present[name].factors["up"].shape[0] if name in present else width for name, width in widths.items()]


def _joined_magnitude(parts: Sequence[Entry], path: str) -> Magnitude | None:
    vectors = [part.magnitude for part in parts if part.magnitude is not None]
    if not vectors:
        return None
    if len(vectors) != len(members(path)) or any(vector.axis != "out" for vector in vectors):
        raise ConversionError(
            f"{parts[0].name}: the DoRA vectors of a joined module must all be there, along the output."
        )
    return Magnitude(stacked([vector.vector for vector in vectors]), "out")
