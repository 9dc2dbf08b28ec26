"""A layer norm whose gradient is right although its weights are frozen.

paddlepaddle 3.3.1's kernel on a cpu leaves the weight out of the input's gradient, silently, when the weight needs no
gradient of its own (measured: 23 % off; right when the weight is trained). Every LoRA through a frozen transformer
would learn from wrong gradients."""

from __future__ import annotations

from typing import Any

from paddle import nn
from paddle.nn import functional


class LayerNorm(nn.LayerNorm):
    """paddle.nn.LayerNorm with the weight and bias applied outside of the kernel. Takes over those of `frozen`."""

    def __init__(self, frozen: nn.LayerNorm, epsilon: float | None = None) -> None:
        super().__init__(frozen._normalized_shape, epsilon or frozen._epsilon, weight_attr=False, bias_attr=False)
        self.weight, self.bias = frozen.weight, frozen.bias

    def forward(self, x: Any) -> Any:
        """[…, width] to the same."""
        y = functional.layer_norm(x, self._normalized_shape, None, None, self._epsilon)
        if self.weight is not None:
            y = y * self.weight
        return y if self.bias is None else y + self.bias


def replace_layer_norms(model: nn.Layer, epsilon: float | None = None) -> None:
    """Put such a one in place of every layer norm of `model`."""
    for layer in model.sublayers(include_self=True):
        for name, inner in layer.named_children():
            if isinstance(inner, nn.LayerNorm) and not isinstance(inner, LayerNorm):
                layer._sub_layers[name] = LayerNorm(inner, epsilon)
