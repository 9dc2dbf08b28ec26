"""Attention of the denoiser where torch's own will not do: on an NPU, whose fp16 scores overflow unless they are fused.

query · keyᵀ · scale ─► softmax ─► · value
└──── fp32 in any precision ────┘           (full_precision_attention)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from persona.plugins.backends.torch import npu
from persona.plugins.backends.torch.device import Device

Product = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Query, key and value [n, heads, tokens, width] and the scale to [n, heads, tokens, width]."""


def full_precision_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · query · keyᵀ) in fp32 also within autocast, then · value in value's dtype."""
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.matmul(query.float() * scale, key.float().transpose(-1, -2))  # [n, heads, tokens, tokens]
        return torch.matmul(scores.softmax(dim=-1).to(value.dtype), value)


class AttentionWith:
    """A processor for diffusers' Attention with another product; for the attention of SD1, SD2 and SDXL denoisers,
    which have neither masks nor norms inside."""

    def __init__(self, product: Product) -> None:
        self.product = product

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """[n, tokens, dim] to the same."""
        assert attention_mask is None, "a denoiser's attention has no mask"
        given = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = (attn.to_q(hidden_states), attn.to_k(given), attn.to_v(given))
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
        joined = self.product(query, key, value, attn.scale).transpose(1, 2).flatten(-2)
        result: Tensor = attn.to_out[1](attn.to_out[0](joined.to(query.dtype))) / attn.rescale_output_factor
        return result


def substitute_attention(denoiser: nn.Module, device: Device, precision: str) -> str:
    """Give the denoiser the attention its device needs in this precision; the note for the user, "" for torch's own."""
    if device.kind != "npu" or precision == "fp32":
        return ""
    model: Any = denoiser
    if npu.has_flash_attention():
        model.set_attn_processor(AttentionWith(npu.flash_attention))
        return "npu: attention is torch_npu's npu_fusion_attention"
    if precision != "fp16":
        return ""
    model.set_attn_processor(AttentionWith(full_precision_attention))
    return "npu: attention scores are computed in fp32: they overflow in fp16, and fused attention is not there"
