"""Captions to what the denoiser is conditioned on."""

from __future__ import annotations

from typing import Any

import paddle

from persona.plugins.backends.shared import text
from persona.plugins.backends.shared.opened import Array


class TextEncoders(text.TextEncoders):
    """CLIP text encoders of paddlenlp."""

    def _last(self, model: Any, ids: Array, mask: Array | None) -> Any:
        return model(**_inputs(ids, mask), return_dict=True).last_hidden_state

    def _last_but_one(self, model: Any, ids: Array, mask: Array | None) -> tuple[Any, Any]:
        output = model(**_inputs(ids, mask), output_hidden_states=True, return_dict=True)
        return output.hidden_states[-2], getattr(output, "text_embeds", None)

    def _side_by_side(self, states: list[Any]) -> Any:
        return paddle.concat(states, axis=-1)


def _inputs(ids: Array, mask: Array | None) -> dict[str, Any]:
    inputs = {"input_ids": paddle.to_tensor(ids)}
    return inputs if mask is None else inputs | {"attention_mask": paddle.to_tensor(mask)}
