"""Training steps with the denoiser as a static graph (`paddle.jit.to_static`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle


class Predictor(paddle.nn.Layer):
    """A UNet's prediction from tensors alone, as a graph is called with."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, noisy: Any, timesteps: Any, hidden_states: Any, pooled: Any = None, time_ids: Any = None) -> Any:
        """[n, c, h, w], as `noisy`."""
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
        return self.model(
            noisy, timesteps, encoder_hidden_states=hidden_states, added_cond_kwargs=added, return_dict=False
        )[0]


def compiled(predict: Predictor) -> Callable[..., Any]:
    """The same as a static graph, made when it is called first, and again for every other shape. Whole
    (`full_graph`): what cannot be in it is an error, and does not run outside of it unseen."""
    graph: Callable[..., Any] = paddle.jit.to_static(predict.forward, full_graph=True, backend=None)
    return graph
