"""PEFT's methods beyond plain LoRA, as its folders keep them: adapter_config.json, and the shapes of PEFT's layers.

One folder has one method, and for LoKr one way of dividing every width in two; what PEFT cannot keep so is written as
LoRA. Source: huggingface/peft 0.21 tuners/{lora,loha,lokr,ia3}/{config,layer}.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from persona.core.adapters.entry import Entry, Scale
from persona.core.adapters.reshaping import reshaped
from persona.formats.dialects import ia3
from persona.formats.dialects.lora_config import config_of

METHODS = frozenset({"lora", "loha", "lokr", "ia3"})
"""What persona writes; other algorithms become LoRA."""

NEVER_LORA = frozenset({"oft", "boft", "norm", "opaque"})
"""Refused: OFT and BOFT turn the output in LyCORIS and the input in PEFT, so that neither is the other's."""


def config_for(entries: Sequence[Entry]) -> dict[str, Any]:
    """The fields of adapter_config.json that are a method's own; all entries are of one method and fit together."""
    return _CONFIGS[entries[0].algorithm](entries)


def in_folder(entry: Entry) -> Entry:
    """An entry with the factors PEFT's layers have. Raises NoPlace for one that they cannot hold."""
    if entry.algorithm == "ia3":
        return ia3.as_peft(entry)
    if entry.algorithm not in ("loha", "lokr") or {"t1", "t2"} & entry.factors.keys():
        return entry
    flat = {
        name: reshaped(ref, (ref.shape[0], math.prod(ref.shape[1:]))) if name.endswith("_b") else ref
        for name, ref in entry.factors.items()
    }
    return replace(entry, factors=flat)


def apart(entries: Sequence[Entry]) -> str | None:
    """Why the modules of one folder cannot all be kept in the method they have, or None when they can."""
    kept = [entry for entry in entries if entry.algorithm not in NEVER_LORA]
    methods = sorted({entry.algorithm if entry.algorithm in METHODS else "lora" for entry in kept})
    if len(methods) > 1:
        return f"a folder has one method, and these are {' and '.join(methods)}"
    if not methods or methods == ["lora"]:
        return None
    entries = kept
    if any(entry.magnitude is not None for entry in entries):
        return f"it has DoRA on LoRA alone, not on {methods[0]}"
    wide = [entry for entry in entries if (entry.kernel or (1, 1)) != (1, 1)]
    if methods[0] == "loha" and len({"t1" in entry.factors for entry in wide}) > 1:
        return "a folder has a Tucker core in all convolutions or in none"
    if methods[0] == "lokr" and _division(entries) is None:
        return "a folder divides the widths of all modules in one way, and these are divided otherwise"
    return None


def _lora(entries: Sequence[Entry]) -> dict[str, Any]:
    fixed = {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
    }
    return {**fixed, **config_of(entries)}


def _loha(entries: Sequence[Entry]) -> dict[str, Any]:
    """LoHaConfig calls alpha `alpha`, and says for all convolutions at once whether they have a Tucker core."""
    return {"peft_type": "LOHA", **_shared(entries), "use_effective_conv2d": any("t1" in e.factors for e in entries)}


def _lokr(entries: Sequence[Entry]) -> dict[str, Any]:
    division = _division(entries)
    assert division is not None, "apart() would have said so"
    factor, both = division
    scaled = [replace(entry, scale=_scale(entry)) for entry in entries]
    return {
        "peft_type": "LOKR",
        **_shared(scaled),
        "use_effective_conv2d": any("t2" in entry.factors for entry in entries),
        "decompose_both": both,
        "decompose_factor": factor,
    }


def _ia3(entries: Sequence[Entry]) -> dict[str, Any]:
    paths = {entry.path: entry for entry in entries}
    on_input = [entry for entry in paths.values() if ia3.on_input(entry)]
    return {
        "peft_type": "IA3",
        "target_modules": config_of(entries)["target_modules"],
        "feedforward_modules": config_of(on_input)["target_modules"] if on_input else [],
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }


def _shared(entries: Sequence[Entry]) -> dict[str, Any]:
    shared = config_of(entries)
    return {
        "r": shared["r"],
        "alpha": shared["lora_alpha"],
        "rank_pattern": shared["rank_pattern"],
        "alpha_pattern": shared["alpha_pattern"],
        "target_modules": shared["target_modules"],
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "init_weights": True,
    }


_CONFIGS = {"lora": _lora, "loha": _loha, "lokr": _lokr, "ia3": _ia3}


def _scale(entry: Entry) -> Scale:
    """PEFT divides alpha by a rank even where both halves are whole: one is made up that keeps them whole."""
    rank = _rank(entry)
    return replace(entry.scale, alpha=entry.scale.value * rank, rank=rank, mode="rank", stored=None)


def _rank(entry: Entry) -> int:
    whole = "w1" in entry.factors and "w2" in entry.factors
    return max(max(_halves(entry)[0]), max(_halves(entry)[1])) if whole else entry.scale.rank


def _halves(entry: Entry) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) of the two halves that LoKr multiplies."""
    shape = {name: ref.shape for name, ref in entry.factors.items()}
    first = shape["w1"] if "w1" in shape else (shape["w1_a"][0], shape["w1_b"][1])
    if "w2" in shape:
        second = shape["w2"][:2]
    elif "t2" in shape:
        second = (shape["w2_a"][1], shape["w2_b"][1])
    else:
        columns = math.prod(shape["w2_b"][1:])
        second = (shape["w2_a"][0], columns // math.prod(entry.kernel or (1,)))
    return (first[0], first[1]), (second[0], second[1])


def _division(entries: Sequence[Entry]) -> tuple[int, bool] | None:
    """(decompose_factor, decompose_both) with which PEFT's layers have the shapes of all these, or None."""
    both = any("w1_a" in entry.factors for entry in entries)
    cores = {"t2" in e.factors for e in entries if "w2" not in e.factors and (e.kernel or (1, 1)) != (1, 1)}
    if len(cores) > 1 or not all(_pairs_fit(entry, both=both) for entry in entries):
        return None
    for factor in _candidates(entries):
        if all(_divided(entry, factor) for entry in entries):
            return factor, both
    return None


def _pairs_fit(entry: Entry, *, both: bool) -> bool:
    """Whether PEFT would keep each half as a pair, or whole, where this entry does: by its rank."""
    first, second = _halves(entry)
    rank = _rank(entry)
    pair_first, pair_second = "w1_a" in entry.factors, "w2_a" in entry.factors
    return pair_first == (both and rank < max(first) / 2) and pair_second == (rank < max(second) / 2)


def _candidates(entries: Sequence[Entry]) -> Iterator[int]:
    yield -1
    yield from sorted({size for entry in entries for size in _halves(entry)[0] if size > 1})
    yield from range(2, max(size for entry in entries for size in _halves(entry)[0]) + 2)


def _divided(entry: Entry, factor: int) -> bool:
    (a, c), (b, d) = _halves(entry)
    return divided(a * b, factor) == (a, b) and divided(c * d, factor) == (c, d)


@lru_cache(maxsize=4096)
def divided(width: int, factor: int) -> tuple[int, int]:
    """A width as PEFT's LoKr divides it in two (tuners/lokr/layer.py factorization): by `factor` where that goes, else
    by the largest divisor up to it and up to the square root; -1 for the most even parts."""
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    largest = math.isqrt(width) if factor == -1 else min(factor, math.isqrt(width))
    first = max(divisor for divisor in range(1, largest + 1) if width % divisor == 0)
    return first, width // first
