"""LoRA layers: the frozen layer with a low-rank delta beside it, y = W·x + scale · up(down(dropout(x))).

Our own, not ppdiffusers': its LoRA processors are behind its own deprecation tripwires in 0.29.0, and its layers know
neither alpha nor DoRA. Factors are in torch's layout, as in states and files. A delta that starts from W (PiSSA, OLoRA)
also has its first factors, whose product is taken off again. ppdiffusers calls a layer with a LoRA scale as second
argument, which is always 1 here and is not looked at."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn
from paddle.nn import functional

Start = tuple[Any, Any] | None


class LowRankLinear(nn.Layer):
    """A linear layer [in, out] with down [rank, in] and up [out, rank]; `start` are the first (down, up)."""

    def __init__(self, base: Any, down: Any, up: Any, scale: float, dropout: float, start: Start = None) -> None:
        super().__init__()
        self.base, self.scale, self.dropout, self.start = base, scale, dropout, start
        self.down, self.up = trainable(down), trainable(up)

    def forward(self, x: Any, *_: Any) -> Any:
        """[…, in] to […, out]."""
        y = self.base(x)
        if self.start is not None:
            y = y - self.low(x, *self.start) * self.scale
        return y + self.low(_dropped(x, self), self.down, self.up) * self.scale

    def low(self, x: Any, down: Any, up: Any) -> Any:
        """up(down(x)), unscaled."""
        return paddle.matmul(paddle.matmul(x, down, transpose_y=True), up, transpose_y=True)

    def plain(self, x: Any) -> Any:
        """W·x without the bias."""
        return paddle.matmul(x, self.base.weight)

    def per_output(self, values: Any) -> Any:
        """[out] shaped so that it multiplies this layer's output."""
        return values

    def direction(self) -> Any:
        """W + ΔW, [out, in]."""
        return self.base.weight.t() + paddle.matmul(self.up, self.down) * self.scale


class LowRankConv(nn.Layer):
    """A convolution [out, in, kh, kw] with down [rank, in, kh, kw], which strides as the base does, and up
    [out, rank, 1, 1]; `start` are the first (down, up)."""

    def __init__(self, base: Any, down: Any, up: Any, scale: float, dropout: float, start: Start = None) -> None:
        super().__init__()
        self.base, self.scale, self.dropout, self.start = base, scale, dropout, start
        self.down, self.up = trainable(down), trainable(up)

    def forward(self, x: Any, *_: Any) -> Any:
        """[n, in, h, w] to [n, out, h', w']."""
        y = self.base(x)
        if self.start is not None:
            y = y - self.low(x, *self.start) * self.scale
        return y + self.low(_dropped(x, self), self.down, self.up) * self.scale

    def low(self, x: Any, down: Any, up: Any) -> Any:
        """up(down(x)), unscaled."""
        return functional.conv2d(self._strided(x, down), up)

    def plain(self, x: Any) -> Any:
        """W·x without the bias."""
        return self._strided(x, self.base.weight)

    def per_output(self, values: Any) -> Any:
        """[out] shaped so that it multiplies this layer's output."""
        return values.reshape([1, -1, 1, 1])

    def direction(self) -> Any:
        """W + ΔW, [out, in, kh, kw]."""
        product = paddle.matmul(self.up.flatten(1), self.down.flatten(1)) * self.scale
        return self.base.weight + product.reshape(self.base.weight.shape)

    def _strided(self, x: Any, weight: Any) -> Any:
        base = self.base
        return functional.conv2d(x, weight, None, base._stride, base._padding, base._dilation)


class Decomposed(nn.Layer):
    """DoRA (arXiv 2402.09353, §4.1): the direction of W + ΔW, with a trained magnitude [out].

    y = m/‖W+ΔW‖ · (W·x + ΔW·x) + bias, where the norm (over all but the output axis) counts as a constant in the
    gradient (§4.3). With dropout, the part that the magnitude adds sees the dropped input, as in the torch backend.
    """

    def __init__(self, layer: Any, magnitude: Any) -> None:
        super().__init__()
        self.layer, self.magnitude = layer, trainable(magnitude)

    def forward(self, x: Any, *_: Any) -> Any:
        """As the base."""
        layer = self.layer
        with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
            norms = row_norms(layer.direction())
        ratio = layer.per_output(self.magnitude / norms)
        dropped = _dropped(x, layer)
        low = layer.low(dropped, layer.down, layer.up) * layer.scale
        y = layer.base(x)
        return (y + (ratio - 1) * layer.plain(dropped) + ratio * low).astype(y.dtype)


def trainable(values: Any) -> Any:
    """A parameter of these values."""
    parameter = paddle.create_parameter(values.shape, "float32")
    parameter.set_value(values)
    return parameter


def row_norms(weight: Any) -> Any:
    """The length of each output's row, [out]."""
    return paddle.sqrt((weight.flatten(1) ** 2).sum(axis=1))


def _dropped(x: Any, layer: Any) -> Any:
    return functional.dropout(x, layer.dropout) if layer.dropout and layer.training else x
