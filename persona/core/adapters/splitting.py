"""Joined modules apart, and separate ones together (dialects.md §2.6). Both exact: rows are copied, never mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from persona.core.adapters.entry import Entry, Magnitude, Scale
from persona.core.adapters.evidence import weight_shape
from persona.core.adapters.expansion import as_lora
from persona.core.adapters.folding import folded
from persona.core.adapters.fusion import members, row_sizes
from persona.core.adapters.reshaping import mapped, rows, same_bits, stacked
from persona.core.adapters.tensor import TensorRef
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
    first = parts[0]
    if all(part.algorithm == "full" for part in parts) and len(parts) == len(members(path)):
        return replace(first, path=path, factors={"diff": stacked([part.factors["diff"] for part in parts])})
    plain = [
        as_lora(part) if part.algorithm in ("loha", "lokr", "full") or "mid" in part.factors else part for part in parts
    ]
    if any(part.algorithm != "lora" for part in plain):
        raise ConversionError(f"{first.name} and its neighbours cannot be joined: {first.algorithm}.")
    magnitude = _joined_magnitude(plain, path)
    shared = len(plain) == len(members(path)) and all(
        part.scale.value == plain[0].scale.value and same_bits(part.factors["down"], plain[0].factors["down"])
        for part in plain[1:]
    )
    dtypes = {part.factors[name].dtype for part in plain for name in ("up", "down")}
    if shared and len(dtypes) == 1:
        factors = {"down": plain[0].factors["down"], "up": stacked([part.factors["up"] for part in plain])}
        return replace(plain[0], path=path, factors=factors, magnitude=magnitude, bias=None)
    return _block_diagonal(plain, path, magnitude)


def _block_diagonal(parts: Sequence[Entry], path: str, magnitude: Magnitude | None) -> Entry:
    scales = {part.scale.value for part in parts}
    scale = scales.pop() if len(scales) == 1 else 1.0
    ready = list(parts) if not scales else [folded(part) for part in parts]
    dtype = np.result_type(*(part.factors["up"].dtype for part in ready)) if ready else np.dtype(np.float32)
    if len({part.factors["up"].dtype for part in ready}) > 1:
        dtype = np.dtype(np.float32)
    into = ready[0].factors["down"].shape[1]
    present = {part.path: part for part in ready}
    sizes = [_rows_of(name, present, into) for name in members(path)]
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
    return replace(order[0], path=path, factors=factors, scale=made, magnitude=magnitude, bias=None)


def _rows_of(path: str, present: dict[str, Entry], into: int) -> int:
    if path in present:
        return present[path].factors["up"].shape[0]
    return 4 * into if path.endswith("proj_mlp") else into


def _joined_magnitude(parts: Sequence[Entry], path: str) -> Magnitude | None:
    vectors = [part.magnitude for part in parts if part.magnitude is not None]
    if not vectors:
        return None
    if len(vectors) != len(members(path)) or any(vector.axis != "out" for vector in vectors):
        raise ConversionError(
            f"{parts[0].name}: the DoRA vectors of a joined module must all be there, along the output."
        )
    return Magnitude(stacked([vector.vector for vector in vectors]), "out")
