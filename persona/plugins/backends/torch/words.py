"""Transformers' tokenizer, and a token embedding with room for new words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from persona.core.host.errors import BaseModelError


class TransformersTokenizer:
    """`persona.plugins.backends.shared.words.Tokenizer`. Raises BaseModelError for a folder that has none."""

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise BaseModelError(f"{folder} has no CLIP tokenizer: {error}.") from error
        self.begin = int(self._tokenizer.bos_token_id)
        self.end = int(self._tokenizer.eos_token_id)
        self.pad = int(self._tokenizer.pad_token_id)

    def ids(self, text: str) -> list[int]:
        """The ids of `text`, without start and end."""
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
