"""Diffusion transformers as lists of modules: SD3's MMDiT and Flux.1, under diffusers' names (dialects.md §2.4-2.6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from persona.core.adapters.family import Module, conv, linear, rms_norm


@dataclass(frozen=True)
class MMDiT:
    """Config of diffusers' SD3Transformer2DModel; `dual` blocks have a second attention (3.5 medium)."""

    layers: int
    width: int
    dual: int = 0
    query_key_norm: bool = True
    context: int = 4096
    pooled: int = 2048
    channels: int = 16
    patch: int = 2
    head: int = 64

    def modules(self) -> tuple[Module, ...]:
        """Every module with weights, in registration order."""
        return tuple(self._modules())

    def _modules(self) -> Iterator[Module]:
        width = self.width
        yield conv("pos_embed.proj", width, self.channels, self.patch)
        yield from _embedder("time_text_embed.timestep_embedder", width, 256)
        yield from _embedder("time_text_embed.text_embedder", width, self.pooled)
        yield linear("context_embedder", width, self.context)
        for n in range(self.layers):
            yield from self._block(n)
        yield linear("norm_out.linear", 2 * width, width)
        yield linear("proj_out", self.patch**2 * self.channels, width)

    def _block(self, n: int) -> Iterator[Module]:
        name, width, last = f"transformer_blocks.{n}", self.width, n == self.layers - 1
        yield linear(f"{name}.norm1.linear", (9 if n < self.dual else 6) * width, width)
        yield linear(f"{name}.norm1_context.linear", (2 if last else 6) * width, width)
        head = self.head if self.query_key_norm else 0
        yield from _joint_attention(f"{name}.attn", width, head, context_out=not last)
        if n < self.dual:
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                yield linear(f"{name}.attn2.{part}", width, width)
            if head:
                yield rms_norm(f"{name}.attn2.norm_q", head)
                yield rms_norm(f"{name}.attn2.norm_k", head)
        yield from _feed_forward(f"{name}.ff", width)
        if not last:
            yield from _feed_forward(f"{name}.ff_context", width)


@dataclass(frozen=True)
class Flux:
    """Config of diffusers' FluxTransformer2DModel; `guidance` is False for schnell."""

    double: int = 19
    single: int = 38
    width: int = 3072
    context: int = 4096
    pooled: int = 768
    channels: int = 64
    guidance: bool = True
    head: int = 128

    def modules(self) -> tuple[Module, ...]:
        """Every module with weights, in registration order."""
        return tuple(self._modules())

    def _modules(self) -> Iterator[Module]:
        width = self.width
        yield from _embedder("time_text_embed.timestep_embedder", width, 256)
        if self.guidance:
            yield from _embedder("time_text_embed.guidance_embedder", width, 256)
        yield from _embedder("time_text_embed.text_embedder", width, self.pooled)
        yield linear("context_embedder", width, self.context)
        yield linear("x_embedder", width, self.channels)
        for n in range(self.double):
            name = f"transformer_blocks.{n}"
            yield linear(f"{name}.norm1.linear", 6 * width, width)
            yield linear(f"{name}.norm1_context.linear", 6 * width, width)
            yield from _joint_attention(f"{name}.attn", width, self.head, context_out=True)
            yield from _feed_forward(f"{name}.ff", width)
            yield from _feed_forward(f"{name}.ff_context", width)
        for n in range(self.single):
            yield from self._single(f"single_transformer_blocks.{n}")
        yield linear("norm_out.linear", 2 * width, width)
        yield linear("proj_out", self.channels, width)

    def _single(self, name: str) -> Iterator[Module]:
        width = self.width
        yield linear(f"{name}.norm.linear", 3 * width, width)
        yield linear(f"{name}.proj_mlp", 4 * width, width)
        yield linear(f"{name}.proj_out", width, 5 * width)
        for part in ("to_q", "to_k", "to_v"):
            yield linear(f"{name}.attn.{part}", width, width)
        yield rms_norm(f"{name}.attn.norm_q", self.head)
        yield rms_norm(f"{name}.attn.norm_k", self.head)


def _embedder(name: str, width: int, into: int) -> Iterator[Module]:
    yield linear(f"{name}.linear_1", width, into)
    yield linear(f"{name}.linear_2", width, width)


def _feed_forward(name: str, width: int) -> Iterator[Module]:
    yield linear(f"{name}.net.0.proj", 4 * width, width)
    yield linear(f"{name}.net.2", width, 4 * width)


def _joint_attention(name: str, width: int, head: int, *, context_out: bool) -> Iterator[Module]:
    for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0"):
        yield linear(f"{name}.{part}", width, width)
    if context_out:
        yield linear(f"{name}.to_add_out", width, width)
    if head:
        for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield rms_norm(f"{name}.{part}", head)
