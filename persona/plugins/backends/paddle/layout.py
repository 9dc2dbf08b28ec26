"""Paddle's parameters under their published names and in torch's layout, in which everything outside a session is.

Two things differ. A linear layer's weight is [in, out] in Paddle and [out, in] outside. And paddlenlp builds CLIP from
paddle.nn.TransformerEncoder, whose modules have names of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import nn

Array = np.ndarray[Any, np.dtype[Any]]

_CLIP = (  # published, paddlenlp's
    ("text_model.embeddings.token_embedding", "text_model.token_embedding"),
    ("text_model.embeddings.position_embedding", "text_model.positional_embedding"),
    ("text_model.encoder.layers.", "text_model.transformer.layers."),
    ("text_model.final_layer_norm", "text_model.ln_final"),
    (".layer_norm1", ".norm1"),
    (".layer_norm2", ".norm2"),
    (".mlp.fc1", ".linear1"),
    (".mlp.fc2", ".linear2"),
)
_PROJECTION = "text_projection"  # a bare parameter in paddlenlp, a linear layer outside


def outside(model: nn.Layer, name: str) -> str:
    """The published spelling of `name`, a parameter or module path inside `model`."""
    if not is_clip(model):
        return name
    for published, own in _CLIP:
        name = name.replace(own, published)
    return f"{name}.weight" if name == _PROJECTION else name


def inside(model: nn.Layer, name: str) -> str:
    """The path inside `model` of `name` as published."""
    if not is_clip(model):
        return name
    for published, own in _CLIP:
        name = name.replace(published, own)
    return _PROJECTION if name == f"{_PROJECTION}.weight" else name


def is_clip(model: nn.Layer) -> bool:
    """Whether it is one of paddlenlp's CLIP text encoders."""
    return hasattr(model, "text_model")


def find_layer(model: nn.Layer, path: str) -> Any:
    """The layer at a published `path`, or None."""
    found: Any = model
    for part in inside(model, path).split("."):
        found = getattr(found, "_sub_layers", {}).get(part)
        if found is None:
            return None
    return found


def replace_layer(model: nn.Layer, path: str, layer: nn.Layer) -> None:
    """Put `layer` where a published `path` leads to."""
    parent, _, last = inside(model, path).rpartition(".")
    found: Any = model
    for part in parent.split(".") if parent else ():
        found = found._sub_layers[part]
    found._sub_layers[last] = layer


@dataclass(frozen=True)
class Parameter:
    """A tensor of a model with its face to the outside: arrays float32 in torch's layout."""

    tensor: Any
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """In torch's layout."""
        found = tuple(int(side) for side in self.tensor.shape)
        return found[::-1] if self.transposed else found

    def read(self, tensor: Any = None) -> Array:
        """A copy of the values, or of another tensor's that lies as this one does (a moment, an average)."""
        values = np.array((self.tensor if tensor is None else tensor).numpy(), np.float32)
        return np.ascontiguousarray(values.T) if self.transposed else values

    def gradient(self) -> Array:
        """A copy of the gradient so far; zeros where nothing depends on the values."""
        return np.zeros(self.shape, np.float32) if self.tensor.grad is None else self.read(self.tensor.grad)

    def write(self, values: Array) -> None:
        """Take over values."""
        self.tensor.set_value(self.made_of(values))

    def made_of(self, values: Array) -> Any:
        """A new tensor of these values that lies as this one does."""
        values = np.asarray(values, np.float32)
        return paddle.to_tensor(np.ascontiguousarray(values.T if self.transposed else values), dtype=self.tensor.dtype)


def parameters(model: nn.Layer) -> dict[str, Parameter]:
    """Every parameter of a model by its published name."""
    linear = {f"{path}.weight" for path, layer in model.named_sublayers() if isinstance(layer, nn.Linear)}
    return {
        outside(model, own): Parameter(tensor, own in linear or own == _PROJECTION)
        for own, tensor in model.named_parameters()
    }
