"""Diffusion transformers' names: diffusers' and the original code's, one table each way (dialects.md §2.4, §2.5).

A value in brackets is a module that the original joins: `attn.[to_q,to_k,to_v]` is three of diffusers' modules
stacked by rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_BLOCK = re.compile(r"^([a-z_]+_blocks)\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class TransformerNames:
    """`blocks`: original block list -> (diffusers' block list, names inside); `top`: names outside the blocks."""

    family: str
    blocks: Mapping[str, tuple[str, Mapping[str, str]]]
    top: Mapping[str, str]

    def to_diffusers(self, name: str) -> str | None:
        """The original's name -> diffusers' path (perhaps fused), or None."""
        match = _BLOCK.match(name)
        if not match:
            return self.top.get(name)
        if match[1] not in self.blocks:
            return None
        block, inside = self.blocks[match[1]]
        return f"{block}.{match[2]}.{inside[match[3]]}" if match[3] in inside else None

    def to_original(self, path: str) -> str | None:
        """Diffusers' path (a fused one where the original joins) -> the original's name, or None."""
        match = _BLOCK.match(path)
        if not match:
            return self._top_back.get(path)
        block = self._blocks_back.get(match[1])
        if block is None or match[3] not in block[1]:
            return None
        return f"{block[0]}.{match[2]}.{block[1][match[3]]}"

    def fused_path(self, path: str) -> str | None:
        """For a module that the original keeps as rows of a larger one: the larger one's path, else None."""
        match = _BLOCK.match(path)
        whole = self._fused.get(match[1], {}).get(match[3]) if match else None
        return f"{match[1]}.{match[2]}.{whole}" if match and whole else None

    @cached_property
    def _fused(self) -> dict[str, dict[str, str]]:
        """For each of diffusers' block lists: part inside the block -> the fused name inside the block."""
        found: dict[str, dict[str, str]] = {}
        for block, (_, inside) in self._blocks_back.items():
            for name in inside:
                if name.endswith("]"):
                    head, _, parts = name[:-1].partition("[")
                    found.setdefault(block, {}).update({head + part: name for part in parts.split(",")})
        return found

    @cached_property
    def _top_back(self) -> dict[str, str]:
        return {path: name for name, path in self.top.items()}

    @cached_property
    def _blocks_back(self) -> dict[str, tuple[str, dict[str, str]]]:
        return {
            ours: (theirs, {path: name for name, path in inside.items()})
            for theirs, (ours, inside) in self.blocks.items()
        }


def has_halves_swapped(path: str, shape: tuple[int, ...] | None) -> bool:
    """Whether the original code has this modulation's shift and scale the other way round: the final layer's, and the
    last context block's of SD3, which has two parts where the others have six. `shape` is its weight's, where known."""
    if path == "norm_out.linear":
        return True
    matrix = shape is not None and len(shape) == 2
    return matrix and path.endswith(".norm1_context.linear") and shape[0] == 2 * shape[1]  # type: ignore[index]


FLUX = TransformerNames(
    family="flux1",
    blocks={
        "double_blocks": (
            "transformer_blocks",
            {
                "img_attn.qkv": "attn.[to_q,to_k,to_v]",
                "txt_attn.qkv": "attn.[add_q_proj,add_k_proj,add_v_proj]",
                "img_attn.proj": "attn.to_out.0",
                "txt_attn.proj": "attn.to_add_out",
                "img_mlp.0": "ff.net.0.proj",
                "img_mlp.2": "ff.net.2",
                "txt_mlp.0": "ff_context.net.0.proj",
                "txt_mlp.2": "ff_context.net.2",
                "img_mod.lin": "norm1.linear",
                "txt_mod.lin": "norm1_context.linear",
                "img_attn.norm.query_norm": "attn.norm_q",
                "img_attn.norm.key_norm": "attn.norm_k",
                "txt_attn.norm.query_norm": "attn.norm_added_q",
                "txt_attn.norm.key_norm": "attn.norm_added_k",
            },
        ),
        "single_blocks": (
            "single_transformer_blocks",
            {
                "linear1": "[attn.to_q,attn.to_k,attn.to_v,proj_mlp]",
                "linear2": "proj_out",
                "modulation.lin": "norm.linear",
                "norm.query_norm": "attn.norm_q",
                "norm.key_norm": "attn.norm_k",
            },
        ),
    },
    top={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
)

SD3 = TransformerNames(
    family="sd3",
    blocks={
        "joint_blocks": (
            "transformer_blocks",
            {
                "x_block.attn.qkv": "attn.[to_q,to_k,to_v]",
                "context_block.attn.qkv": "attn.[add_q_proj,add_k_proj,add_v_proj]",
                "x_block.attn.proj": "attn.to_out.0",
                "context_block.attn.proj": "attn.to_add_out",
                "x_block.attn2.qkv": "attn2.[to_q,to_k,to_v]",
                "x_block.attn2.proj": "attn2.to_out.0",
                "x_block.mlp.fc1": "ff.net.0.proj",
                "x_block.mlp.fc2": "ff.net.2",
                "context_block.mlp.fc1": "ff_context.net.0.proj",
                "context_block.mlp.fc2": "ff_context.net.2",
                "x_block.adaLN_modulation.1": "norm1.linear",
                "context_block.adaLN_modulation.1": "norm1_context.linear",
                "x_block.attn.ln_q": "attn.norm_q",
                "x_block.attn.ln_k": "attn.norm_k",
                "context_block.attn.ln_q": "attn.norm_added_q",
                "context_block.attn.ln_k": "attn.norm_added_k",
                "x_block.attn2.ln_q": "attn2.norm_q",
                "x_block.attn2.ln_k": "attn2.norm_k",
            },
        ),
    },
    top={
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "context_embedder": "context_embedder",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
)
