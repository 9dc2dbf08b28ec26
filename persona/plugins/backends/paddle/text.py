"""Captions to what the denoiser is conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import paddle
from paddle import nn

from persona.core.training.base import Base
from persona.plugins.backends.shared.words import Words, attention_mask, cut_note


class TextEncoders:
    """The text encoders of a base, in order, with their words.

    One encoder: its last hidden states, after the final norm (SD1, SD2). Two: the last but one of both, side by side,
    and the second one's projected end-of-text state, "pooled" (SDXL, arXiv 2307.01952 §2.1)."""

    def __init__(
        self, base: Base, encoders: Mapping[str, nn.Layer], words: Mapping[str, Words], note: Callable[[str], None]
    ) -> None:
        self._encoders: dict[str, Any] = dict(encoders)
        self._words, self._note = words, note
        self._masked = {name for name in encoders if base.components[name].get("use_attention_mask")}
        for name, model in self._encoders.items():
            model.text_model.eos_token_id = self._words[name].end  # configs say 2, and pool at the highest id then

    def __call__(self, captions: Sequence[str]) -> dict[str, Any]:
        """hidden_states [n, window, dim] and, with two encoders, pooled [n, dim]."""
        if len(self._encoders) == 1:
            ((name, model),) = self._encoders.items()
            return {"hidden_states": model(**self._inputs(name, captions), return_dict=True).last_hidden_state}
        hidden, pooled = [], None
        for name, model in self._encoders.items():
            output = model(**self._inputs(name, captions), output_hidden_states=True, return_dict=True)
            hidden.append(output.hidden_states[-2])
            pooled = getattr(output, "text_embeds", None)  # of the last, a CLIPTextModelWithProjection
        assert pooled is not None
        return {"hidden_states": paddle.concat(hidden, axis=-1), "pooled": pooled}

    def _inputs(self, name: str, captions: Sequence[str]) -> dict[str, Any]:
        words = self._words[name]
        ids, cut = words.ids(captions)
        for caption in cut:
            self._note(cut_note(caption, words.window))
        inputs = {"input_ids": paddle.to_tensor(ids)}
        if name in self._masked:
            inputs["attention_mask"] = paddle.to_tensor(attention_mask(ids, words.end))
        return inputs
