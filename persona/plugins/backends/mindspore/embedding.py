"""A token embedding with new rows."""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, nn, ops


class GrownEmbedding(nn.Cell):
    """A token embedding [vocabulary, dim] with new rows behind it: the old ones stay frozen and are never copied."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__(auto_prefix=False)
        self.base = base
        self.added: list[Parameter] = []  # one [vectors, dim] per placeholder, in the order of their ids

    def add(self, rows: np.ndarray) -> Parameter:
        """New rows [vectors, dim] behind those there are."""
        name = f"added_{len(self.added)}"
        parameter = Parameter(Tensor(np.array(rows, np.float32)), name=name, requires_grad=False)
        self.insert_param_to_cell(name, parameter)
        self.added.append(parameter)
        return parameter

    def construct(self, ids: Tensor) -> Tensor:
        """[…] int32 to […, dim]."""
        count = self.base.vocab_size
        rows = self.base(ops.clamp(ids, max=count - 1))
        new = ops.gather(ops.cat(self.added), ops.clamp(ids - count, min=0), 0)
        return ops.where((ids >= count).expand_dims(-1), new.astype(rows.dtype), rows)
