"""One opened base on one device, perhaps with a plan's trainable weights attached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle

from persona.core.host.contracts import Runtime
from persona.core.training.base import Base
from persona.core.training.batch import Batch
from persona.core.training.plan import TrainingPlan
from persona.plugins.backends.paddle.compiling import Predictor, compiled
from persona.plugins.backends.paddle.device import capabilities
from persona.plugins.backends.paddle.ema import Averages
from persona.plugins.backends.paddle.layout import Array, is_clip
from persona.plugins.backends.paddle.loading import load_component
from persona.plugins.backends.paddle.opened import OpenedModel
from persona.plugins.backends.paddle.optimizer import Optimizer
from persona.plugins.backends.paddle.pictures import Autoencoder
from persona.plugins.backends.paddle.processes import PaddleProcesses, device_of
from persona.plugins.backends.paddle.text import TextEncoders
from persona.plugins.backends.shared.session import BackendSession


class PaddleSession(BackendSession):
    """`persona.core.host.contracts.Session` on Paddle."""

    framework = "Paddle"
    compiler_warns = "Tensor do not have 'place' interface"

    def __init__(self, base: Base, plan: TrainingPlan | None, runtime: Runtime) -> None:
        processes = runtime.processes if isinstance(runtime.processes, PaddleProcesses) else None
        device = device_of(runtime.device, processes)
        device.make_current()
        super().__init__(base, plan, runtime, device, processes, capabilities(device))
        self._predict = Predictor(self._components[base.denoiser])
        self._predict_in_steps = compiled(self._predict) if self._is_compiled else self._predict

    # -- opening ---------------------------------------------------------------------------------------------------

    def _load(self, name: str) -> Any:
        return load_component(self.base, name)

    def _opened(self) -> OpenedModel:
        return OpenedModel(self._components)

    def _opened_text(self, encoders: Mapping[str, Any]) -> TextEncoders:
        return TextEncoders(self.base, encoders, self._words, self._note)

    def _opened_autoencoder(self) -> Autoencoder:
        return Autoencoder(self._components["vae"])

    def _opened_optimizer(self, plan: TrainingPlan) -> Optimizer:
        return Optimizer(self._groups, plan.optimizer, self.precision)

    def _opened_averages(self) -> Averages:
        return Averages(self._values)

    def _checkpoint_gradients(self, name: str) -> None:
        model = self._components[name]
        if is_clip(model):
            model.text_model.transformer.enable_recompute = True
        else:
            model.enable_gradient_checkpointing()

    # -- computing -------------------------------------------------------------------------------------------------

    def _switch(self, component: Any, training: bool) -> None:
        component.train() if training else component.eval()

    def _seed_dropout(self, seed: int) -> None:
        paddle.seed(seed)

    def _add_gradients(self, batch: Batch) -> Array:
        losses = self._losses(batch)
        self._optimizer.backward((self._tensor(batch.w) * losses).sum())
        return self._array(losses.detach())

    def _sum_gradients(self) -> None:
        self._processes.sum_gradients(list(self._values.values()))

    def _denoise(self, noisy: Any, timesteps: Any, given: Mapping[str, Any]) -> Any:
        added = (given["pooled"], given["time_ids"]) if "pooled" in given else ()
        predict = self._predict_in_steps if self._is_training else self._predict
        return predict(noisy, timesteps, given["hidden_states"], *added)

    def _no_gradient(self) -> Any:
        return paddle.no_grad()

    def _autocast(self) -> Any:
        return self.device.autocast(self.precision)

    def _in_full(self, tensor: Any) -> Any:
        return tensor.astype("float32")

    def _tensor(self, array: Any) -> Any:
        return paddle.to_tensor(np.ascontiguousarray(array))

    def _array(self, tensor: Any) -> Array:
        values: Array = tensor.astype("float32").numpy()
        return values
