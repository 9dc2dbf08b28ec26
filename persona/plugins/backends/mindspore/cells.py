"""Finding, replacing and naming what is inside a mindone model, in the names torch and diffusers use.

mindone keeps diffusers' and transformers' module paths. Of the parameters, those of MindSpore's own norms and
embeddings have other last names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

Array = np.ndarray[Any, np.dtype[Any]]
_TORCH_NAMES = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}


def parameters_of(model: nn.Cell) -> Iterator[tuple[str, Parameter]]:
    """(torch's name, parameter) of everything the model keeps, in its order."""
    for path, cell in model.cells_and_names():
        renamed = isinstance(cell, (nn.LayerNorm, nn.GroupNorm, nn.Embedding))
        for own, parameter in cell._params.items():
            last = _TORCH_NAMES.get(own, own) if renamed else own
            yield (f"{path}.{last}" if path else last), parameter


def array_of(tensor: Tensor) -> Array:
    """A copy, float32. (On a cpu `asnumpy` alone gives the tensor's own memory.)"""
    values: Array = tensor.astype(ms.float32).asnumpy().copy()
    return values


def write(parameter: Parameter, values: Array) -> None:
    """New values for a parameter. One that a graph reads keeps its memory, because the graph goes on reading there:
    after `set_data`, which takes that of the new tensor, it reads what was freed (seen with MindSpore 2.7.0)."""
    new = Tensor(values).astype(parameter.dtype)
    if getattr(parameter, "read_by_graph", False):
        ops.assign(parameter, new)
    else:
        parameter.set_data(new)


def find(model: nn.Cell, path: str) -> nn.Cell | None:
    """The cell at a dotted path, or None."""
    cell: nn.Cell | None = model
    for name in path.split("."):
        cell = cell._cells.get(name) if cell is not None else None
    return cell


def replace(model: nn.Cell, path: str, cell: nn.Cell) -> None:
    """Put `cell` at a path where there is one."""
    parent_path, _, last = path.rpartition(".")
    parent = find(model, parent_path) if parent_path else model
    assert parent is not None
    if isinstance(parent, (nn.CellList, nn.SequentialCell)):
        parent[int(last)] = cell  # a SequentialCell runs a list of its own, which this keeps in step
    else:
        setattr(parent, last, cell)


RECOMPUTED = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
"""Classes of cells whose inner values are computed again for the gradient, with gradient checkpointing."""


def recompute(model: nn.Cell) -> None:
    """Keep of each block only what goes in. Called when everything that is trained is in its place: MindSpore looks for
    that once."""
    for _, cell in model.cells_and_names():
        if type(cell).__name__ in RECOMPUTED:
            cell.recompute()


def weight_of(cell: nn.Cell | None) -> Parameter | None:
    """What torch calls the cell's `weight`."""
    return _own(cell, "weight", "gamma", "embedding_table")


def bias_of(cell: nn.Cell | None) -> Parameter | None:
    """What torch calls the cell's `bias`."""
    return _own(cell, "bias", "beta")


def _own(cell: nn.Cell | None, *names: str) -> Parameter | None:
    found = cell._params if cell is not None else {}
    return next((found[name] for name in names if found.get(name) is not None), None)
