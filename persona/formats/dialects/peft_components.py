"""Which component a PEFT folder is for: its keys do not say, its name or its config's `auto_mapping` do
(dialects.md §5.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from persona.core.adapters.entry import Adapter, Entry
from persona.core.host.contracts import State, Told
from persona.formats.dialects.family_choice import stated_families
from persona.formats.dialects.grammar import group
from persona.formats.dialects.places import COMPONENTS
from persona.formats.models.clip import CLIP_L

CONFIG = "adapter_config.json"
LIBRARIES = {
    "UNet2DConditionModel": "diffusers.models.unets.unet_2d_condition",
    "FluxTransformer2DModel": "diffusers.models.transformers.transformer_flux",
    "SD3Transformer2DModel": "diffusers.models.transformers.transformer_sd3",
    "CLIPTextModel": "transformers.models.clip.modeling_clip",
    "CLIPTextModelWithProjection": "transformers.models.clip.modeling_clip",
    "T5EncoderModel": "transformers.models.t5.modeling_t5",
}
"""The classes that pipelines of our families are made of, and the module PEFT writes beside each."""
CLASSES = {
    "UNet2DConditionModel": ("unet",),
    "FluxTransformer2DModel": ("transformer",),
    "SD3Transformer2DModel": ("transformer",),
    "CLIPTextModel": ("text_encoder",),
    "CLIPTextModelWithProjection": ("text_encoder_2", "text_encoder"),
    "T5EncoderModel": ("text_encoder_3", "text_encoder_2"),
}
"""Class -> the components it can be: the first, unless something says otherwise. CLIP with a projection is the first
encoder of SD3 and the second of SDXL and SD3; T5 is the third of SD3 and the second of Flux.1."""


def components_told(state: State, told: Told) -> tuple[str, ...]:
    """The components that a folder can be, the likeliest first: its own name's, then its config's class's."""
    folder = Path(told.path).absolute().parent.name
    named = (folder,) if folder in COMPONENTS else ()
    mapping = told.configs.get(CONFIG, {}).get("auto_mapping")
    base_class = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    found = CLASSES.get(base_class, ()) if isinstance(base_class, str) else ()
    flux = told.family == "flux1" or stated_families(state.metadata) == frozenset({"flux1"})
    second = flux if base_class == "T5EncoderModel" else _clip_width(state) == CLIP_L.width
    return (*named, *(reversed(found) if second else found))


def _clip_width(state: State) -> int | None:
    """The width of the text encoder that the first LoRA of an attention is for, which tells CLIP-L from bigG."""
    for one in group(state.tensors).groups.values():
        if one.module.endswith(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")) and "down" in one.keys:
            return next(reversed(state.tensors[one.keys["down"]].shape), None)
    return None


def auto_mapping(component: str, entries: Sequence[Entry], adapter: Adapter) -> dict[str, str] | None:
    """What PEFT writes of the model's class, or None where the family leaves it open."""
    name = _class_of(component, entries, {adapter.family} if adapter.family else set(adapter.families))
    return {"base_model_class": name, "parent_library": LIBRARIES[name]} if name else None


def _class_of(component: str, entries: Sequence[Entry], families: set[str]) -> str | None:
    if component == "unet":
        return "UNet2DConditionModel"
    if component == "transformer":
        single = any(entry.path.startswith("single_transformer_blocks.") for entry in entries)
        flux, sd3 = single or families == {"flux1"}, families == {"sd3"}
        return "FluxTransformer2DModel" if flux else "SD3Transformer2DModel" if sd3 else None
    if any(entry.path.startswith(("encoder.block.", "shared")) for entry in entries):
        return "T5EncoderModel"
    projected = component == "text_encoder_2" or families == {"sd3"}
    return "CLIPTextModelWithProjection" if projected else "CLIPTextModel"


def spellings(path: str, mapping: Mapping[str, str] | None) -> tuple[str, ...]:
    """The names of a module in its model: two for CLIPTextModel, which has had no `text_model.` level since
    transformers 5.6. PEFT passes over the keys it does not know, and with them alone it would change nothing."""
    moved = mapping is not None and mapping["base_model_class"] == "CLIPTextModel" and path.startswith("text_model.")
    return (path, path.removeprefix("text_model.")) if moved else (path,)
