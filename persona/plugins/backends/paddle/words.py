"""A token embedding with room for new words."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn
from paddle.nn import functional


class GrownEmbedding(nn.Layer):
    """A token embedding [vocabulary, dim] with new rows behind it: the old ones stay frozen and are never copied."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base
        self.added = nn.ParameterList()  # one [vectors, dim] per placeholder, in the order of their ids

    @property
    def width(self) -> int:
        """Length of a row."""
        return int(self.base.weight.shape[1])

    def forward(self, ids: Any) -> Any:
        """[…] int64 to […, dim]."""
        count = int(self.base.weight.shape[0])
        rows = self.base(ids.clip(max=count - 1))
        if not len(self.added):
            return rows
        new = functional.embedding((ids - count).clip(min=0), paddle.concat(list(self.added)))
        return paddle.where((ids >= count).unsqueeze(-1), new, rows)
