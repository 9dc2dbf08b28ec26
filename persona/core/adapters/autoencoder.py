"""The autoencoder as a list of modules: diffusers' AutoencoderKL, one topology in every family (dialects.md §11.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from persona.core.adapters.family import Module, conv, group_norm, linear


@dataclass(frozen=True)
class Autoencoder:
    """Config of an AutoencoderKL: channels per level from the picture inwards; SD3 and Flux have no `quant` steps."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent: int = 4
    colours: int = 3
    quant: bool = True

    def modules(self) -> tuple[Module, ...]:
        """Every module with weights, in registration order."""
        return tuple(self._modules())

    def _modules(self) -> Iterator[Module]:
        widths, deepest = self.channels, self.channels[-1]
        yield conv("encoder.conv_in", widths[0], self.colours, 3)
        before = widths[0]
        for level, width in enumerate(widths):
            for n in range(self.layers):
                yield from _resnet(f"encoder.down_blocks.{level}.resnets.{n}", before, width)
                before = width
            if level < len(widths) - 1:
                yield conv(f"encoder.down_blocks.{level}.downsamplers.0.conv", width, width, 3)
        yield from _middle("encoder", deepest)
        yield group_norm("encoder.conv_norm_out", deepest)
        yield conv("encoder.conv_out", 2 * self.latent, deepest, 3)
        yield conv("decoder.conv_in", deepest, self.latent, 3)
        before = deepest
        for level, width in enumerate(reversed(widths)):
            for n in range(self.layers + 1):
                yield from _resnet(f"decoder.up_blocks.{level}.resnets.{n}", before, width)
                before = width
            if level < len(widths) - 1:
                yield conv(f"decoder.up_blocks.{level}.upsamplers.0.conv", width, width, 3)
        yield from _middle("decoder", deepest)
        yield group_norm("decoder.conv_norm_out", widths[0])
        yield conv("decoder.conv_out", self.colours, widths[0], 3)
        if self.quant:
            yield conv("quant_conv", 2 * self.latent, 2 * self.latent, 1)
            yield conv("post_quant_conv", self.latent, self.latent, 1)


def _resnet(name: str, into: int, out: int) -> Iterator[Module]:
    yield group_norm(f"{name}.norm1", into)
    yield conv(f"{name}.conv1", out, into, 3)
    yield group_norm(f"{name}.norm2", out)
    yield conv(f"{name}.conv2", out, out, 3)
    if into != out:
        yield conv(f"{name}.conv_shortcut", out, into, 1)


def _middle(half: str, width: int) -> Iterator[Module]:
    name = f"{half}.mid_block"
    yield group_norm(f"{name}.attentions.0.group_norm", width)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        yield linear(f"{name}.attentions.0.{part}", width, width)
    yield from _resnet(f"{name}.resnets.0", width, width)
    yield from _resnet(f"{name}.resnets.1", width, width)
