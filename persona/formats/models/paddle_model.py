"""Paddle's layout of whole components: the weights of linear layers are transposed, nothing else is
(stacks/paddle.md §4.8)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from persona.core.adapters.reshaping import transposed
from persona.core.adapters.tensor import TensorRef

_EMBEDDING = re.compile(r"(?:^|\.)(?:\w*embedding|shared|relative_attention_bias|embed_tokens|wte|wpe)\.weight$")
_OLD_CLIP = (
    (re.compile(r"^text_model\.transformer\.layers\."), "text_model.encoder.layers."),
    (re.compile(r"\.linear1\."), ".mlp.fc1."),
    (re.compile(r"\.linear2\."), ".mlp.fc2."),
    (re.compile(r"\.norm1\."), ".layer_norm1."),
    (re.compile(r"\.norm2\."), ".layer_norm2."),
    (re.compile(r"^text_model\.ln_final\."), "text_model.final_layer_norm."),
    (re.compile(r"^text_model\.(token|position)_embedding\."), r"text_model.embeddings.\1_embedding."),
)
"""PaddleNLP's older CLIP (dialects.md §2.3)."""


def is_linear(name: str, ref: TensorRef) -> bool:
    """Whether a parameter is a linear layer's weight."""
    return len(ref.shape) == 2 and name.endswith(".weight") and not _EMBEDDING.search(name)


def exchanged(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """Torch's layout from Paddle's, or the other way round: it is the same exchange."""
    return {name: transposed(ref) if is_linear(name, ref) else ref for name, ref in tensors.items()}


def modern_names(tensors: Mapping[str, TensorRef], component: str) -> dict[str, TensorRef]:
    """Hugging Face's CLIP names for a text encoder that PaddleNLP wrote with its older ones."""
    if not component.startswith("text_encoder"):
        return dict(tensors)
    renamed = {}
    for name, ref in tensors.items():
        for pattern, replacement in _OLD_CLIP:
            name = pattern.sub(replacement, name)
        renamed[name] = ref
    return renamed
