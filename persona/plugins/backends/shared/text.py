"""Captions to what the denoiser is conditioned on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from persona.core.training.base import Base
from persona.plugins.backends.shared.opened import Array
from persona.plugins.backends.shared.words import Words, attention_mask, cut_note


class TextEncoders(ABC):
    """The text encoders of a base, in order, with their words.

    One encoder: its last hidden states, after the final norm (SD1, SD2). Two: the last but one of both, side by side,
    and the second one's projected end-of-text state, "pooled" (SDXL, arXiv 2307.01952 §2.1)."""

    def __init__(
        self, base: Base, encoders: Mapping[str, Any], words: Mapping[str, Words], note: Callable[[str], None]
    ) -> None:
        self.encoders, self._words, self._note = dict(encoders), words, note
        self._masked = {name for name in encoders if base.components[name].get("use_attention_mask")}
        for name, model in self.encoders.items():
            # Published configs say eos_token_id 2, and CLIP then pools at the highest id, which with new words in the
            # prompt is one of those. The tokenizer knows the real one.
            getattr(model, "text_model", model).eos_token_id = words[name].end

    def __call__(self, captions: Sequence[str]) -> dict[str, Any]:
        """hidden_states [n, window, dim] and, with two encoders, pooled [n, dim]."""
        if len(self.encoders) == 1:
            ((name, model),) = self.encoders.items()
            return {"hidden_states": self._last(model, *self._ids(name, captions))}
        hidden, pooled = [], None
        for name, model in self.encoders.items():
            states, projected = self._last_but_one(model, *self._ids(name, captions))
            hidden.append(states)
            pooled = projected  # of the last one, a CLIPTextModelWithProjection
        return {"hidden_states": self._side_by_side(hidden), "pooled": pooled}

    @abstractmethod
    def _last(self, model: Any, ids: Array, mask: Array | None) -> Any:
        """The last hidden states, after the final norm."""

    @abstractmethod
    def _last_but_one(self, model: Any, ids: Array, mask: Array | None) -> tuple[Any, Any]:
        """The hidden states before the last layer, and the projected end-of-text state where there is one."""

    @abstractmethod
    def _side_by_side(self, states: list[Any]) -> Any:
        """[n, window, dim] of each to [n, window, sum of dims]."""

    def _ids(self, name: str, captions: Sequence[str]) -> tuple[Array, Array | None]:
        """Ids and, for an encoder that wants one, the mask of what is no padding; [n, window] int64 each."""
        words = self._words[name]
        ids, cut = words.ids(captions)
        for caption in cut:
            self._note(cut_note(caption, words.window))
        return ids, attention_mask(ids, words.end) if name in self._masked else None
