"""Stable Diffusion's UNet as a list of modules (diffusers UNet2DConditionModel; dialects.md §2.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from persona.core.adapters.family import Module, conv, group_norm, layer_norm, linear


@dataclass(frozen=True)
class UNet:
    """Config of a UNet.

    `channels` per level; `depth` transformer blocks per attention on the way down, 0 for a level without attention
    (the way up mirrors it); `context` the width of the text's hidden states; `added` the input width of SDXL's
    `add_embedding`, 0 without; `hidden_projection` the width of Kolors' text states before `encoder_hid_proj`.
    """

    channels: tuple[int, ...]
    depth: tuple[int, ...]
    mid_depth: int
    context: int
    linear_projection: bool = False
    layers_per_block: int = 2
    added: int = 0
    hidden_projection: int = 0
    in_channels: int = 4
    out_channels: int = 4
    mid_attention: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UNet:
        """From a diffusers `unet/config.json`."""
        channels = tuple(config["block_out_channels"])
        layers = config.get("transformer_layers_per_block", 1)
        per_level = tuple(layers) if isinstance(layers, list | tuple) else (layers,) * len(channels)
        attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
        added = config.get("addition_embed_type") == "text_time"
        return cls(
            channels=channels,
            depth=tuple(d if a else 0 for d, a in zip(per_level, attends, strict=True)),
            mid_depth=per_level[-1],
            context=int(config["cross_attention_dim"]),
            linear_projection=bool(config.get("use_linear_projection", False)),
            layers_per_block=int(config.get("layers_per_block", 2)),
            added=int(config["projection_class_embeddings_input_dim"]) if added else 0,
            hidden_projection=int(config.get("encoder_hid_dim") or 0),
            in_channels=int(config.get("in_channels", 4)),
            out_channels=int(config.get("out_channels", 4)),
        )

    @property
    def time_width(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels[0]

    @property
    def attends_up(self) -> tuple[bool, ...]:
        """Whether up block b has attentions (what decides LDM's upsampler slot, dialects.md §2.2)."""
        return tuple(d > 0 for d in reversed(self.depth))

    def modules(self) -> tuple[Module, ...]:
        """Every module with weights, in registration order."""
        return tuple(self._modules())

    def _modules(self) -> Iterator[Module]:
        first, time = self.channels[0], self.time_width
        yield conv("conv_in", first, self.in_channels, 3)
        yield linear("time_embedding.linear_1", time, first)
        yield linear("time_embedding.linear_2", time, time)
        if self.added:
            yield linear("add_embedding.linear_1", time, self.added)
            yield linear("add_embedding.linear_2", time, time)
        if self.hidden_projection:
            yield linear("encoder_hid_proj", self.context, self.hidden_projection)
        for block in range(len(self.channels)):
            yield from self._down(block)
        for block in range(len(self.channels)):
            yield from self._up(block)
        last = self.channels[-1]
        if self.mid_attention:
            yield from self._attention("mid_block.attentions.0", last, self.mid_depth)
        yield from self._resnet("mid_block.resnets.0", last, last)
        if self.mid_attention:
            yield from self._resnet("mid_block.resnets.1", last, last)
        yield group_norm("conv_norm_out", first)
        yield conv("conv_out", self.out_channels, first, 3)

    def _down(self, block: int) -> Iterator[Module]:
        name, out = f"down_blocks.{block}", self.channels[block]
        before = self.channels[max(block - 1, 0)]
        for j in range(self.layers_per_block if self.depth[block] else 0):
            yield from self._attention(f"{name}.attentions.{j}", out, self.depth[block])
        for j in range(self.layers_per_block):
            yield from self._resnet(f"{name}.resnets.{j}", before if j == 0 else out, out)
        if block < len(self.channels) - 1:
            yield conv(f"{name}.downsamplers.0.conv", out, out, 3)

    def _up(self, block: int) -> Iterator[Module]:
        name, last = f"up_blocks.{block}", len(self.channels) - 1
        channels, depth = self.channels[::-1], self.depth[::-1][block]
        out, before = channels[block], channels[max(block - 1, 0)]
        skip_of_last = channels[min(block + 1, last)]
        for j in range(self.layers_per_block + 1 if depth else 0):
            yield from self._attention(f"{name}.attentions.{j}", out, depth)
        for j in range(self.layers_per_block + 1):
            skip = skip_of_last if j == self.layers_per_block else out
            yield from self._resnet(f"{name}.resnets.{j}", (before if j == 0 else out) + skip, out)
        if block < last:
            yield conv(f"{name}.upsamplers.0.conv", out, out, 3)

    def _resnet(self, name: str, into: int, out: int) -> Iterator[Module]:
        yield group_norm(f"{name}.norm1", into)
        yield conv(f"{name}.conv1", out, into, 3)
        yield linear(f"{name}.time_emb_proj", out, self.time_width)
        yield group_norm(f"{name}.norm2", out)
        yield conv(f"{name}.conv2", out, out, 3)
        if into != out:
            yield conv(f"{name}.conv_shortcut", out, into, 1)

    def _attention(self, name: str, width: int, depth: int) -> Iterator[Module]:
        def project(path: str) -> Module:
            return linear(path, width, width) if self.linear_projection else conv(path, width, width, 1)

        yield group_norm(f"{name}.norm", width)
        yield project(f"{name}.proj_in")
        for d in range(depth):
            block = f"{name}.transformer_blocks.{d}"
            yield layer_norm(f"{block}.norm1", width)
            yield from _cross_attention(f"{block}.attn1", width, width)
            yield layer_norm(f"{block}.norm2", width)
            yield from _cross_attention(f"{block}.attn2", width, self.context)
            yield layer_norm(f"{block}.norm3", width)
            yield linear(f"{block}.ff.net.0.proj", 8 * width, width)
            yield linear(f"{block}.ff.net.2", width, 4 * width)
        yield project(f"{name}.proj_out")


def _cross_attention(name: str, width: int, context: int) -> Iterator[Module]:
    yield linear(f"{name}.to_q", width, width, bias=False)
    yield linear(f"{name}.to_k", width, context, bias=False)
    yield linear(f"{name}.to_v", width, context, bias=False)
    yield linear(f"{name}.to_out.0", width, width)
