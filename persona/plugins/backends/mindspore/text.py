"""Captions to what the denoiser is conditioned on."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Tensor, ops

from persona.plugins.backends.mindspore.cells import Array
from persona.plugins.backends.shared import text


class TextEncoders(text.TextEncoders):
    """CLIP text encoders of mindone."""

    def unread(self) -> tuple[str, ...]:
        """How the names of weights begin that nothing depends on: of the first of two encoders, which is read before
        its last layer, that layer and the norm behind it. MindSpore gives them gradients of zero, torch none."""
        *early, _ = self.encoders.items()
        return tuple(
            f"{name}.text_model.{part}."
            for name, model in early
            for part in (f"encoder.layers.{model.config.num_hidden_layers - 1}", "final_layer_norm")
        )

    def _last(self, model: Any, ids: Array, mask: Array | None) -> Tensor:
        return model(**_inputs(ids, mask))[0]

    def _last_but_one(self, model: Any, ids: Array, mask: Array | None) -> tuple[Tensor, Tensor]:
        # text_embeds (or last states), last (or pooled) states, states after every layer
        output = model(**_inputs(ids, mask), output_hidden_states=True)
        return output[2][-2], output[0]

    def _side_by_side(self, states: list[Tensor]) -> Tensor:
        return ops.cat(states, axis=-1)


def _inputs(ids: Array, mask: Array | None) -> dict[str, Tensor]:
    inputs = {"input_ids": Tensor(ids.astype(np.int32))}
    return inputs if mask is None else inputs | {"attention_mask": Tensor(mask.astype(np.int32))}
