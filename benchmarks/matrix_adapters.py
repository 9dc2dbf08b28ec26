"""The adapters that benchmarks/matrix.py converts: low-rank deltas at the widths of the real models, and one small
adapter for each algorithm."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from persona.core.adapters.entry import Adapter, Entry, Magnitude, Scale
from persona.core.adapters.evidence import form
from persona.core.adapters.family import Component, Module, inventory
from persona.core.adapters.tensor import in_memory
from persona.formats.models.families import FAMILIES

RANK, ALPHA = 4, 3.0
BLOCK = re.compile(
    r"^(.*\b(?:attentions|resnets|downsamplers|upsamplers|transformer_blocks|single_transformer_blocks|layers|block)\.\d+)"
)
"""The innermost repeated block that a path is in; what is in none (conv_in, time_embedding) is a block by itself."""


def weights(component: Component) -> list[Module]:
    """The linear layers and convolutions of one whole block of every form and width, in the order of the inventory."""
    blocks: dict[str, list[Module]] = {}
    for path, module in inventory(component).items():
        if module.kind in ("linear", "conv"):
            found = BLOCK.match(path)
            blocks.setdefault(found[1] if found else path, []).append(module)
    kinds: dict[Any, list[Module]] = {}
    for name, modules in blocks.items():
        kinds.setdefault((form(name), tuple((form(one.path), one.shape) for one in modules)), modules)
    return [module for modules in kinds.values() for module in modules]


def plain_lora(family: str) -> Adapter:
    """Low-rank deltas on `weights` of every component, float16, alpha 3 of rank 4: no scale is a power of two."""
    random = np.random.default_rng(7)

    def numbers(*shape: int) -> Any:
        return in_memory((random.standard_normal(shape) / 8).astype(np.float16))

    entries = {}
    for component, configs in FAMILIES[family].components.items():
        for module in weights(configs[0]):
            out, into, *kernel = module.shape
            factors = {"down": numbers(RANK, into, *kernel), "up": numbers(out, RANK, *([1] * len(kernel)))}
            scale = Scale(ALPHA, RANK, "rank", "told")
            entries[component, module.path] = Entry(
                component, module.path, "lora", factors, scale, kernel=module.kernel
            )
    return Adapter(family, entries, families=frozenset({family}))


def counted(entries: Iterable[tuple[str, str]]) -> str:
    """Modules by component: `unet 40, text_encoder 6`."""
    listed = [component for component, _ in entries]
    return ", ".join(f"{name} {listed.count(name)}" for name in dict.fromkeys(listed))


def algorithms() -> dict[str, Adapter]:
    """One adapter for each algorithm, on modules of SD1's UNet, float32."""
    random = np.random.default_rng(11)
    query = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # 320 x 320
    conv = "down_blocks.1.resnets.0.conv1"  # 640 x 320 x 3 x 3
    norm = "down_blocks.0.resnets.0.norm1"  # 320

    def numbers(*shape: int) -> Any:
        return in_memory((random.standard_normal(shape) / 8).astype(np.float32))

    def one(path: str, algorithm: str, factors: dict[str, Any], mode: str = "rank", **more: Any) -> Adapter:
        scale = Scale(ALPHA if mode == "rank" else None, RANK, mode, "told" if mode == "rank" else "not applicable")  # type: ignore[arg-type]
        entry = Entry("unet", path, algorithm, factors, scale, **more)  # type: ignore[arg-type]
        return Adapter("sd1", {("unet", path): entry}, families=frozenset({"sd1"}))

    linear = {"down": numbers(RANK, 320), "up": numbers(320, RANK)}
    halves = {"w1_a": numbers(320, 2), "w1_b": numbers(2, 320), "w2_a": numbers(320, 2), "w2_b": numbers(2, 320)}
    return {
        "LoRA, linear": one(query, "lora", linear),
        "LoRA, 3x3 convolution": one(
            conv, "lora", {"down": numbers(RANK, 320, 3, 3), "up": numbers(640, RANK, 1, 1)}, kernel=(3, 3)
        ),
        "LoRA, Tucker": one(
            conv,
            "lora",
            {"down": numbers(RANK, 320, 1, 1), "mid": numbers(RANK, RANK, 3, 3), "up": numbers(640, RANK, 1, 1)},
            kernel=(3, 3),
        ),
        "DoRA, output axis": one(query, "lora", linear, magnitude=Magnitude(numbers(320), "out")),
        "DoRA, input axis": one(query, "lora", linear, magnitude=Magnitude(numbers(320), "in")),
        "LoHa": one(query, "loha", halves),
        "LoKr": one(query, "lokr", {"w1": numbers(16, 16), "w2_a": numbers(20, RANK), "w2_b": numbers(RANK, 20)}),
        "IA3": one(query, "ia3", {"weight": numbers(320), "on_input": in_memory(np.array(False))}, "none"),
        "GLoRA": one(
            query,
            "glora",
            {"a1": numbers(320, RANK), "a2": numbers(RANK, 320), "b1": numbers(320, RANK), "b2": numbers(RANK, 320)},
        ),
        "whole difference": one(query, "full", {"diff": numbers(320, 320)}, "none"),
        "norm difference": one(norm, "norm", {"diff": numbers(320)}, "none"),
    }
