"""One opened base on one device, perhaps with a plan's trainable weights attached."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import paddle

from persona.core.adapters.entry import Adapter, Checkpoint
from persona.core.host.contracts import Runtime, SampleRequest
from persona.core.host.errors import UsageError
from persona.core.sampling.loop import sample_latents
from persona.core.training.base import Base
from persona.core.training.batch import Batch
from persona.core.training.noise import dropout_seed
from persona.core.training.plan import TrainingPlan
from persona.plugins.backends.paddle.adapters import OpenedPaddleModel
from persona.plugins.backends.paddle.device import capabilities
from persona.plugins.backends.paddle.ema import Averages
from persona.plugins.backends.paddle.layout import Array, Parameter, is_clip
from persona.plugins.backends.paddle.loading import load_component
from persona.plugins.backends.paddle.optimizer import Optimizer
from persona.plugins.backends.paddle.pictures import Autoencoder
from persona.plugins.backends.paddle.processes import PaddleProcesses, device_of
from persona.plugins.backends.paddle.product import product_of
from persona.plugins.backends.paddle.text import TextEncoders
from persona.plugins.backends.paddle.trainables import Group, attach, keep_short
from persona.plugins.backends.shared.memory import memory_errors
from persona.plugins.backends.shared.merging import merge
from persona.plugins.backends.shared.states import check_state
from persona.plugins.backends.shared.words import CoreTokenizer, Words


class PaddleSession:
    """`persona.core.host.contracts.Session` on Paddle. `notes` collects what the user should know."""

    def __init__(self, base: Base, plan: TrainingPlan | None, runtime: Runtime) -> None:
        self.base, self.plan = base, plan
        self.notes: list[str] = []
        self._processes = runtime.processes if isinstance(runtime.processes, PaddleProcesses) else None
        self.device = device_of(runtime.device, self._processes)
        self.precision = plan.precision if plan else runtime.precision
        if not capabilities(self.device).get(self.precision, False):
            raise UsageError(
                f"Paddle on {self.device.name} cannot compute in {self.precision}.", hint="--precision fp32"
            )
        self.device.make_current()
        with memory_errors():
            names = [base.denoiser, "vae", *base.text_encoders]
            self._components: dict[str, Any] = {name: load_component(base, name) for name in names}
            self._read_words()
            self._autoencoder = Autoencoder(self._components["vae"])
            self._attach(plan)
        if runtime.gradient_checkpointing or (plan is not None and plan.gradient_checkpointing):
            self._checkpoint_gradients()
        self._is_training = self._has_begun = False

    # -- what the core asks for ------------------------------------------------------------------------------------

    def encode_pictures(self, pictures: Array) -> tuple[Array, Array]:
        """[n, 3, h, w] float32 in −1..1 to latent mean and log-variance, each [n, c, h/f, w/f] float32, unscaled."""
        with memory_errors():
            return self._autoencoder.encode(pictures)

    @paddle.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, Array]:
        """hidden_states [n, window, dim] float32, and pooled [n, dim] for SDXL."""
        with memory_errors(), self._autocast():
            self._set_training(False)
            return {key: _array(value) for key, value in self._text(captions).items()}

    def accumulate(self, batch: Batch) -> Array:
        """Forward and backward of one micro-batch; the unweighted loss per sample, [n] float32, which may not be
        finite. Raises TrainingError when memory runs out."""
        self._begin_update()
        self._set_training(True)
        with memory_errors():
            losses = self._losses(batch)
            self._optimizer.backward((_tensor(batch.w) * losses).sum())
            values = _array(losses.detach())
        if not np.isfinite(values).all():
            self._optimizer.clear()  # so that nothing can be made of them; the loop stops, and knows the step
        return values

    @paddle.no_grad()
    def evaluate(self, batch: Batch) -> Array:
        """The unweighted loss per sample, [n] float32, without a gradient and without dropout; of the averages, with an
        EMA."""
        with memory_errors(), self._averaged():
            self._set_training(False)
            return _array(self._losses(batch))

    def update(self, learning_rates: Sequence[float], max_norm: float) -> tuple[float, bool]:
        """One optimizer step; the gradient norm before clipping, and whether it was skipped for an fp16 overflow."""
        self._has_begun = False
        with memory_errors():
            if self._processes is not None:
                self._processes.sum_gradients(list(self._optimizer.names.values()))
            norm, skipped = self._optimizer.update(learning_rates, max_norm)
        for group in self._groups:
            keep_short(group)
        return norm, skipped

    def average(self, decay: float) -> None:
        """Move the averages towards the trained values: average ← decay · average + (1 − decay) · value."""
        assert self._averages is not None, "the plan has no ema_decay"
        self._averages.follow(decay)

    @paddle.no_grad()
    def sample(self, request: SampleRequest) -> Array:
        """[n, height, width, 3] uint8. With an EMA, the averages paint."""
        with memory_errors(), self._averaged():
            self._set_training(False)
            parts = [
                self._autoencoder.decode(latents, self.base.latent_factor)
                for latents in sample_latents(self.base, request, self._prompt_conditioning, self._denoise_arrays)
            ]
        return np.concatenate(parts)

    def load_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> list[str]:
        """Add ΔW × strength to the weights and new tokens to the words; notes for the user."""
        notes = []
        for adapter, strength in adapters:
            notes += merge(adapter, strength, OpenedPaddleModel(self._components), self._words)
        return notes

    def product(self) -> Adapter | Checkpoint:
        """What was trained (its average, with an EMA), in torch layout."""
        return product_of(self.base, self._plan(), self._groups, self._components, self._value)

    def state(self) -> dict[str, Array]:
        """value/<name>, start/<name> (of deltas from the base's weight), adam_m/<name>, adam_v/<name>, ema/<name>, step
        and loss_scale: names and values that every backend knows."""
        state = {f"value/{name}": value.read() for name, value in self._optimizer.names.items()}
        state |= {f"start/{name}": value.read() for name, value in self._starts().items()}
        state |= self._optimizer.state()
        if self._averages is not None:
            state |= {f"ema/{name}": self._averages.read(name) for name in self._optimizer.names}
        return state

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Inverse of `state`. Raises ResumeError naming up to five values that are missing, unknown or of another
        shape; nothing is changed then."""
        values = {name: value.shape for name, value in self._optimizer.names.items()}
        wanted = {f"value/{name}": shape for name, shape in values.items()}
        wanted |= {f"start/{name}": value.shape for name, value in self._starts().items()}
        if self._averages is not None:
            wanted |= {f"ema/{name}": shape for name, shape in values.items()}
        check_state(state, wanted, values)
        for name, value in self._optimizer.names.items():
            value.write(state[f"value/{name}"])
            if self._averages is not None:
                self._averages.write(name, state[f"ema/{name}"])
        for name, value in self._starts().items():
            value.write(state[f"start/{name}"])
        self._optimizer.load_state(state)
        self._has_begun = False

    def determinism(self) -> str:
        """How alike two runs of one seed are here, in words."""
        if self.device.kind == "cpu":
            return "bit for bit, on the same versions and processor"
        return f"up to rounding: {self.device.kind} kernels add in an order of their own; --device cpu is exact"

    def peak_memory(self) -> int:
        """The most bytes in use so far: of the device, or of this process on a cpu."""
        return self.device.peak_memory()

    def close(self) -> None:
        """Free the memory; the session cannot be used afterwards."""
        for name in ("_components", "_text", "_autoencoder", "_groups", "_optimizer", "_averages", "_words"):
            self.__dict__.pop(name, None)
        self.device.empty_cache()

    # -- opening ---------------------------------------------------------------------------------------------------

    def _read_words(self) -> None:
        self._words: dict[str, Words] = {}
        for name in self.base.text_encoders:
            config = self.base.components[name]
            tokenizer = CoreTokenizer(self.base.tokenizers[name.replace("text_encoder", "tokenizer")])
            self._words[name] = Words(tokenizer, config.get("max_position_embeddings", 77), config["vocab_size"])
        encoders = {name: self._components[name] for name in self.base.text_encoders}
        self._text = TextEncoders(self.base, encoders, self._words, self._note)
        index = self.base.path / "model_index.json"
        settings = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
        self._empty_prompt_is_zero = bool(settings.get("force_zeros_for_empty_prompt", False))

    def _attach(self, plan: TrainingPlan | None) -> None:
        self._groups: list[Group] = []
        self._averages: Averages | None = None
        if plan is None:
            return
        self._groups = attach(plan, self._components, self._words)
        for model in self._components.values():
            model.eval()  # the new layers too, which come to life in training mode
        self._optimizer = Optimizer(self._groups, plan.optimizer, self.precision)
        if plan.ema_decay is not None:
            self._averages = Averages(self._optimizer.names)

    def _checkpoint_gradients(self) -> None:
        self._components[self.base.denoiser].enable_gradient_checkpointing()
        for name in self._trained():
            if is_clip(self._components[name]):
                self._components[name].text_model.transformer.enable_recompute = True

    # -- computing -------------------------------------------------------------------------------------------------

    def _losses(self, batch: Batch) -> Any:
        """Squared error of the prediction, masked, mean of each sample, [n]."""
        x0, noise = _tensor(batch.latents), _tensor(batch.noise)
        a, s, p, q = (_tensor(values).reshape([-1, 1, 1, 1]) for values in (batch.a, batch.s, batch.p, batch.q))
        with self._autocast():
            prediction = self._denoise(a * x0 + s * noise, _tensor(batch.timesteps), self._conditioning(batch))
        errors = (prediction.astype("float32") - (p * x0 + q * noise)) ** 2
        return (errors if batch.mask is None else errors * _tensor(batch.mask)).mean(axis=[1, 2, 3])

    def _denoise(self, noisy: Any, timesteps: Any, given: Mapping[str, Any]) -> Any:
        """The denoiser's prediction [n, c, h, w]."""
        added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]} if "pooled" in given else None
        return self._components[self.base.denoiser](
            noisy,
            timesteps,
            encoder_hidden_states=given["hidden_states"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def _denoise_arrays(self, noisy: Array, timestep: float, given: Mapping[str, Array]) -> Array:
        with self._autocast():
            timesteps = paddle.full([len(noisy)], timestep, "float32")
            return _array(self._denoise(_tensor(noisy), timesteps, {key: _tensor(given[key]) for key in given}))

    def _conditioning(self, batch: Batch) -> dict[str, Any]:
        """What the batch conditions on: the cached embeddings, or else its captions through the encoders, with
        gradients where there is something to train in them."""
        if batch.embeddings:
            given = {key: _tensor(value) for key, value in batch.embeddings.items()}
        else:
            given = self._text(batch.captions)
        if batch.time_ids is not None:
            given["time_ids"] = _tensor(batch.time_ids)
        return given

    def _prompt_conditioning(self, prompts: list[str], negative: bool) -> dict[str, Array]:
        given = self.encode_text(prompts)
        if negative and self._empty_prompt_is_zero and not any(prompts):
            return {key: np.zeros_like(value) for key, value in given.items()}
        return given

    def _begin_update(self) -> None:
        """Before the first micro-batch of an update: what dropout will draw follows from the plan and the update."""
        if not self._has_begun:
            rank = self._processes.rank if self._processes is not None else 0
            paddle.seed(dropout_seed(self._plan().seed, self._optimizer.updates, rank))
            self._has_begun = True

    def _set_training(self, training: bool) -> None:
        """Dropout and gradient checkpointing on or off, where something is trained and in the denoiser."""
        if training != self._is_training:
            for name in {self.base.denoiser, *self._trained()}:
                self._components[name].train() if training else self._components[name].eval()
            self._is_training = training

    def _averaged(self) -> Any:
        """Context in which the averages, if there are some, stand in for the values."""
        return self._averages.in_place() if self._averages is not None else nullcontext()

    def _autocast(self) -> Any:
        return self.device.autocast(self.precision)

    def _trained(self) -> list[str]:
        return sorted(self.plan.trained_components()) if self.plan else []

    def _starts(self) -> dict[str, Parameter]:
        return {name: value for group in self._groups for name, value in group.starts.items()}

    def _value(self, name: str) -> Array:
        return self._averages.read(name) if self._averages is not None else self._optimizer.names[name].read()

    def _plan(self) -> TrainingPlan:
        if self.plan is None:
            raise UsageError("This session was opened without a plan: there is nothing to train in it.")
        return self.plan

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _tensor(values: Any) -> Any:
    return paddle.to_tensor(np.ascontiguousarray(values))


def _array(tensor: Any) -> Array:
    values: Array = tensor.astype("float32").numpy()
    return values
