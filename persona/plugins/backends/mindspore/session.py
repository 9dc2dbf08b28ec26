"""One opened base on one device, perhaps with a plan's trainable weights attached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from persona.core.host.contracts import Runtime
from persona.core.host.errors import UsageError
from persona.core.training.base import Base
from persona.core.training.batch import Batch
from persona.core.training.plan import TrainingPlan
from persona.plugins.backends.mindspore.cells import Array, array_of, recompute
from persona.plugins.backends.mindspore.device import DTYPES, capabilities
from persona.plugins.backends.mindspore.ema import Averages
from persona.plugins.backends.mindspore.gradients import forgotten_on_error
from persona.plugins.backends.mindspore.graph import Predictor, compiled
from persona.plugins.backends.mindspore.loading import load_component
from persona.plugins.backends.mindspore.opened import OpenedModel
from persona.plugins.backends.mindspore.optimizer import Optimizer
from persona.plugins.backends.mindspore.pictures import Autoencoder
from persona.plugins.backends.mindspore.processes import MindSporeProcesses, device_of
from persona.plugins.backends.mindspore.text import TextEncoders
from persona.plugins.backends.shared.session import BackendSession


class MindSporeSession(BackendSession):
    """`persona.core.host.contracts.Session` on MindSpore."""

    framework = "MindSpore"

    def __init__(self, base: Base, plan: TrainingPlan | None, runtime: Runtime) -> None:
        processes = runtime.processes if isinstance(runtime.processes, MindSporeProcesses) else None
        device = device_of(runtime.device, processes is not None)
        if plan is not None and plan.precision != "fp32" and any(part.kind == "weights" for part in plan.trains):
            raise UsageError("The MindSpore backend trains whole weights in fp32 only.", hint="--precision fp32")
        if processes is None:  # they have met on it, and MindSpore lets nobody choose again then
            device.make_current()
        super().__init__(base, plan, runtime, device, processes, capabilities(device))
        self._predict = Predictor(self._components[base.denoiser])
        self._predict_in_steps = compiled(self._predict) if self._is_compiled else self._predict

    def first_step(self) -> str:
        """What takes long in the first step, for the user."""
        return "compiling" if self.device.kind == "npu" else super().first_step()  # there, operators are anyway

    # -- opening ---------------------------------------------------------------------------------------------------

    def _load(self, name: str) -> nn.Cell:
        """A component in the run's precision; the autoencoder in fp32."""
        return load_component(self.base, name, DTYPES["fp32" if name == "vae" else self.precision])

    def _opened(self) -> OpenedModel:
        opened = OpenedModel(self._components)
        self._dropout = opened.dropout
        return opened

    def _opened_text(self, encoders: Mapping[str, nn.Cell]) -> TextEncoders:
        return TextEncoders(self.base, encoders, self._words, self._note)

    def _opened_autoencoder(self) -> Autoencoder:
        return Autoencoder(self._components["vae"])

    def _opened_optimizer(self, plan: TrainingPlan) -> Optimizer:
        assert isinstance(self._text, TextEncoders)
        unread = self._text.unread()
        return Optimizer(self._groups, plan.optimizer, self.precision, unread)

    def _opened_averages(self) -> Averages:
        return Averages(self._values)

    def _compiles_by_itself(self) -> bool:
        return bool(self.device.kind == "npu")

    def _checkpoint_gradients(self, name: str) -> None:
        recompute(self._components[name])

    # -- computing -------------------------------------------------------------------------------------------------

    def _switch(self, component: nn.Cell, training: bool) -> None:
        component.set_train(training)

    def _seed_dropout(self, seed: int) -> None:
        self._dropout.begin(seed)

    def _add_gradients(self, batch: Batch) -> Array:
        self._dropout.begin_micro_batch()
        weights = self._tensor(batch.w) * self._optimizer.loss_scale.value

        def scaled_loss() -> tuple[Tensor, Tensor]:
            losses = self._losses(batch)
            return (weights * losses).sum(), losses

        values = list(self._optimizer.moving.values())
        with forgotten_on_error():
            (_, losses), gradients = ms.value_and_grad(scaled_loss, None, values, has_aux=True)()
        found = array_of(losses)
        if np.isfinite(found).all():
            self._optimizer.add(gradients)
        return found

    def _sum_gradients(self) -> None:
        shapes = {name: tuple(value.shape) for name, value in self._values.items()}
        self._processes.sum_gradients(self._optimizer.gradients, shapes)

    def _denoise(self, noisy: Tensor, timesteps: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        dtype = DTYPES[self.precision]
        added = (given["pooled"].astype(dtype), given["time_ids"]) if "pooled" in given else ()
        predict = self._predict_in_steps if self._is_training else self._predict
        return predict(noisy.astype(dtype), timesteps, given["hidden_states"].astype(dtype), *added)

    def _in_full(self, tensor: Tensor) -> Tensor:
        return tensor.astype(ms.float32)

    def _tensor(self, array: Any) -> Tensor:
        return Tensor(np.asarray(array, np.float32))

    def _array(self, tensor: Tensor) -> Array:
        return array_of(tensor)
