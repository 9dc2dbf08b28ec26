"""Where diffusers' own names lie: component prefixes, and the small variations that are read (§5.1, §5.2)."""

from __future__ import annotations

import re

from persona.formats.dialects.table import Place

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_BARE_OUT = re.compile(r"(\.attn[12]?)\.to_out$")
_ATTENTION = re.compile(r"\.self_attn\.to_(q|k|v|out)$")
_CLIP = re.compile(r"^(?:text_model\.)?((?:encoder\.layers|embeddings|final_layer_norm)\b.*)$")


def diffusers_path(component: str, name: str) -> str:
    """A module's name as diffusers' canonical path: without `.processor`, `to_out.0`, CLIP with `text_model.`"""
    name = name.replace(".processor.", ".")
    if component.startswith("text_encoder"):
        name = _ATTENTION.sub(r".self_attn.\1_proj", name)
        match = _CLIP.match(name)
        return f"text_model.{match[1]}" if match else name
    return _BARE_OUT.sub(r"\1.to_out.0", name)


def prefixed(module: str) -> Place | None:
    """`unet.<path>`, `text_encoder.<path>` …"""
    component, _, name = module.partition(".")
    if component not in COMPONENTS or not name:
        return None
    return Place(component, diffusers_path(component, name), name)


def unprefixed(module: str) -> Place | None:
    """A path without its component: a UNet's, a transformer's or a text encoder's, told by its first word."""
    for component, beginning in _BEGINNINGS:
        if module.startswith(beginning):
            return Place(component, diffusers_path(component, module), module)
    return None


_BEGINNINGS = (
    ("unet", ("down_blocks.", "up_blocks.", "mid_block.", "conv_", "time_embedding.", "add_embedding.")),
    (
        "transformer",
        (
            "transformer_blocks.",
            "single_transformer_blocks.",
            "time_text_embed.",
            "context_embedder",
            "x_embedder",
            "norm_out.",
            "proj_out",
            "pos_embed.",
        ),
    ),
    ("text_encoder", ("text_model.", "encoder.layers.", "text_projection")),
)
