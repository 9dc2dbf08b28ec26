"""ComfyUI's generic form, AI-toolkit, and OneTrainer's ComfyUI output: the original's dotted names behind
`diffusion_model.` and `text_encoders.`, alpha and dora_scale beside each module (dialects.md §5.11, §5.7).

Inner names may be diffusers' too (AI-toolkit writes both): they tell themselves apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from persona.core.adapters.entry import Adapter, Entry
from persona.core.adapters.slots import LYCORIS, Slots
from persona.core.host.errors import NoPlace
from persona.formats.dialects import kohya
from persona.formats.dialects.metadata import carried
from persona.formats.dialects.original_places import (
    joined_paths,
    original_denoiser_names,
    original_places,
    without_prefix,
)
from persona.formats.dialects.places import prefixed, unprefixed
from persona.formats.dialects.table import Place, TableDialect

ROLES = {
    "sd2": {"text_encoder": "clip_h"},
    "flux1": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    "": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
}
"""ComfyUI's name for each text encoder, by family."""


def places(modules: Collection[str]) -> Callable[[str], Place | None]:
    """The original's names behind their prefixes, then diffusers' behind `diffusion_model.`, then diffusers' own."""
    original = original_places(modules)

    def place(module: str) -> Place | None:
        bare = without_prefix(module)
        return original(module) or (unprefixed(bare) if bare != module else prefixed(module))

    return place


def names(adapter: Adapter) -> Callable[[Entry], str]:
    """`diffusion_model.<original>`, `text_encoders.<role>.transformer.<Hugging Face's>`."""
    original = original_denoiser_names(adapter)
    roles = ROLES.get(adapter.family or "", ROLES[""])

    def name_of(entry: Entry) -> str:
        if entry.component in ("unet", "transformer"):
            return f"diffusion_model.{original(entry)}"
        if entry.component not in roles:
            raise NoPlace(entry.name, f"ComfyUI has no {entry.component} in {adapter.family}")
        return f"text_encoders.{roles[entry.component]}.transformer.{entry.path}"

    return name_of


def suffixes_of(entry: Entry) -> dict[str, str]:
    """As kohya, but PEFT's letters for LoRA. Raises NoPlace for sd-scripts' own OFT, which would be taken for
    LyCORIS'."""
    if kohya.is_own_oft(entry):
        raise NoPlace(entry.name, "sd-scripts' own OFT is told by kohya's prefix alone")
    return {**kohya.suffixes_of(entry), "down": ".lora_A.weight", "up": ".lora_B.weight"}


def header(adapter: Adapter) -> dict[str, str]:
    """The source's metadata."""
    return {**{k: v for k, v in carried(adapter).items() if k != "lora_adapter_metadata"}, "format": "pt"}


DIALECT = TableDialect(
    name="comfy",
    summary="ComfyUI, AI-toolkit and OneTrainer: dotted original names, alpha beside each module",
    slots=Slots(
        algorithms=LYCORIS - {"ia3"},
        alpha="module",
        magnitude=frozenset({"out", "in"}),
        tucker=True,
        fused=True,
        containers=("safetensors",),
    ),
    places=places,
    names=names,
    spellings=kohya.SPELLINGS | {"peft", "peft module", "patch"},
    suffixes_of=suffixes_of,
    header=header,
    original=True,
    joined=joined_paths,
    priority=30,
)
