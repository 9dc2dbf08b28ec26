"""CLIP's names: Hugging Face's and OpenCLIP's, one table each way (dialects.md §2.3). OpenCLIP stacks q, k, v in
`attn.in_proj`; its text_projection is a parameter, transposed."""

from __future__ import annotations

import re

LAYER = (
    ("self_attn.[q_proj,k_proj,v_proj]", "attn.in_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
)
TOP = (
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding", "positional_embedding"),
    ("text_projection", "text_projection"),
)
_OURS = re.compile(r"^text_model\.encoder\.layers\.(\d+)\.(.+)$")
_THEIRS = re.compile(r"^transformer\.resblocks\.(\d+)\.(.+)$")
_TO_HF = {theirs: ours for ours, theirs in (*LAYER, *TOP)}
_TO_OPENCLIP = dict((*LAYER, *TOP))


def to_openclip(path: str) -> str | None:
    """Hugging Face's module path (fused for in_proj) -> OpenCLIP's, or None."""
    match = _OURS.match(path)
    if match:
        inside = _TO_OPENCLIP.get(match[2])
        return f"transformer.resblocks.{match[1]}.{inside}" if inside else None
    return _TO_OPENCLIP.get(path)


def to_huggingface(name: str) -> str | None:
    """OpenCLIP's module name -> Hugging Face's path (fused for in_proj), or None."""
    match = _THEIRS.match(name)
    if match:
        inside = _TO_HF.get(match[2])
        return f"text_model.encoder.layers.{match[1]}.{inside}" if inside else None
    return _TO_HF.get(name)
