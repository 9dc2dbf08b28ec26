"""LoRA layers: the frozen module with a low-rank delta beside it.

             ┌────────── W (frozen) ──────────┐
        x ───┤                                + ──► y = W·x + scale · up(down(dropout(x)))
             └─ dropout ─ down ─ up ─ × scale ┘

A delta that starts from W (PiSSA, OLoRA) also has its first factors, `start`, whose product is taken off again:
y = W·x + scale · (up(down(dropout(x))) − up₀(down₀(x))).

Our own, not peft's: each is a screen long, keeps `down` and `up` as plain parameters under the module's own name (peft
puts adapters into dictionaries and renames the module `base_layer`), and saves three kernels a layer and step. The
tests hold them to peft's layers, forward and gradients.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Start = tuple[Tensor, Tensor] | None


class LowRankLinear(nn.Module):
    """A linear layer [out, in] with down [rank, in] and up [out, rank]; `start` are the first (down, up)."""

    start_down: Tensor | None
    start_up: Tensor | None

    def __init__(
        self, base: nn.Linear, down: Tensor, up: Tensor, scale: float, dropout: float, start: Start = None
    ) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        _keep_start(self, start)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] to […, out]."""
        y = self.base(x)
        if self.start_down is not None and self.start_up is not None:
            y = y - functional.linear(functional.linear(x, self.start_down), self.start_up) * self.scale
        h = functional.linear(_dropped(x, self), self.down)  # […, rank]
        if torch.is_autocast_enabled(x.device.type):  # addmm must have one dtype throughout
            return cast(Tensor, y + functional.linear(h, self.up) * self.scale)
        sum_ = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), self.up.t(), alpha=self.scale)
        return sum_.view_as(y)

    def delta(self) -> Tensor:
        """ΔW = scale · up · down, [out, in], without what it started from."""
        return (self.up @ self.down) * self.scale


class LowRankConv(nn.Module):
    """A convolution [out, in, kh, kw] with down [rank, in, kh, kw], which strides as the base does, and up
    [out, rank, 1, 1]; `start` are the first (down, up)."""

    start_down: Tensor | None
    start_up: Tensor | None

    def __init__(
        self, base: nn.Conv2d, down: Tensor, up: Tensor, scale: float, dropout: float, start: Start = None
    ) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        _keep_start(self, start)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in, h, w] to [n, out, h', w']."""
        low = self.low(_dropped(x, self), self.down, self.up)
        if self.start_down is not None and self.start_up is not None:
            low = low - self.low(x, self.start_down, self.start_up)
        return cast(Tensor, self.base(x) + low * self.scale)

    def low(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """up(down(x)), unscaled."""
        base = self.base
        h = functional.conv2d(x, down, None, base.stride, base.padding, base.dilation)
        return functional.conv2d(h, up)

    def delta(self) -> Tensor:
        """ΔW = scale · up · down, [out, in, kh, kw], without what it started from."""
        return (self.up.flatten(1) @ self.down.flatten(1)).view(self.base.weight.shape) * self.scale


class Decomposed(nn.Module):
    """DoRA (arXiv 2402.09353, §4.1): the direction of W + ΔW, with a trained magnitude per output.

    y = m/‖W+ΔW‖ · (W·x + ΔW·x) + bias, where the norm (over all but the output axis) counts as a constant in the
    gradient (§4.3). With dropout, the part that the magnitude adds sees the dropped input, as in peft
    (peft/tuners/lora/dora.py).
    """

    def __init__(self, layer: LowRankLinear | LowRankConv) -> None:
        super().__init__()
        self.layer = layer
        self.magnitude = nn.Parameter(_norms(layer.base.weight.float()))  # [out]

    def forward(self, x: Tensor) -> Tensor:
        """As the base."""
        layer = self.layer
        base = layer.base
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            norms = _norms(base.weight.float() + layer.delta())
        dropped = _dropped(x, layer)
        y = base(x)
        if isinstance(layer, LowRankConv):
            ratio = (self.magnitude / norms).view(1, -1, 1, 1)
            low = layer.low(dropped, layer.down, layer.up)
            plain = base._conv_forward(dropped, base.weight, None)  # type: ignore[operator]
        else:
            ratio = self.magnitude / norms
            low = functional.linear(functional.linear(dropped, layer.down), layer.up)
            plain = functional.linear(dropped, base.weight)
        return cast(Tensor, (y + (ratio - 1) * plain + ratio * low * layer.scale).to(y.dtype))


LowRankLayer = LowRankLinear | LowRankConv | Decomposed


def _keep_start(layer: LowRankLinear | LowRankConv, start: Start) -> None:
    """As buffers: they move with the layer, and nothing trains them."""
    for name, tensor in zip(("start_down", "start_up"), start or (None, None), strict=True):
        layer.register_buffer(name, tensor, persistent=False)


def _dropped(x: Tensor, layer: LowRankLinear | LowRankConv) -> Tensor:
    return functional.dropout(x, layer.dropout) if layer.dropout and layer.training else x


def _norms(weight: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)  # [out]
    return norms
