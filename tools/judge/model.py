"""The judge's two encoders: transformers' own CLIPModel, narrow."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tools.mini.tokenizer import MAX_LENGTH, Tokenizer

from .views import DEVIATION, MEAN

WIDTH = 128
"""Width of both encoders and of the space they meet in."""


def config(tokenizer: Tokenizer) -> CLIPConfig:
    """4 layers over 8x8 patches of 64x64 pixels; 2 layers over 24 tokens."""
    return CLIPConfig(
        projection_dim=WIDTH,
        text_config={
            "vocab_size": len(tokenizer.ids),
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "projection_dim": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_LENGTH,
            "hidden_act": "quick_gelu",
            "bos_token_id": tokenizer.start,
            "eos_token_id": tokenizer.end,
            "pad_token_id": tokenizer.end,
        },
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "projection_dim": WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "hidden_act": "quick_gelu",
        },
    )


def build(tokenizer: Tokenizer) -> CLIPModel:
    """The model with fresh weights."""
    model = CLIPModel(config(tokenizer))
    model.set_attn_implementation("eager")  # on CPU, bf16's fused attention is slow backwards (tools/mini/denoiser.py)
    return model


def image_embeddings(model: CLIPModel, pictures: Tensor) -> Tensor:
    """Unit vectors [n, 128] of pictures [n, 3, 64, 64] in 0 to 1."""
    pooled = model.vision_model(pixel_values=(pictures - MEAN) / DEVIATION).pooler_output
    return torch.nn.functional.normalize(model.visual_projection(pooled).float(), dim=-1)


def text_embeddings(model: CLIPModel, ids: Tensor, end: int) -> Tensor:
    """Unit vectors [n, 128] of token ids [n, 24]; what is padding in all of them is cut off first."""
    longest = int((ids != end).sum(1).max()) + 1
    pooled = model.text_model(input_ids=ids[:, :longest]).pooler_output
    return torch.nn.functional.normalize(model.text_projection(pooled).float(), dim=-1)
