"""Wukong-Huahua with mindpet's LoRADense, and the older `tk`: `….to_q.mindpet_delta_lora_a` (dialects.md §5.10).

alpha is not in the file: mindpet multiplies by alpha/rank and stores neither, so it has to be told on reading and is
folded on writing. Source: minddiffusion vision/wukong-huahua ldm/modules/attention.py, mindpet/delta/lora.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from persona.core.adapters.entry import Adapter, Entry
from persona.core.adapters.slots import Slots
from persona.formats.dialects.original_places import OriginalNames, original_denoiser_names, original_places
from persona.formats.dialects.table import Place, TableDialect

FAMILIES = frozenset({"sd1", "sd2", "wukong"})
"""The families of Wukong and of MindONE's stable_diffusion_v2, which has the same UNet."""


def places(modules: Collection[str]) -> Callable[[str], Place | None]:
    """LDM's names behind `model.diffusion_model.`, or without it."""
    behind, bare = original_places(modules), OriginalNames.of(modules)
    return lambda module: behind(module) or bare.denoiser(module)


def names(adapter: Adapter) -> Callable[[Entry], str]:
    """`model.diffusion_model.<original>`."""
    original = original_denoiser_names(adapter)
    return lambda entry: f"model.diffusion_model.{original(entry)}"


DIALECT = TableDialect(
    name="mindpet",
    summary="Wukong-Huahua with mindpet (MindSpore): original names, no alpha",
    slots=Slots(
        convolution=False,
        linear_only=True,
        attention_only=True,
        components=frozenset({"unet"}),
        families=FAMILIES,
        containers=("mindspore", "safetensors"),
    ),
    places=places,
    names=names,
    spellings=frozenset({"mindpet"}),
    suffixes={"down": ".mindpet_delta_lora_a", "up": ".mindpet_delta_lora_b"},
    priority=90,
    families=FAMILIES,
)
