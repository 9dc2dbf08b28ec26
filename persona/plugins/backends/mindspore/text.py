"""Captions to what the denoiser is conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from mindspore import Tensor, nn, ops

from persona.plugins.backends.shared.words import Words, attention_mask, cut_note


class TextEncoders:
    """The text encoders of a base, in order, with their words.

    One encoder: its last hidden states, after the final norm (SD1, SD2). Two: the last but one of both, side by side,
    and the second one's projected end-of-text state, "pooled" (SDXL, arXiv 2307.01952 §2.1)."""

    def __init__(
        self, encoders: Mapping[str, nn.Cell], words: Mapping[str, Words], note: Callable[[str], None]
    ) -> None:
        self.encoders, self.words, self._note = dict(encoders), dict(words), note
        for name, model in self.encoders.items():
            # Published configs say eos_token_id 2, and CLIP then pools at the highest id, which with new words in the
            # prompt is one of those. The tokenizer knows the real one.
            model.text_model.eos_token_id = self.words[name].end

    def unread(self) -> tuple[str, ...]:
        """How the names of weights begin that nothing depends on: of the first of two encoders, which is read before
        its last layer, that layer and the norm behind it. MindSpore gives them gradients of zero, torch none."""
        *early, _ = self.encoders.items()
        return tuple(
            f"{name}.text_model.{part}."
            for name, model in early
            for part in (f"encoder.layers.{model.config.num_hidden_layers - 1}", "final_layer_norm")
        )

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """hidden_states [n, window, dim] and, with two encoders, pooled [n, dim]."""
        if len(self.encoders) == 1:
            ((name, model),) = self.encoders.items()
            return {"hidden_states": model(**self._inputs(name, captions))[0]}
        hidden, pooled = [], None
        for name, model in self.encoders.items():
            # text_embeds (or last states), last (or pooled) states, states after every layer
            output = model(**self._inputs(name, captions), output_hidden_states=True)
            hidden.append(output[2][-2])
            pooled = output[0]  # text_embeds of the last, a CLIPTextModelWithProjection
        assert pooled is not None
        return {"hidden_states": ops.cat(hidden, axis=-1), "pooled": pooled}

    def _inputs(self, name: str, captions: Sequence[str]) -> dict[str, Tensor]:
        model, words = self.encoders[name], self.words[name]
        ids, cut = words.ids(captions)
        for caption in cut:
            self._note(cut_note(caption, words.window))
        inputs = {"input_ids": Tensor(ids.astype(np.int32))}
        if getattr(model.config, "use_attention_mask", False):
            inputs["attention_mask"] = Tensor(attention_mask(ids, words.end).astype(np.int32))
        return inputs
