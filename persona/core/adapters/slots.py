"""What a target can hold. The planner compares an adapter with the slots of dialect and container together
(dialects.md §8.1b)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

AlphaSlot = Literal["module", "header", "config", "none"]

LORA = frozenset({"lora"})
LYCORIS = frozenset({"lora", "loha", "lokr", "full", "norm", "ia3", "glora", "oft", "boft"})


@dataclass(frozen=True)
class Slots:
    """Places where things can be stored; what has no place is folded, rewritten exactly, approximated or refused.

    `alpha`: beside each module, in the text header, in a config file, nowhere (a reader then takes a scale of 1).
    `magnitude`: the axes of DoRA's vector it can hold; `magnitude_on_all`: either all modules of a component have
    one or none, since one switch says so for all. `convolution`: kernels larger than 1x1. `tucker`: what LyCORIS
    has beside up and down, the middle of a Tucker product and `scalar`. `fused`: True when modules carry the
    original code's joined rows (Flux, SD3), False when they must be split, None when both are read. `components`:
    None for any. `attention_only`: only attention projections have a name. `linear_only`: no convolutions at all.
    `ia3`: what is added to 1 (LyCORIS), or the sum (PEFT). `embeddings`: bundled in the same file, or a file beside
    it. `containers`: file formats its readers open, the usual one first.
    """

    algorithms: frozenset[str] = LORA
    alpha: AlphaSlot = "none"
    magnitude: frozenset[str] = frozenset()
    magnitude_on_all: bool = False
    convolution: bool = True
    tucker: bool = False
    bias: bool = False
    fused: bool | None = False
    components: frozenset[str] | None = None
    families: frozenset[str] | None = None
    ia3: Literal["lycoris", "peft"] = "lycoris"
    attention_only: bool = False
    linear_only: bool = False
    embeddings: Literal["bundle", "beside"] = "beside"
    layout: Literal["torch", "paddle"] = "torch"
    folder: bool = False
    containers: tuple[str, ...] = ("safetensors", "torch", "paddle", "mindspore", "npz")

    def within(self, container: str) -> Slots:
        """The slots that are left inside a container: only safetensors has a text header."""
        if self.alpha == "header" and container != "safetensors":
            return replace(self, alpha="none")
        return self
