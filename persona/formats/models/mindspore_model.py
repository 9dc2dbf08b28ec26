"""MindSpore's spelling of a whole model in LDM's names, both ways (stacks/mindspore.md §3, §4).

Two flavours: Wukong-Huahua and MindONE's stable_diffusion_v2 (convolutions wrapped once more, a text encoder of its own
make), and MindONE's SDXL, which has LDM's names with gamma, beta and embedding_table alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from persona.core.adapters.tensor import TensorRef

_NORM = re.compile(
    r"(?:^|\.)(?:norm\d?|norm_out|ln_\w+|in_layers\.0|out_layers\.0|out\.0|layer_norm\d|final_layer_norm|group_norm)$"
)
_EMBEDDING = re.compile(r"(?:^|\.)(?:token_embedding|position_embedding)$")
RESNET = (
    ("in_layers.0.", "in_layers_norm."),
    ("in_layers.2.", "in_layers_conv.conv."),
    ("out_layers.0.", "out_layers_norm."),
    ("out_layers.3.", "out_layers_conv.conv."),
)
_WRAPPED = re.compile(r"(?:input_blocks\.0\.0|\.op|skip_connection|output_blocks\.\d+\.\d+\.conv|(?:^|\.)out\.2)$")
LAYER = (
    ("attn.in_proj_weight", "attn.attn.in_proj.weight"),
    ("attn.in_proj_bias", "attn.attn.in_proj.bias"),
    ("attn.out_proj.", "attn.attn.out_proj."),
    ("mlp.c_fc.", "c_fc."),
    ("mlp.c_proj.", "c_proj."),
)
_UNET = "model.diffusion_model."
_OWN_ENCODER, _OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."


def is_mindspore(names: Iterable[str]) -> bool:
    """Whether the names are MindSpore's: gamma and beta, or embedding_table."""
    return any(name.endswith((".gamma", ".beta", "embedding_table")) for name in names)


def is_wrapped(names: Iterable[str]) -> bool:
    """Whether it is Wukong's flavour."""
    return any("in_layers_conv.conv." in name for name in names)


def from_mindspore(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The same tensors under torch's LDM names; Wukong's text encoder under OpenCLIP's, which it is made like."""
    wrapped = is_wrapped(tensors)
    return {_read_name(name.removeprefix("_backbone."), wrapped): ref for name, ref in tensors.items()}


def _read_name(name: str, wrapped: bool) -> str:
    module, _, leaf = name.rpartition(".")
    leaf = {"gamma": "weight", "beta": "bias"}.get(leaf, leaf)
    if wrapped and name.startswith(_OWN_ENCODER) and not name.startswith(f"{_OWN_ENCODER}text_model."):
        return _OPENCLIP + _own_encoder_name(name[len(_OWN_ENCODER) :].rpartition(".")[0], leaf)
    if leaf == "embedding_table":
        return f"{module}.weight"
    name = f"{module}.{leaf}" if module else leaf
    if not (wrapped and name.startswith(_UNET)):
        return name
    for theirs, ours in RESNET:
        if ours in name:
            return name.replace(ours, theirs)
    return re.sub(r"\.conv\.(weight|bias)$", r".\1", name)


def _own_encoder_name(module: str, leaf: str) -> str:
    name = f"{module}.{leaf}" if module else leaf
    if name == "embedding_table":
        return "token_embedding.weight"
    name = name.replace("transformer_layer.resblocks.", "transformer.resblocks.")
    for theirs, ours in LAYER:
        at = re.match(rf"(transformer\.resblocks\.\d+\.){re.escape(ours)}(.*)$", name)
        if at:
            return f"{at[1]}{theirs}{at[2]}"
    return name


def to_mindspore(tensors: Mapping[str, TensorRef], *, wrapped: bool) -> dict[str, TensorRef]:
    """Torch's LDM names (the text encoder under OpenCLIP's, when `wrapped`) -> MindSpore's."""
    rename: Callable[[str], str] = _written_wrapped if wrapped else _written_plain
    return {rename(name): ref for name, ref in tensors.items()}


def _written_plain(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if _NORM.search(module):
        return f"{module}.{ {'weight': 'gamma', 'bias': 'beta'}[leaf] }"
    return f"{module}.embedding_table" if _EMBEDDING.search(module) and leaf == "weight" else name


def _written_wrapped(name: str) -> str:
    if name.startswith(_OPENCLIP):
        return _OWN_ENCODER + _written_own_encoder(name[len(_OPENCLIP) :])
    if not name.startswith(_UNET):
        return _written_plain(name)
    module, _, leaf = name.rpartition(".")
    shown = f"{module}.conv.{leaf}" if _WRAPPED.search(module) else _written_plain(name)
    for theirs, ours in RESNET:
        if theirs in name:
            return _written_plain(name).replace(theirs, ours)
    return shown


def _written_own_encoder(name: str) -> str:
    if name == "token_embedding.weight":
        return "embedding_table"
    name = _written_plain(name)
    match = re.match(r"(transformer\.resblocks\.\d+\.)(.+)$", name)
    if match is None:
        return name
    inside = match[2]
    for theirs, ours in LAYER:
        if inside.startswith(theirs):
            inside = ours + inside[len(theirs) :]
            break
    return match[1].replace("transformer.resblocks.", "transformer_layer.resblocks.") + inside
