"""Prompts to token ids, with words the tokenizer has never heard of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from persona.core.host.errors import BaseModelError


class Words:
    """A CLIP tokenizer and its new words. A placeholder in a prompt becomes all of its vectors' ids, which go on
    after the vocabulary's; the prompt is cut around placeholders before it is tokenized, so that the tokenizer itself
    stays as it was (added tokens of a CLIP tokenizer behave likewise)."""

    def __init__(self, folder: Path, window: int, vocabulary: int) -> None:
        try:
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise BaseModelError(f"{folder} has no CLIP tokenizer: {error}.") from error
        self.window, self.vocabulary = window, vocabulary
        self._new: dict[str, list[int]] = {}
        self._pattern: re.Pattern[str] | None = None

    @property
    def end(self) -> int:
        """Id of the token that ends a prompt."""
        return int(self._tokenizer.eos_token_id)

    def add(self, placeholder: str, vectors: int) -> None:
        """Make `placeholder` a word of `vectors` ids."""
        first = self.vocabulary + sum(len(ids) for ids in self._new.values())
        self._new[placeholder.lower()] = list(range(first, first + vectors))
        longest_first = sorted(self._new, key=len, reverse=True)
        self._pattern = re.compile("|".join(_as_word(word) for word in longest_first), re.IGNORECASE)

    def knows(self, placeholder: str) -> bool:
        """Whether the placeholder was added."""
        return placeholder.lower() in self._new

    def split(self, text: str) -> list[int]:
        """The ids of a text, without start and end."""
        ids: list[int] = []
        position = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            ids += self._known(text[position : match.start()]) + self._new[match.group().lower()]
            position = match.end()
        return ids + self._known(text[position:])

    def ids(self, prompts: Sequence[str]) -> tuple[Tensor, list[str]]:
        """The ids [n, window] int64 of the prompts with start, end and padding, and the prompts that had to be cut."""
        rows, cut = [], []
        for prompt in prompts:
            ids = self.split(prompt)
            if len(ids) > self.window - 2:
                cut.append(prompt)
            row = [self._tokenizer.bos_token_id, *ids[: self.window - 2], self.end]
            rows.append(row + [self._tokenizer.pad_token_id] * (self.window - len(row)))
        return torch.tensor(rows, dtype=torch.int64), cut

    def _known(self, text: str) -> list[int]:
        if not text.strip():
            return []
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


class GrownEmbedding(nn.Module):
    """A token embedding [vocabulary, dim] with new rows behind it: the old ones stay frozen and are never copied."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base
        self.added = nn.ParameterList()  # one [vectors, dim] per placeholder, in the order of their ids

    def forward(self, ids: Tensor) -> Tensor:
        """[…] int64 to […, dim]."""
        count = self.base.num_embeddings
        rows = self.base(ids.clamp(max=count - 1))
        new = functional.embedding((ids - count).clamp(min=0), torch.cat(list(self.added)))
        return torch.where((ids >= count).unsqueeze(-1), new.to(rows.dtype), rows)


def _as_word(placeholder: str) -> str:
    """A pattern that finds the placeholder, but no "sks" inside "flasks"."""
    before = r"(?<!\w)" if placeholder[0].isalnum() else ""
    after = r"(?!\w)" if placeholder[-1].isalnum() else ""
    return before + re.escape(placeholder) + after
