"""Captions to what the denoiser is conditioned on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from persona.plugins.backends.shared import text
from persona.plugins.backends.shared.opened import Array


class TextEncoders(text.TextEncoders):
    """CLIP text encoders of transformers."""

    def _last(self, model: Any, ids: Array, mask: Array | None) -> Tensor:
        states: Tensor = model(**_inputs(model, ids, mask))[0]
        return states

    def _last_but_one(self, model: Any, ids: Array, mask: Array | None) -> tuple[Tensor, Tensor]:
        output = model(**_inputs(model, ids, mask), output_hidden_states=True)
        return output.hidden_states[-2], output[0]

    def _side_by_side(self, states: list[Tensor]) -> Tensor:
        return torch.cat(states, dim=-1)


def _inputs(model: Any, ids: Array, mask: Array | None) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    inputs = {"input_ids": torch.from_numpy(ids).to(device)}
    return inputs if mask is None else inputs | {"attention_mask": torch.from_numpy(mask).to(device)}
