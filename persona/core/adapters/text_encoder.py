"""Text encoders as lists of modules: CLIP under Hugging Face's names, spelt with `text_model.`, and T5's encoder
(dialects.md §2.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from persona.core.adapters.family import Module, layer_norm, linear, rms_norm


@dataclass(frozen=True)
class Clip:
    """Config of a CLIP text model; `projection` is the width of `text_projection`, 0 without."""

    layers: int
    width: int
    intermediate: int
    projection: int = 0
    vocabulary: int = 49408
    positions: int = 77

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Clip:
        """From a `text_encoder/config.json` of transformers."""
        projected = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
        return cls(
            layers=int(config["num_hidden_layers"]),
            width=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            projection=int(config.get("projection_dim") or 0) if projected else 0,
            vocabulary=int(config.get("vocab_size", 49408)),
            positions=int(config.get("max_position_embeddings", 77)),
        )

    def modules(self) -> tuple[Module, ...]:
        """Every module with weights, in registration order."""
        return tuple(self._modules())

    def _modules(self) -> Iterator[Module]:
        width = self.width
        yield Module("text_model.embeddings.token_embedding", "embedding", (self.vocabulary, width), bias=False)
        yield Module("text_model.embeddings.position_embedding", "embedding", (self.positions, width), bias=False)
        for n in range(self.layers):
            layer = f"text_model.encoder.layers.{n}"
            for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
                yield linear(f"{layer}.self_attn.{projection}", width, width)
            yield layer_norm(f"{layer}.layer_norm1", width)
            yield linear(f"{layer}.mlp.fc1", self.intermediate, width)
            yield linear(f"{layer}.mlp.fc2", width, self.intermediate)
            yield layer_norm(f"{layer}.layer_norm2", width)
        yield layer_norm("text_model.final_layer_norm", width)
        if self.projection:
            yield linear("text_projection", self.projection, width, bias=False)


@dataclass(frozen=True)
class T5:
    """Config of a T5 encoder with gated feed-forward (v1.1)."""

    layers: int = 24
    width: int = 4096
    intermediate: int = 10240
    vocabulary: int = 32128
    heads: int = 64
    buckets: int = 32

    def modules(self) -> tuple[Module, ...]:
        """Every module with weights, in registration order."""
        return tuple(self._modules())

    def _modules(self) -> Iterator[Module]:
        width = self.width
        yield Module("shared", "embedding", (self.vocabulary, width), bias=False)
        for n in range(self.layers):
            attention, feed = f"encoder.block.{n}.layer.0", f"encoder.block.{n}.layer.1"
            for projection in ("q", "k", "v", "o"):
                yield linear(f"{attention}.SelfAttention.{projection}", width, width, bias=False)
            if n == 0:
                bias = f"{attention}.SelfAttention.relative_attention_bias"
                yield Module(bias, "embedding", (self.buckets, self.heads), bias=False)
            yield rms_norm(f"{attention}.layer_norm", width)
            yield linear(f"{feed}.DenseReluDense.wi_0", self.intermediate, width, bias=False)
            yield linear(f"{feed}.DenseReluDense.wi_1", self.intermediate, width, bias=False)
            yield linear(f"{feed}.DenseReluDense.wo", width, self.intermediate, bias=False)
            yield rms_norm(f"{feed}.layer_norm", width)
        yield rms_norm("encoder.final_layer_norm", width)
