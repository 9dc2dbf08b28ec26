"""One entry as tensors under a name: suffixes, the shapes of alpha and DoRA's vector, Paddle's layout, and the halves
that the original code has the other way round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from persona.core.adapters.entry import Adapter, Entry, Magnitude
from persona.core.adapters.evidence import module_kernels, weight_shape
from persona.core.adapters.expansion import as_lora
from persona.core.adapters.reshaping import reshaped, swapped_halves, transposed
from persona.core.adapters.slots import Slots
from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.host.errors import NoPlace
from persona.formats.models.families import FAMILIES
from persona.formats.models.transformer_names import has_halves_swapped


def spelled(
    entry: Entry, name: str, suffixes: Mapping[str, str], slots: Slots, alpha_shape: tuple[int, ...]
) -> dict[str, TensorRef]:
    """The tensors of one entry under `name`. Raises NoPlace for a factor the dialect has no suffix for."""
    tensors: dict[str, TensorRef] = {}
    if entry.path.endswith(("token_embedding", "position_embedding")):
        entry, suffixes = _on_embedding(entry, suffixes)
    for factor, ref in entry.factors.items():
        factor = "w_norm" if entry.algorithm == "norm" and factor == "diff" else factor
        factor = "b_norm" if entry.algorithm == "norm" and factor == "diff_b" else factor
        ref = transposed(ref) if slots.layout == "paddle" and factor in ("down", "up") else ref
        tensors[name + _suffix(suffixes, factor, entry)] = ref
    if entry.bias is not None:
        tensors[name + _suffix(suffixes, "bias", entry)] = entry.bias
    if entry.magnitude is not None:
        key, ref = _spelled_magnitude(entry, entry.magnitude, suffixes)
        tensors[name + key] = ref
    if slots.alpha == "module" and entry.scale.origin != "not applicable":
        tensors[name + suffixes["alpha"]] = _spelled_alpha(entry, alpha_shape)
    return tensors


def _on_embedding(entry: Entry, suffixes: Mapping[str, str]) -> tuple[Entry, Mapping[str, str]]:
    """PEFT keeps factors of an embedding transposed under names of their own; no other dialect has a place for them."""
    if suffixes.get("down") != ".lora_A.weight" or entry.algorithm != "lora":
        raise NoPlace(entry.name, f"it has no place for {entry.algorithm} on an embedding")
    turned = {
        "lora_embedding_A": transposed(entry.factors["up"]),
        "lora_embedding_B": transposed(entry.factors["down"]),
    }
    return replace(entry, factors=turned), {**suffixes, **{name: f".{name}" for name in turned}}


def _suffix(suffixes: Mapping[str, str], factor: str, entry: Entry) -> str:
    if factor not in suffixes:
        raise NoPlace(entry.name, f"it has no place for {factor} ({entry.algorithm})")
    return suffixes[factor]


def _spelled_magnitude(entry: Entry, magnitude: Magnitude, suffixes: Mapping[str, str]) -> tuple[str, TensorRef]:
    """`dora_scale` is [out, 1(, 1, 1)] or [1, in(, 1, 1)]; PEFT's vector [out], on a convolution [1, out, 1, 1]."""
    shape: tuple[int, ...]
    size, convolution = magnitude.vector.shape[0], any(len(ref.shape) == 4 for ref in entry.factors.values())
    if "dora_scale" in suffixes:
        shape = (size, 1) if magnitude.axis == "out" else (1, size)
        return suffixes["dora_scale"], reshaped(magnitude.vector, (*shape, 1, 1) if convolution else shape)
    if magnitude.axis != "out":
        raise NoPlace(entry.name, "it has no place for a DoRA vector along the input")
    shape = (1, size, 1, 1) if convolution else (size,)
    return _suffix(suffixes, "magnitude", entry), reshaped(magnitude.vector, shape)


def _spelled_alpha(entry: Entry, shape: tuple[int, ...]) -> TensorRef:
    """alpha as a scalar of the factors' own dtype; the tensor it was read from, when nothing changed since."""
    scale = entry.scale
    if scale.stored is not None and scale.mode in ("rank", "none"):
        return scale.stored
    alpha = scale.value * scale.rank
    dtype: Any = next(iter(entry.factors.values())).dtype
    if float(np.asarray(alpha, dtype)) != alpha:  # a dtype that would round alpha would change the strength
        dtype = np.dtype(np.float32)
    return in_memory(np.full(shape, alpha, dtype))


def in_modules_shape(adapter: Adapter) -> Callable[[Entry], Entry]:
    """Entries whose factors have the axes of the module's own weight, where the adapter's families say which: PEFT's
    layers take no others, so that [rank, in, 1, 1] on a linear layer or [rank, in·kh·kw] on a convolution would not
    load (dialects.md §2.2)."""
    names = [adapter.family] if adapter.family else sorted(adapter.families)
    kernel_of = module_kernels(FAMILIES[name] for name in names if name in FAMILIES)

    def shaped(entry: Entry) -> Entry:
        kernel = None if "mid" in entry.factors else kernel_of(entry)
        if kernel is None:
            return entry
        windows = {"up": (1,) * len(kernel), "down": kernel, "w2": kernel}
        return replace(entry, factors={n: _with_window(ref, windows.get(n)) for n, ref in entry.factors.items()})

    return shaped


def _with_window(ref: TensorRef, window: tuple[int, ...] | None) -> TensorRef:
    """[rows, columns], or [rows, columns, 1, 1], with this window taken out of the columns; any other as it is."""
    columns = ref.shape[1] if len(ref.shape) == 2 or ref.shape[2:] == (1, 1) else 0
    if window is None or not columns or columns % math.prod(window):
        return ref
    return reshaped(ref, (ref.shape[0], columns // math.prod(window), *window))


def halves_swapped(entry: Entry) -> bool:
    """Whether the original code has the two halves of this module the other way round (dialects.md §2.4, §2.5)."""
    return entry.component == "transformer" and has_halves_swapped(entry.path, weight_shape(entry))


def with_swapped_halves(entry: Entry) -> Entry:
    """Shift and scale exchanged: the row halves of whatever stands for the outputs. LoKr's rows are its first half's,
    times those of the second: where the first has an even number, exchanging its halves does it. GLoRA's other product
    is of the base's own rows, which are exchanged too."""
    if entry.algorithm == "lokr" and entry.factors["w1" if "w1" in entry.factors else "w1_a"].shape[0] % 2:
        entry = as_lora(entry)
    halved = _OUTPUTS.get(entry.algorithm)
    if halved is None or "t1" in entry.factors:
        raise NoPlace(entry.name, f"the halves of a {entry.algorithm} modulation cannot be exchanged")
    factors = {name: swapped_halves(ref) if name in (*halved, "diff_b") else ref for name, ref in entry.factors.items()}
    magnitude = entry.magnitude
    if magnitude is not None and magnitude.axis == "out":
        magnitude = Magnitude(swapped_halves(magnitude.vector), "out")
    bias = swapped_halves(entry.bias) if entry.bias is not None else None
    return replace(entry, factors=factors, magnitude=magnitude, bias=bias)


_OUTPUTS: dict[str, tuple[str, ...]] = {
    "lora": ("up",),
    "full": ("diff",),
    "loha": ("w1_a", "w2_a"),
    "lokr": ("w1", "w1_a"),
    "glora": ("b1",),
}
"""Algorithm -> the factors that have a row for each output."""
