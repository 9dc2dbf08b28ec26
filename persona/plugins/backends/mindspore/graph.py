"""Training steps in a graph: MindSpore compiles the denoiser, instead of starting one operation after the other."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
from mindspore import Tensor, nn

from persona.plugins.backends.mindspore.cells import parameters_of
from persona.plugins.backends.mindspore.dropout import LayerDropout


class Predictor(nn.Cell):
    """A UNet's prediction from tensors alone: of a dict's, a graph would make constants."""

    def __init__(self, model: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        hidden_states: Tensor,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """[n, c, h, w], as `noisy`."""
        added = None
        if pooled is not None:
            added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.model(noisy, timesteps, hidden_states, added_cond_kwargs=added, return_dict=False)[0]


def compiled(predict: Predictor) -> Callable[..., Tensor]:
    """The same as a graph, compiled when it is called first, and again for every other shape. Called when everything
    that is trained is in its place."""
    for _, cell in predict.cells_and_names():
        if isinstance(cell, LayerDropout):
            cell.in_graph = True
    for name, parameter in parameters_of(predict):
        parameter.read_by_graph = True
        parameter.name = f"graph.{name}"  # the compiler wants all to differ; what is put around a cell renames its own
    return ms.jit(predict.construct)
