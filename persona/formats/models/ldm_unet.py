"""Diffusers' UNet names and the original code's (`input_blocks`, `middle_block`, `output_blocks`), from one table.

It is read in both directions (dialects.md §2.2). The block arithmetic holds for every family; only the slot of an
upsampler depends on whether its block has attentions.
"""

from __future__ import annotations

import re
from collections.abc import Collection

TOP = (
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
)
RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_TO_ORIGINAL = dict(RESNET)
_TO_DIFFUSERS = {original: ours for ours, original in RESNET}
_BLOCK = re.compile(r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.?(.*)$")
_ORIGINAL = re.compile(r"^(input|output)_blocks\.(\d+)\.(\d+)\.?(.*)$")


def to_original(path: str, *, layers: int = 2, attends_up: Collection[int] = (1, 2, 3)) -> str | None:
    """Diffusers' path -> the original's, without `model.diffusion_model.`, or None for a name that is not a UNet's.

    `layers` is layers_per_block; `attends_up` are the up blocks that have attentions.
    """
    for ours, original in TOP:
        if path == ours or path.startswith(ours + "."):
            return _join(original, _inside(path[len(ours) + 1 :], _TO_ORIGINAL))
    match = _BLOCK.match(path)
    if not match:
        return None
    way, block, kind, j, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    stride = layers + 1
    if kind == "downsamplers":
        return f"input_blocks.{stride * block + stride}.0.op" if rest == "conv" else None
    if kind == "upsamplers":
        slot = 2 if block in attends_up else 1
        return f"output_blocks.{stride * block + layers}.{slot}.conv" if rest == "conv" else None
    inner = _inside(rest, _TO_ORIGINAL) if kind == "resnets" else rest
    slot = 0 if kind == "resnets" else 1
    if way == "down":
        return _join(f"input_blocks.{stride * block + j + 1}.{slot}", inner)
    return _join(f"output_blocks.{stride * block + j}.{slot}", inner)


def to_diffusers(name: str, *, layers: int = 2) -> str | None:
    """The original's name, without `model.diffusion_model.` -> diffusers' path, or None."""
    for ours, original in TOP:
        if name == original or name.startswith(original + "."):
            return _join(ours, _inside(name[len(original) + 1 :], _TO_DIFFUSERS))
    match = _ORIGINAL.match(name)
    if not match:
        return None
    way, number, slot, rest = match[1], int(match[2]), int(match[3]), match[4]
    stride = layers + 1
    if way == "input":
        block, j = divmod(number - 1, stride)
        if rest == "op":
            return f"down_blocks.{block}.downsamplers.0.conv"
        where = f"down_blocks.{block}"
    else:
        block, j = divmod(number, stride)
        where = f"up_blocks.{block}"
        if rest == "conv":
            return f"{where}.upsamplers.0.conv"
    if slot == 0:
        return _join(f"{where}.resnets.{j}", _inside(rest, _TO_DIFFUSERS))
    return _join(f"{where}.attentions.{j}", rest)


def _inside(rest: str, table: dict[str, str]) -> str:
    return table.get(rest, rest)


def _join(head: str, tail: str) -> str:
    return f"{head}.{tail}" if tail else head
