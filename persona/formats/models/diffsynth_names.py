"""DiffSynth-Studio's own module names (dialects.md §5.6; modelscope/DiffSynth-Studio models/sdxl_unet.py, flux_dit.py).

Its 2024 SDXL UNet is one list `blocks.N` in running order, with markers for skip connections in between; its Flux
transformer renames the original's modules.
"""

from __future__ import annotations

import re
from functools import lru_cache

_BLOCK = re.compile(r"^blocks\.(\d+)\.?(.*)$")
_OUT = re.compile(r"(\.attn[12])\.to_out$")
_GLU = re.compile(r"(transformer_blocks\.\d+)\.(act_fn\.proj|ff)$")

FLUX_DOUBLE = {
    "attn.a_to_qkv": "img_attn.qkv",
    "attn.b_to_qkv": "txt_attn.qkv",
    "attn.a_to_out": "img_attn.proj",
    "attn.b_to_out": "txt_attn.proj",
    "ff_a.0": "img_mlp.0",
    "ff_a.2": "img_mlp.2",
    "ff_b.0": "txt_mlp.0",
    "ff_b.2": "txt_mlp.2",
    "norm1_a.linear": "img_mod.lin",
    "norm1_b.linear": "txt_mod.lin",
}
FLUX_SINGLE = {"to_qkv_mlp": "linear1", "proj_out": "linear2", "norm.linear": "modulation.lin"}
_FLUX = re.compile(r"^(blocks|single_blocks)\.(\d+)\.(.+)$")


@lru_cache(maxsize=1)
def sdxl_blocks() -> dict[int, str]:
    """Number in `blocks` -> diffusers' block: down, mid, up in running order, a marker after each skip that is put
    away and before each that is taken."""
    names: list[str] = []
    for b in range(3):
        for j in range(2):
            names += [f"down_blocks.{b}.resnets.{j}"]
            names += [f"down_blocks.{b}.attentions.{j}"] if b else []
            names += [""]
        names += [f"down_blocks.{b}.downsamplers.0", ""] if b < 2 else []
    names += ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    for b in range(3):
        for j in range(3):
            names += ["", f"up_blocks.{b}.resnets.{j}"]
            names += [f"up_blocks.{b}.attentions.{j}"] if b < 2 else []
        names += [f"up_blocks.{b}.upsamplers.0"] if b < 2 else []
    return {number: name for number, name in enumerate(names) if name}


def unet_to_diffusers(name: str) -> str | None:
    """`blocks.7.transformer_blocks.0.attn1.to_out` -> diffusers' path, or None."""
    match = _BLOCK.match(name)
    block = sdxl_blocks().get(int(match[1])) if match else None
    if match is None or block is None:
        return None
    rest = _OUT.sub(r"\1.to_out.0", match[2])
    rest = _GLU.sub(lambda m: f"{m[1]}.ff.net.{'0.proj' if m[2] == 'act_fn.proj' else '2'}", rest)
    return f"{block}.{rest}"


def unet_to_diffsynth(path: str) -> str | None:
    """Diffusers' path of an SDXL UNet -> `blocks.N…`, or None."""
    for number, block in sdxl_blocks().items():
        if path.startswith(block + "."):
            rest = path[len(block) + 1 :].replace(".to_out.0", ".to_out")
            rest = rest.replace(".ff.net.0.proj", ".act_fn.proj").replace(".ff.net.2", ".ff")
            return f"blocks.{number}.{rest}"
    return None


def flux_to_original(name: str) -> str | None:
    """DiffSynth's Flux names -> the original's, or None."""
    match = _FLUX.match(name)
    table = {"blocks": FLUX_DOUBLE, "single_blocks": FLUX_SINGLE}
    if match is None or match[3] not in table[match[1]]:
        return None
    block = "double_blocks" if match[1] == "blocks" else "single_blocks"
    return f"{block}.{match[2]}.{table[match[1]][match[3]]}"
