"""Dropout whose masks follow from the plan, the update, the micro-batch and the layer.

MindSpore's own generators cannot be set on a cpu, and a block that is computed again for its gradient needs the mask
it had. So a mask is a function of a key and a counter (the finalizer of MurmurHash3 over a Weyl sequence, in 32 bits),
made by numpy, or in a graph, where Python cannot run, by MindSpore's integer operations, with the same bits."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from persona.plugins.backends.mindspore.cells import write

_STRIDE, _FIRST, _SECOND = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35
_BITS = 24  # of 32, compared with the probability: float32, in which a graph compares, holds them exactly


class Dropout:
    """The masks of all layers of a session. There is no state to keep: what is drawn follows from the plan."""

    def __init__(self) -> None:
        self._layers = 0
        self._key = Parameter(Tensor(np.zeros(2, np.int32)), name="dropout.key", requires_grad=False)
        self.begin(0)

    def begin(self, seed: int) -> None:
        """What is drawn from here on follows from `seed`; once an update."""
        self._seed, self._micro = seed, 0

    def begin_micro_batch(self) -> None:
        """Other masks from here on."""
        self._micro += 1
        words = np.random.SeedSequence([self._seed, self._micro]).generate_state(2, np.uint32)
        write(self._key, words.view(np.int32))

    def layer(self, probability: float) -> LayerDropout:
        """The next layer that draws here."""
        self._layers += 1
        return LayerDropout(self._key, self._layers, probability)


class LayerDropout(nn.Cell):
    """In training, `x` with a share of its values zero and the others scaled up. `in_graph` says who makes the mask."""

    def __init__(self, key: Parameter, number: int, probability: float) -> None:
        super().__init__(auto_prefix=False)
        self.key, self.in_graph = key, False
        self._own = number * _SECOND & 0xFFFFFFFF
        self._limit, self._scale = int(probability * 2**_BITS), 1.0 / (1.0 - probability)
        # as tensors: the product of an int32 tensor and a Python number is computed in float32 in a graph
        numbers = np.array([_STRIDE, _FIRST, _SECOND, self._own], np.uint32).view(np.int32)
        self._stride, self._first, self._second, self._offset = (Tensor([n], ms.int32) for n in numbers.tolist())

    def construct(self, x: Tensor) -> Tensor:
        """As `x`."""
        if not self.training:
            return x
        kept = self._kept_in_graph(x) if self.in_graph else self._kept(x)
        return x * (kept * self._scale).astype(x.dtype)

    def _kept(self, x: Tensor) -> Tensor:
        """1 where a value stays, else 0, float32."""
        with np.errstate(over="ignore"):
            key = self.key.asnumpy().view(np.uint32)
            bits = np.arange(x.size, dtype=np.uint32) * np.uint32(_STRIDE) + key[0]
            bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(_FIRST) ^ (key[1] + np.uint32(self._own))
            bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(_SECOND)
            bits = bits ^ (bits >> np.uint32(16))
        return Tensor((bits >> np.uint32(32 - _BITS) >= self._limit).astype(np.float32).reshape(x.shape))

    def _kept_in_graph(self, x: Tensor) -> Tensor:
        """The same."""
        bits = ops.arange(x.size, dtype=ms.int32) * self._stride + self.key[0]
        bits = ops.bitwise_xor(_mixed(bits, 16) * self._first, self.key[1] + self._offset)
        bits = _mixed(_mixed(bits, 13) * self._second, 16)
        kept = (_shifted(bits, 32 - _BITS) >= self._limit).astype(ms.float32)
        return ops.stop_gradient(kept.reshape(x.shape))  # what is made of integers has none that could be compiled


def _mixed(bits: Tensor, by: int) -> Tensor:
    return ops.bitwise_xor(bits, _shifted(bits, by))


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Without the copies of the sign that int32 shifts in."""
    return ops.bitwise_and(ops.bitwise_right_shift(bits, by), 2 ** (32 - by) - 1)
