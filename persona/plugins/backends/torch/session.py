"""One opened base on one device, perhaps with a plan's trainable weights attached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from persona.core.adapters.entry import Adapter, Checkpoint
from persona.core.adapters.tensor import in_memory
from persona.core.host.contracts import Runtime, SampleRequest
from persona.core.training.base import Base
from persona.core.training.batch import Batch
from persona.core.training.plan import TrainingPlan
from persona.plugins.backends.shared.memory import memory_errors
from persona.plugins.backends.shared.opened import Array
from persona.plugins.backends.shared.session import BackendSession
from persona.plugins.backends.torch import compiling
from persona.plugins.backends.torch.attention import substitute_attention
from persona.plugins.backends.torch.device import PRECISIONS, capabilities
from persona.plugins.backends.torch.ema import Averages
from persona.plugins.backends.torch.launch import device_of
from persona.plugins.backends.torch.loading import load_component
from persona.plugins.backends.torch.opened import OpenedModel
from persona.plugins.backends.torch.optimizer import Optimizer
from persona.plugins.backends.torch.parking import Parking
from persona.plugins.backends.torch.pictures import Autoencoder
from persona.plugins.backends.torch.processes import TorchProcesses, peers_noticed
from persona.plugins.backends.torch.sharding import give_back, spread
from persona.plugins.backends.torch.text import TextEncoders
from persona.plugins.backends.torch.words import TransformersTokenizer


class TorchSession(BackendSession):
    """`persona.core.host.contracts.Session` on torch."""

    framework = "torch"
    compiler_warns = "Dynamo detected a call to a `functools.lru_cache`"  # in diffusers, whose cache it looks through
    _model: OpenedModel

    def __init__(self, base: Base, plan: TrainingPlan | None, runtime: Runtime) -> None:
        processes = runtime.processes if isinstance(runtime.processes, TorchProcesses) else None
        device = device_of(runtime.device, processes)
        device.prepare()
        self._sharding = runtime.sharding if processes is not None and plan is not None else None
        if plan is not None and plan.compile:
            compiling.require_compiler(device.kind)
        super().__init__(base, plan, runtime, device, processes, capabilities(device))
        denoiser = self._components[base.denoiser]
        self._predict_in_steps = compiling.compiled(denoiser) if self._is_compiled else denoiser

    @property
    def is_sharded(self) -> bool:
        """Whether the model is spread over the processes of the run, which have to make the same calls then."""
        return self._sharding is not None

    def product(self) -> Adapter | Checkpoint:
        """As `BackendSession.product`; of a model in parts read at once, and for the first process."""
        with self._leaving():
            made = super().product()
            if self.is_sharded and isinstance(made, Checkpoint):
                for tensors in made.components.values():
                    tensors |= {name: in_memory(tensors[name].read()) for name in sorted(tensors)}
            return made

    def state(self) -> dict[str, Array]:
        """As `BackendSession.state`; of a model in parts for the first process."""
        with self._leaving():
            return super().state()

    # -- what waits in main memory comes to the device first ---------------------------------------------------------

    def encode_pictures(self, pictures: Array) -> tuple[Array, Array]:
        """As `BackendSession.encode_pictures`."""
        with memory_errors():
            self._parking.fetch(["vae"])
        return super().encode_pictures(pictures)

    def encode_text(self, captions: Sequence[str]) -> dict[str, Array]:
        """As `BackendSession.encode_text`."""
        with memory_errors():
            self._parking.fetch(self.base.text_encoders)
        return super().encode_text(captions)

    def sample(self, request: SampleRequest) -> Array:
        """As `BackendSession.sample`."""
        with memory_errors():
            self._parking.fetch(["vae", *self.base.text_encoders])
        made = super().sample(request)
        give_back(self._spread_models().values())
        return made

    def evaluate(self, batch: Batch) -> Array:
        """As `BackendSession.evaluate`."""
        losses = super().evaluate(batch)
        give_back(self._spread_models().values())
        return losses

    def _conditioning(self, batch: Batch) -> dict[str, Tensor]:
        used = () if batch.embeddings else self.base.text_encoders
        self._parking.park(keep=used)
        self._parking.fetch(used)
        return super()._conditioning(batch)

    # -- opening ---------------------------------------------------------------------------------------------------

    def _load(self, name: str) -> nn.Module:
        """A component in the run's precision, except that trained weights and, unless in fp16, the autoencoder are
        fp32: bf16 has too few digits for latents that are cached once and used all along."""
        is_trained = any(t.kind == "weights" and t.component == name for t in (self.plan.trains if self.plan else ()))
        precision = "fp32" if is_trained or (name == "vae" and self._vae_in_full()) else self.precision
        is_at_home = self._is_resident(name) and not self.is_sharded  # else it gets there in parts
        home = self.device.name if is_at_home else torch.device("cpu")
        return load_component(self.base, name, PRECISIONS[precision], home)

    def _vae_in_full(self) -> bool:
        return self.precision != "fp16" or bool(self.base.components["vae"].get("force_upcast", False))

    def _is_resident(self, name: str) -> bool:
        return name == self.base.denoiser or name in self._trained

    def _opened(self) -> OpenedModel:
        residents = [name for name in self._components if self._is_resident(name)]
        self._parking = Parking(self._components, self.device.name, residents)
        return OpenedModel(self._components)

    def _tokenizer(self, name: str) -> TransformersTokenizer:
        return TransformersTokenizer(self.base.tokenizers[name.replace("text_encoder", "tokenizer")])

    def _opened_text(self, encoders: Mapping[str, nn.Module]) -> TextEncoders:
        return TextEncoders(self.base, encoders, self._words, self._note)

    def _opened_autoencoder(self) -> Autoencoder:
        def read_again() -> nn.Module:
            model = load_component(self.base, "vae", torch.float32, self.device.name)
            self._components["vae"] = model
            return model

        return Autoencoder(self._components["vae"], read_again, self._note)

    def _attach(self, plan: TrainingPlan | None) -> None:
        super()._attach(plan)
        self._note(substitute_attention(self._components[self.base.denoiser], self.device, self.precision))

    def _spread(self) -> None:
        if self._sharding is None:
            return
        models = self._spread_models()
        places = {id(value): (c, name) for c in models for name, value in self._model.values(c).items()}
        for model in models.values():
            spread(model, self.device.kind, self._processes.count, self._sharding)
        values = {component: self._model.values(component) for component in models}
        for group in self._groups:
            found = ((name, places[id(value)]) for name, value in group.values.items())
            group.values = {name: values[component][place] for name, (component, place) in found}

    def _spread_models(self) -> dict[str, nn.Module]:
        """The components that are in parts."""
        return {
            name: self._components[name] for name in self._components if self.is_sharded and self._is_resident(name)
        }

    def _opened_optimizer(self, plan: TrainingPlan) -> Optimizer:
        optimizer = Optimizer(self._groups, plan.optimizer, self.device, self.precision, self._model.read)
        self._note(optimizer.note)
        return optimizer

    def _opened_averages(self) -> Averages:
        return Averages(self._values, self._model)

    def _checkpoint_gradients(self, name: str) -> None:
        model: Any = self._components[name]
        if name == self.base.denoiser:
            model.enable_gradient_checkpointing()
        else:
            enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.20 on
            (enable or model.gradient_checkpointing_enable)()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with super()._computing(), peers_noticed():
            yield

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        """Context of what leaves the session: of a model in parts, through the first process."""
        self._model.keeps = not self.is_sharded or self._processes.rank == 0
        try:
            with self._computing():
                yield
        finally:
            self._model.keeps = True

    # -- computing -------------------------------------------------------------------------------------------------

    def _switch(self, component: nn.Module, training: bool) -> None:
        component.train(training)

    def _seed_dropout(self, seed: int) -> None:
        torch.manual_seed(seed)

    def _add_gradients(self, batch: Batch) -> Array:
        losses = self._losses(batch)
        self._optimizer.backward((self._tensor(batch.w) * losses).sum())
        return self._array(losses)

    def _sum_gradients(self) -> None:
        if not self.is_sharded:  # else FSDP has done it
            self._processes.sum_gradients(list(self._values.values()))

    def _denoise(self, noisy: Tensor, timesteps: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]} if "pooled" in given else None
        predict = self._predict_in_steps if self._is_training else self._components[self.base.denoiser]
        result: Tensor = predict(
            noisy,
            timesteps,
            encoder_hidden_states=given["hidden_states"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return result

    def _no_gradient(self) -> Any:
        return torch.no_grad()

    def _autocast(self) -> Any:
        return self.device.autocast(self.precision)

    def _in_full(self, tensor: Tensor) -> Tensor:
        return tensor.float()

    def _tensor(self, array: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device.name)

    def _array(self, tensor: Tensor) -> Array:
        values: Array = tensor.detach().float().cpu().numpy().copy()
        return values
