"""LoRA layers: the frozen cell with a low-rank delta beside it.

             ┌────────── W (frozen) ──────────┐
        x ───┤                                + ──► y = W·x + scale · up(down(dropout(x)))
             └─ dropout ─ down ─ up ─ × scale ┘

A delta that starts from W (PiSSA, OLoRA) also has its first factors, `start`, whose product is taken off again:
y = W·x + scale · (up(down(dropout(x))) − up₀(down₀(x))).

The torch backend's layers (`backends/torch/lowrank.py`, where the tests hold them to peft's) in MindSpore's words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from persona.plugins.backends.mindspore.dropout import Dropout

Array = np.ndarray[Any, np.dtype[Any]]


class _LowRank(nn.Cell):
    """What both kinds have: base, down, up, scale, and where it has a start the first (down, up)."""

    def __init__(
        self,
        base: nn.Cell,
        factors: tuple[Array, Array],
        scale: float,
        dropout: float,
        drop: Dropout,
        start: tuple[Array, Array] | None = None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.base, self.scale = base, scale
        self.drop = drop.layer(dropout) if dropout else None
        self.down, self.up = (
            Parameter(Tensor(values), name=name) for name, values in zip(("down", "up"), factors, strict=True)
        )
        self.has_start = start is not None
        if start is not None:  # parameters, so that a graph does not hold them as constants
            self.start_down, self.start_up = (
                Parameter(Tensor(values), name=name, requires_grad=False)
                for name, values in zip(("start_down", "start_up"), start, strict=True)
            )

    def construct(self, x: Tensor) -> Tensor:
        """As the base."""
        low = self.low(self.dropped(x), self.down, self.up)
        if self.has_start:
            low = low - self.low(x, self.start_down, self.start_up)
        return self.base(x) + low * self.scale

    def dropped(self, x: Tensor) -> Tensor:
        """`x` after dropout, in training."""
        return self.drop(x) if self.drop is not None else x

    def low(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """up(down(x)), unscaled."""
        raise NotImplementedError

    def plain(self, x: Tensor) -> Tensor:
        """W·x, without a bias."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """ΔW = scale · up · down, shaped as W, without what it started from."""
        product = ops.matmul(self.up.reshape(self.up.shape[0], -1), self.down.reshape(self.down.shape[0], -1))
        return product.reshape(self.base.weight.shape) * self.scale


class LowRankDense(_LowRank):
    """A linear layer [out, in] with down [rank, in] and up [out, rank]."""

    def low(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """[…, in] to […, out]."""
        return ops.dense(ops.dense(x, down.astype(x.dtype)), up.astype(x.dtype))

    def plain(self, x: Tensor) -> Tensor:
        """[…, in] to […, out]."""
        return ops.dense(x, self.base.weight)


class LowRankConv(_LowRank):
    """A convolution [out, in, kh, kw] with down [rank, in, kh, kw], which strides as the base does, and up
    [out, rank, 1, 1]."""

    def __init__(self, base: nn.Conv2d, factors: tuple[Array, Array], *rest: Any) -> None:
        super().__init__(base, factors, *rest)
        down, up = factors
        self._wide = ops.Conv2D(
            down.shape[0],
            down.shape[2:],
            pad_mode=base.pad_mode,
            pad=base.padding,
            stride=base.stride,
            dilation=base.dilation,
        )
        self._narrow = ops.Conv2D(up.shape[0], 1)

    def low(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """[n, in, h, w] to [n, out, h', w']."""
        return self._narrow(self._wide(x, down.astype(x.dtype)), up.astype(x.dtype))

    def plain(self, x: Tensor) -> Tensor:
        """[n, in, h, w] to [n, out, h', w']."""
        return self.base.conv2d(x, self.base.weight)


class Decomposed(nn.Cell):
    """DoRA (arXiv 2402.09353, §4.1): the direction of W + ΔW, with a trained magnitude per output.

    y = m/‖W+ΔW‖ · (W·x + ΔW·x) + bias, where the norm (over all but the output axis) counts as a constant in the
    gradient (§4.3). With dropout, the part that the magnitude adds sees the dropped input, as in peft."""

    def __init__(self, layer: LowRankDense | LowRankConv) -> None:
        super().__init__(auto_prefix=False)
        self.layer = layer
        self.magnitude = Parameter(_norms(_in_full(layer.base.weight)), name="magnitude")  # [out]

    def construct(self, x: Tensor) -> Tensor:
        """As the base."""
        layer = self.layer
        norms = ops.stop_gradient(_norms(_in_full(layer.base.weight) + layer.delta()))
        dropped = layer.dropped(x)
        ratio = (self.magnitude / norms).astype(x.dtype)
        if isinstance(layer, LowRankConv):
            ratio = ratio.reshape(1, -1, 1, 1)
        low = layer.low(dropped, layer.down, layer.up)
        return layer.base(x) + (ratio - 1) * layer.plain(dropped) + ratio * low * layer.scale


LowRankLayer = LowRankDense | LowRankConv | Decomposed


def _in_full(weight: Tensor) -> Tensor:
    return weight.astype("float32")


def _norms(weight: Tensor) -> Tensor:
    return ops.sqrt(ops.square(weight.reshape(weight.shape[0], -1)).sum(axis=1))  # [out]
