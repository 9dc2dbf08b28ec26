"""IA3 as LyCORIS and as PEFT keep it: one adds to 1 what the other multiplies by (dialects.md §4.5).

LyCORIS: `weight` (starts at 0) and `on_input`. PEFT: `ia3_l` (starts at 1), on feed-forward layers along the input. On
the output PEFT multiplies the bias too and LyCORIS does not: a module with a bias is not the other's there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from persona.core.adapters.entry import Entry
from persona.core.adapters.evidence import form
from persona.core.adapters.expansion import computed, wide
from persona.core.adapters.reshaping import reshaped
from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.host.errors import NoPlace, UnreadableFile
from persona.formats.dialects.lora_config import is_harmless
from persona.formats.models.families import FAMILIES


def on_input(entry: Entry) -> bool:
    """Whether the input is scaled, not the output."""
    flag = entry.factors.get("on_input")
    return flag is not None and bool(np.asarray(flag.read()).reshape(-1)[0])


def told_side(entry: Entry, config: Mapping[str, Any] | None) -> Entry:
    """PEFT's entry with `on_input` beside its factor: its shape on a linear layer, [1, in] or [out, 1], and
    `feedforward_modules` of adapter_config.json on a convolution, which is [1, width, 1, 1] either way. Raises
    UnreadableFile where nothing says which."""
    shape = entry.factors["ia3_l"].shape
    decided = len(shape) == 2 and shape != (1, 1)
    side = shape[0] == 1 if decided else _is_feedforward(entry, config)
    return replace(entry, factors={**entry.factors, "on_input": in_memory(np.array(side))})


def _is_feedforward(entry: Entry, config: Mapping[str, Any] | None) -> bool:
    """As PEFT decides it (tuners/ia3/model.py): a list of endings, or one regular expression for the whole name."""
    named = None if config is None else config.get("feedforward_modules")
    module = entry.origin["ia3_l"].removeprefix("base_model.model.").removesuffix(".ia3_l")
    if isinstance(named, list | tuple):
        return any(isinstance(ending, str) and module.endswith(ending) for ending in named)
    if isinstance(named, str) and is_harmless(named):
        return re.fullmatch(named, module) is not None
    raise UnreadableFile(
        f"{entry.name} scales its input or its output, and no adapter_config.json says which.",
        hint="Put PEFT's adapter_config.json beside the weights, with the list feedforward_modules in it.",
    )


def as_peft(entry: Entry) -> Entry:
    """An IA3 entry with PEFT's factor alone. Raises NoPlace where the bias would be scaled too."""
    if "ia3_l" in entry.factors:
        return replace(entry, factors={"ia3_l": entry.factors["ia3_l"]})
    _refuse_bias(entry)
    weight = entry.factors["weight"]
    size, convolution = math.prod(weight.shape), bool(entry.kernel) or len(weight.shape) == 4
    shape = (1, size, 1, 1) if convolution else (1, size) if on_input(entry) else (size, 1)
    return replace(entry, factors={"ia3_l": _moved(weight, shape, 1.0)})


def as_lycoris(entry: Entry) -> Entry:
    """Any entry, IA3 with LyCORIS' two factors. Raises NoPlace where PEFT scales the bias too."""
    if entry.algorithm != "ia3" or "ia3_l" not in entry.factors:
        return entry
    _refuse_bias(entry)
    line = entry.factors["ia3_l"]
    shape = line.shape if len(line.shape) == 4 else (math.prod(line.shape),)
    side = in_memory(np.array(int(on_input(entry)), np.int64))
    return replace(entry, factors={"weight": _moved(line, shape, -1.0), "on_input": side})


def _moved(ref: TensorRef, shape: tuple[int, ...], by: float) -> TensorRef:
    """`ref + by`, rounded once to float32: half precision has no place for a small change of 1."""
    return computed(shape, lambda: wide(reshaped(ref, shape).read()) + by)


def _refuse_bias(entry: Entry) -> None:
    if not on_input(entry) and _has_bias(entry.component, form(entry.path)):
        raise NoPlace(entry.name, "PEFT's IA3 on an output scales the bias too, and LyCORIS' does not")


@lru_cache(maxsize=1024)
def _has_bias(component: str, path_form: str) -> bool:
    """Whether some family's module of this form has a bias."""
    return any(
        module.bias
        for family in FAMILIES.values()
        for config in family.components.get(component, ())
        for module in config.modules()
        if form(module.path) == path_form
    )
