"""The autoencoder's names: diffusers' AutoencoderKL and LDM's `first_stage_model` (dialects.md §11.2).

LDM counts the decoder's levels from the picture inwards and keeps the attention's projections as 1x1 convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

ATTENTION = (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""diffusers' spelling before 0.18."""
TOP = (("conv_norm_out", "norm_out"), ("conv_in", "conv_in"), ("conv_out", "conv_out"))

_TO_LDM, _TO_OURS = dict((*ATTENTION, *TOP)), {theirs: ours for ours, theirs in (*ATTENTION, *TOP)}
_OURS = re.compile(r"^(encoder|decoder)\.(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)$")
_LEVEL = re.compile(r"^(encoder|decoder)\.(down|up)\.(\d+)\.(?:block\.(\d+)|(?:down|up)sample)\.(.+)$")
_MIDDLE = re.compile(r"^(encoder|decoder)\.mid\.(?:block_(\d)|attn_1)\.(.+)$")


def to_ldm(path: str, levels: int) -> str | None:
    """Diffusers' module path -> LDM's (without `first_stage_model.`), or None."""
    if path in ("quant_conv", "post_quant_conv"):
        return path
    half, _, rest = path.partition(".")
    if half in ("encoder", "decoder") and rest in dict(TOP):
        return f"{half}.{_TO_LDM[rest]}"
    match = _OURS.match(path)
    if match is None:
        return None
    half, block, kind, index, inner = match[1], match[2], match[4], match[5], match[6]
    inner = inner.replace("conv_shortcut", "nin_shortcut")
    if block == "mid_block":
        if kind == "resnets":
            return f"{half}.mid.block_{int(index) + 1}.{inner}"
        inner = OLDER.get(inner, inner)
        return f"{half}.mid.attn_1.{_TO_LDM[inner]}" if inner in dict(ATTENTION) else None
    down = block == "down_blocks"
    level = int(match[3]) if down else levels - 1 - int(match[3])
    where = f"{half}.{'down' if down else 'up'}.{level}"
    if kind == "resnets":
        return f"{where}.block.{index}.{inner}"
    return f"{where}.{'downsample' if down else 'upsample'}.{inner}"


def to_diffusers(name: str, levels: int) -> str | None:
    """LDM's module name (without `first_stage_model.`) -> diffusers' path, or None."""
    if name in ("quant_conv", "post_quant_conv"):
        return name
    half, _, rest = name.partition(".")
    if half in ("encoder", "decoder") and rest in {theirs for _, theirs in TOP}:
        return f"{half}.{_TO_OURS[rest]}"
    middle = _MIDDLE.match(name)
    if middle is not None:
        inner = middle[3].replace("nin_shortcut", "conv_shortcut")
        if middle[2]:
            return f"{middle[1]}.mid_block.resnets.{int(middle[2]) - 1}.{inner}"
        return f"{middle[1]}.mid_block.attentions.0.{_TO_OURS[inner]}" if inner in _TO_OURS else None
    match = _LEVEL.match(name)
    if match is None:
        return None
    half, way, level, j, inner = match[1], match[2], int(match[3]), match[4], match[5]
    down = way == "down"
    where = f"{half}.{way}_blocks.{level if down else levels - 1 - level}"
    if j is not None:
        return f"{where}.resnets.{j}.{inner.replace('nin_shortcut', 'conv_shortcut')}"
    return f"{where}.{way}samplers.0.{inner}"


def levels_of(names: list[str]) -> int:
    """The number of levels that a list of either spelling shows."""
    found = [int(match[1]) for name in names if (match := re.search(r"(?:down|up)(?:_blocks)?\.(\d+)\.", name))]
    return max(found, default=0) + 1


def modern(path: str) -> str:
    """A diffusers parameter or path with today's names in the attention."""
    head, sign, rest = path.partition(".attentions.0.")
    inner, dot, leaf = rest.partition(".")
    return f"{head}{sign}{OLDER[inner]}{dot}{leaf}" if inner in OLDER else path


def is_bare(names: Iterable[str]) -> bool:
    """Whether LDM's names are there without `first_stage_model.`, as in a file with the autoencoder alone."""
    return any(_LEVEL.match(name) for name in names)


def is_attention(path: str) -> bool:
    """Whether a diffusers path is one of the attention's projections: linear here, a 1x1 convolution in LDM."""
    return ".attentions." in path and not path.endswith("group_norm")
