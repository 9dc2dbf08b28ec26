"""Diffusers' UNet names and the original code's (`input_blocks`, `middle_block`, `output_blocks`), from one table.

It is read in both directions (dialects.md §2.2). The block arithmetic holds for every family; only the slot of an
upsampler depends on whether its block has attentions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from persona.core.adapters.family import Family, inventory
from persona.core.adapters.unet import UNet

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
_TOP_ORIGINAL = tuple(original for _, original in TOP)
_TO_ORIGINAL = dict(RESNET)
_TO_DIFFUSERS = {original: ours for ours, original in RESNET}
_BLOCK = re.compile(r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.?(.*)$")
_ORIGINAL = re.compile(r"^(input|output)_blocks\.(\d+)\.(\d+)\.?(.*)$")


@dataclass(frozen=True)
class Topology:
    """What the original's block numbers depend on: resnets per level, and which up blocks have attentions."""

    layers: int = 2
    attends_up: frozenset[int] = frozenset({1, 2, 3})

    @classmethod
    def of(cls, unet: UNet) -> Topology:
        """From a UNet's config."""
        return cls(unet.layers_per_block, frozenset(b for b, attends in enumerate(unet.attends_up) if attends))


def topology_of(paths: Iterable[str], families: Iterable[Family]) -> Topology:
    """The topology of diffusers' paths: that of the first family that has them all, else what the indices say."""
    listed = set(paths)
    for family in families:
        for config in family.components.get("unet", ()):
            if isinstance(config, UNet) and listed <= inventory(config).keys():
                return Topology.of(config)
    layers, attends = 0, set()
    for path in listed:
        match = _BLOCK.match(path)
        if match and match[3] in ("resnets", "attentions"):
            up = match[1] == "up"
            layers = max(layers, int(match[4]) + (0 if up else 1))
            attends |= {int(match[2])} if up and match[3] == "attentions" else set()
    return Topology(max(layers, 1), frozenset(attends))


def layers_of(names: Iterable[str]) -> int:
    """Resnets per level that the original's names (without their prefix) allow: 2 as everywhere, unless an index
    contradicts it, as in a model with one."""
    found = [match for match in map(_ORIGINAL.match, names) if match]
    samplers = {int(m[2]) for m in found if m[1] == "input" and m[4] == "op"}
    if samplers:
        return max(min(samplers) - 1, 1)
    for layers in (2, 1, 3, 4):
        downs = {int(m[2]) for m in found if m[1] == "input" and int(m[2]) > 0}
        ups = {int(m[2]) for m in found if m[1] == "output" and m[4] == "conv"}
        fits_down = all((number - 1) % (layers + 1) < layers for number in downs)
        fits_up = all(number % (layers + 1) == layers for number in ups)
        if fits_down and fits_up:
            return layers
    return 2


def to_original(path: str, *, layers: int = 2, attends_up: Collection[int] = (1, 2, 3)) -> str | None:
    """Diffusers' path -> the original's, without `model.diffusion_model.`, or None for a name that is not a UNet's.

    `layers` is layers_per_block; `attends_up` are the up blocks that have attentions.
    """
    match = _BLOCK.match(path)
    if not match:
        for ours, original in TOP:
            if path == ours or path.startswith(ours + "."):
                return _join(original, _inside(path[len(ours) + 1 :], _TO_ORIGINAL))
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
    if name.startswith(_TOP_ORIGINAL):
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
