"""PEFT's OFT and BOFT as its folders keep them: factors, and in adapter_config.json which form of them is meant.

They turn the inputs of a layer; LyCORIS' turn its outputs, so that they are rewritten with the base model's weight only
(dialects.md §4.6). Source: huggingface/peft 0.21 tuners/{oft,boft}/{config,layer}.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from persona.core.adapters.entry import Entry
from persona.core.adapters.rotation import block_size
from persona.core.adapters.tensor import in_memory
from persona.core.host.errors import UnreadableFile

NEUMANN_SINCE = (0, 18)
"""The release of PEFT that changed the series, without a mark in the weights."""
MERGED = "PeftModel.from_pretrained(model, FOLDER).merge_and_unload() in PEFT makes a model of it."


def told_form(entry: Entry, config: Mapping[str, Any]) -> Entry:
    """PEFT's entry with the form its config names. Raises UnreadableFile for forms whose ΔW cannot be known."""
    if "oft_R" in entry.factors:
        _refuse_oft(entry, entry.factors["oft_R"].shape, config)
        neumann, terms = config.get("use_cayley_neumann", False), config.get("num_cayley_neumann_terms", 5)
        terms = min(max(terms, 1), 64) if neumann and isinstance(terms, int) else 0
        return replace(
            entry, algorithm="peft_oft", factors={**entry.factors, "neumann_terms": in_memory(np.array(terms))}
        )
    return _boft(entry)


def _refuse_oft(entry: Entry, shape: tuple[int, ...], config: Mapping[str, Any]) -> None:
    if "oft_block_size" not in config or len(shape) != 2 or block_size(shape[1]) is None:
        raise UnreadableFile(f"{entry.name}: this is OFT of PEFT before 0.16, which today's PEFT does not read either.")
    if config.get("coft"):
        raise UnreadableFile(f"{entry.name}: constrained OFT (coft) is held to a norm while it runs.", hint=MERGED)
    if config.get("use_cayley_neumann") and _version(config.get("peft_version")) < NEUMANN_SINCE:
        raise UnreadableFile(
            f"{entry.name}: PEFT before 0.18 wrote it, and 0.18 changed what its use_cayley_neumann means.",
            hint="Train it again, or merge it into the base with the PEFT that wrote it.",
        )
    if entry.kernel not in (None, (), (1, 1)):
        raise UnreadableFile(
            f"{entry.name}: PEFT's OFT of a convolution of {entry.kernel[0]}x{entry.kernel[1]} does one thing when it "
            "runs and another when it is merged.",
            hint=MERGED,
        )


def _boft(entry: Entry) -> Entry:
    shape = entry.factors["boft_R"].shape if "boft_R" in entry.factors else ()
    if len(shape) != 4 or "boft_s" not in entry.factors or shape[2] != shape[3]:
        raise UnreadableFile(f"{entry.name}: BOFT has boft_R [1, blocks, size, size] and boft_s.")
    if shape[0] != 1:
        raise UnreadableFile(f"{entry.name}: BOFT of {shape[0]} butterfly factors is not read.", hint=MERGED)
    return replace(entry, algorithm="peft_boft")


def _version(text: object) -> tuple[int, ...]:
    """(major, minor) of "0.21.2@main"; (0, 0) where it is not said, because PEFT says it since 0.18."""
    numbers = text.split(".")[:2] if isinstance(text, str) else []
    return tuple(map(int, numbers)) if len(numbers) == 2 and all(map(str.isdigit, numbers)) else (0, 0)
