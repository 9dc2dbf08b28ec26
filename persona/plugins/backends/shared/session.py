"""One opened base on one device, perhaps with a plan's trainable weights attached: what is alike on every framework."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from persona.core.adapters.entry import Adapter, Checkpoint
from persona.core.host.contracts import Runtime, SampleRequest
from persona.core.host.errors import UsageError
from persona.core.sampling.loop import sample_latents
from persona.core.training.base import Base
from persona.core.training.batch import Batch
from persona.core.training.noise import dropout_seed
from persona.core.training.plan import TrainingPlan
from persona.plugins.backends.shared.compiling import compiling
from persona.plugins.backends.shared.memory import memory_errors
from persona.plugins.backends.shared.merging import merge
from persona.plugins.backends.shared.opened import Array, OpenedModel
from persona.plugins.backends.shared.product import product_of
from persona.plugins.backends.shared.states import check_state
from persona.plugins.backends.shared.text import TextEncoders
from persona.plugins.backends.shared.trainables import Group, attach, keep_short
from persona.plugins.backends.shared.words import CoreTokenizer, Tokenizer, Words

KEPT = (
    *("_components", "_model", "_text", "_autoencoder", "_groups", "_values", "_optimizer", "_averages", "_words"),
    *("_predict", "_predict_in_steps"),
)
"""What holds memory of a session."""


class BackendSession(ABC):
    """`persona.core.host.contracts.Session`, but for what only a framework can do: load a component, compute, go one
    step down. `notes` collects what the user should know.

    `device` and `processes` are the framework's own (its device.py and processes.py); an optimizer has `names`,
    `updates`, `update`, `clear`, `state` and `load_state`, averages `follow`, `in_place`, `read` and `write`, an
    autoencoder `encode` and `decode`."""

    framework: str
    """What the user knows it by."""
    compiler_warns = ""
    """How warnings begin that its compiler gives for nothing."""

    def __init__(
        self, base: Base, plan: TrainingPlan | None, runtime: Runtime, device: Any, processes: Any, able: Any
    ) -> None:
        self.base, self.plan, self.device, self._processes = base, plan, device, processes
        self.notes: list[str] = []
        self.precision = plan.precision if plan else runtime.precision
        if not able.get(self.precision, False):
            raise UsageError(f"{self.framework} on {device.name} cannot compute in {self.precision}.",
                             hint="--precision fp32")  # fmt: skip
        self._trained = sorted(plan.trained_components()) if plan else []
        asked = plan.compile if plan is not None else False
        self._is_compiled = self._compiles_by_itself() if asked is None else asked
        with memory_errors():
            self._components = {name: self._load(name) for name in (base.denoiser, "vae", *base.text_encoders)}
            self._model = self._opened()
            self._read_words()
            self._autoencoder = self._opened_autoencoder()
            self._attach(plan)
        if runtime.gradient_checkpointing or (plan is not None and plan.gradient_checkpointing):
            for name in {base.denoiser, *self._trained}:
                self._checkpoint_gradients(name)
        self._is_training = self._has_begun = False

    # -- what the core asks for ------------------------------------------------------------------------------------

    def encode_pictures(self, pictures: Array) -> tuple[Array, Array]:
        """[n, 3, h, w] float32 in −1..1 to latent mean and log-variance, each [n, c, h/f, w/f] float32, unscaled."""
        with memory_errors():
            mean, log_variance = self._autoencoder.encode(pictures)
            return mean, log_variance

    def encode_text(self, captions: Sequence[str]) -> dict[str, Array]:
        """hidden_states [n, window, dim] float32, and pooled [n, dim] for SDXL."""
        with memory_errors(), self._no_gradient(), self._autocast():
            self._set_training(False)
            return {key: self._array(value) for key, value in self._text(captions).items()}

    def accumulate(self, batch: Batch) -> Array:
        """Forward and backward of one micro-batch; the unweighted loss per sample, [n] float32, which may not be
        finite. Raises TrainingError when memory runs out."""
        self._set_training(True)
        if not self._has_begun:  # what dropout will draw follows from the plan and the update
            rank = self._processes.rank if self._processes is not None else 0
            self._seed_dropout(dropout_seed(self._plan().seed, self._optimizer.updates, rank))
            self._has_begun = True
        with self._computing(), compiling(self.framework, self.compiler_warns) if self._is_compiled else nullcontext():
            losses = self._add_gradients(batch)
        if not np.isfinite(losses).all():
            self._optimizer.clear()  # so that nothing can be made of them; the loop stops, and knows the step
        return losses

    def evaluate(self, batch: Batch) -> Array:
        """The unweighted loss per sample, [n] float32, without a gradient and without dropout; of the averages, with an
        EMA."""
        with self._computing(), self._no_gradient(), self._averaged():
            self._set_training(False)
            return self._array(self._losses(batch))

    def update(self, learning_rates: Sequence[float], max_norm: float) -> tuple[float, bool]:
        """One optimizer step; the gradient norm before clipping, and whether it was skipped for an fp16 overflow."""
        self._has_begun = False
        with self._computing():
            if self._processes is not None:
                self._sum_gradients()
            norm, skipped = self._optimizer.update(learning_rates, max_norm)
            for group in self._groups:
                keep_short(group, self._model)
        return norm, skipped

    def average(self, decay: float) -> None:
        """average ← decay · average + (1 − decay) · value, for every trained value."""
        assert self._averages is not None, "the plan has no ema_decay"
        self._averages.follow(decay)

    def sample(self, request: SampleRequest) -> Array:
        """[n, height, width, 3] uint8. With an EMA, the averages paint."""
        with self._computing(), self._no_gradient(), self._averaged():
            self._set_training(False)
            parts = [
                self._autoencoder.decode(latents, self.base.latent_factor)
                for latents in sample_latents(self.base, request, self._prompt_conditioning, self._predicted)
            ]
        return np.concatenate(parts)

    def load_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> list[str]:
        """Add ΔW × strength to the weights and new tokens to the words; notes for the user."""
        notes = []
        for adapter, strength in adapters:
            notes += merge(adapter, strength, self._model, self._words)
        return notes

    def product(self) -> Adapter | Checkpoint:
        """What was trained (its average, with an EMA), in torch layout."""
        return product_of(self.base, self._plan(), self._groups, self._model, self._trained_value)

    def state(self) -> dict[str, Array]:
        """value/<name>, start/<name> (of deltas from the base's weight), adam_m/<name>, adam_v/<name>, ema/<name>, step
        and loss_scale: names and values that every backend knows (but for another optimizer's than AdamW)."""
        state = {f"value/{name}": self._model.read(value) for name, value in self._values.items()}
        state |= {f"start/{name}": self._model.read(value) for name, value in self._starts().items()}
        state |= self._optimizer.state()
        if self._averages is not None:
            state |= {f"ema/{name}": self._averages.read(name) for name in self._values}
        return state

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Inverse of `state`. Raises ResumeError naming up to five values that are missing, unknown or of another
        shape; nothing is changed then."""
        shapes = {name: tuple(value.shape) for name, value in self._values.items()}
        wanted = {f"value/{name}": shape for name, shape in shapes.items()}
        if self._averages is not None:
            wanted |= {f"ema/{name}": shape for name, shape in shapes.items()}
        wanted |= {f"start/{name}": tuple(value.shape) for name, value in self._starts().items()}
        check_state(state, wanted, shapes)
        for name, value in self._values.items():
            self._model.write(value, state[f"value/{name}"])
            if self._averages is not None:
                self._averages.write(name, state[f"ema/{name}"])
        for name, value in self._starts().items():  # not made again: a decomposition's last bits are the machine's
            self._model.write(value, state[f"start/{name}"])
        self._optimizer.load_state(state)
        self._has_begun = False

    def determinism(self) -> str:
        """How alike two runs of one seed are here, in words."""
        if self.device.kind == "cpu":
            return "bit for bit, on the same versions and processor"
        return f"up to rounding: {self.device.kind} kernels add in an order of their own; --device cpu is exact"

    def first_step(self) -> str:
        """What takes long in the first step, for the user."""
        return "compiling" if self._is_compiled else "first step"

    def peak_memory(self) -> int:
        """The most bytes in use so far: of the device, or of this process on a cpu; 0 where it cannot be asked."""
        return int(self.device.peak_memory())

    def close(self) -> None:
        """Free the memory; the session cannot be used afterwards."""
        for name in KEPT:
            self.__dict__.pop(name, None)
        self.device.empty_cache()

    # -- what a framework does -------------------------------------------------------------------------------------

    @abstractmethod
    def _load(self, name: str) -> Any:
        """A component of the base, on the device, frozen, in the dtype it computes in."""

    @abstractmethod
    def _opened(self) -> OpenedModel:
        """The components as the framework's OpenedModel."""

    def _tokenizer(self, name: str) -> Tokenizer:
        """The tokenizer of a text encoder."""
        return CoreTokenizer(self.base.tokenizers[name.replace("text_encoder", "tokenizer")])

    @abstractmethod
    def _opened_text(self, encoders: Mapping[str, Any]) -> TextEncoders:
        """The text encoders with their words."""

    @abstractmethod
    def _opened_autoencoder(self) -> Any:
        """The autoencoder."""

    @abstractmethod
    def _opened_optimizer(self, plan: TrainingPlan) -> Any:
        """An optimizer of what the groups hold."""

    @abstractmethod
    def _opened_averages(self) -> Any:
        """Averages of the trained values."""

    @abstractmethod
    def _checkpoint_gradients(self, name: str) -> None:
        """Let a component keep of its blocks only what goes in."""

    @abstractmethod
    def _switch(self, component: Any, training: bool) -> None:
        """Dropout and gradient checkpointing on or off."""

    @abstractmethod
    def _seed_dropout(self, seed: int) -> None:
        """What dropout draws in this update follows from `seed`."""

    @abstractmethod
    def _add_gradients(self, batch: Batch) -> Array:
        """Add the gradients of Σ w·loss, scaled; the losses [n] float32."""

    @abstractmethod
    def _sum_gradients(self) -> None:
        """Replace the gradients by their sum over all processes."""

    @abstractmethod
    def _denoise(self, noisy: Any, timesteps: Any, given: Mapping[str, Any]) -> Any:
        """The denoiser's prediction [n, c, h, w]."""

    @abstractmethod
    def _in_full(self, tensor: Any) -> Any:
        """In float32."""

    @abstractmethod
    def _tensor(self, array: Any) -> Any:
        """An array on the device."""

    @abstractmethod
    def _array(self, tensor: Any) -> Array:
        """A copy of a tensor, float32."""

    def _spread(self) -> None:  # noqa: B027 - most frameworks have nothing to do
        """Spread what was opened and attached over the processes, where the framework can; groups get new values."""

    def _compiles_by_itself(self) -> bool:
        """Whether the denoiser of training steps is compiled when nobody has said."""
        return False

    def _computing(self) -> AbstractContextManager[None]:
        """Context of what may run out of memory or, with several processes, of one of those."""
        return memory_errors()

    def _no_gradient(self) -> Any:
        """Context in which nothing is kept for gradients."""
        return nullcontext()

    def _autocast(self) -> Any:
        """Context in which the models compute in the run's precision."""
        return nullcontext()

    # -- opening ---------------------------------------------------------------------------------------------------

    def _read_words(self) -> None:
        self._words: dict[str, Words] = {}
        for name in self.base.text_encoders:
            config = self.base.components[name]
            window, vocabulary = config.get("max_position_embeddings", 77), config.get("vocab_size", 49408)
            self._words[name] = Words(self._tokenizer(name), window, vocabulary)
        self._text = self._opened_text({name: self._components[name] for name in self.base.text_encoders})
        index = self.base.path / "model_index.json"
        settings = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
        self._empty_prompt_is_zero = bool(settings.get("force_zeros_for_empty_prompt", False))

    def _attach(self, plan: TrainingPlan | None) -> None:
        self._groups: list[Group] = []
        self._values: dict[str, Any] = {}
        self._averages: Any = None
        if plan is None:
            return
        self._groups = attach(plan, self._model, self._words)
        self._spread()
        self._values = {name: value for group in self._groups for name, value in group.values.items()}
        for component in self._components.values():
            self._switch(component, False)  # the new layers too, which come to life in training mode
        self._optimizer = self._opened_optimizer(plan)
        if plan.ema_decay is not None:
            self._averages = self._opened_averages()

    # -- computing -------------------------------------------------------------------------------------------------

    def _losses(self, batch: Batch) -> Any:
        """Squared error of the prediction, masked, mean of each sample, [n]."""
        a, s, p, q = (
            np.asarray(values, np.float32).reshape(-1, 1, 1, 1) for values in (batch.a, batch.s, batch.p, batch.q)
        )
        noisy, target = a * batch.latents + s * batch.noise, p * batch.latents + q * batch.noise
        with self._autocast():
            prediction = self._denoise(
                self._tensor(noisy), self._tensor(batch.timesteps.astype(np.float32)), self._conditioning(batch)
            )
        apart = self._in_full(prediction) - self._tensor(target)
        errors = apart * apart
        if batch.mask is not None:
            errors = errors * self._tensor(batch.mask)
        return errors.mean(axis=(1, 2, 3))

    def _predicted(self, noisy: Array, timestep: float, given: Mapping[str, Array]) -> Array:
        """The denoiser's prediction at one timestep, [n, c, h, w] float32."""
        tensors = {key: self._tensor(value) for key, value in given.items()}
        timesteps = self._tensor(np.full(len(noisy), timestep, np.float32))
        with self._autocast():
            return self._array(self._denoise(self._tensor(noisy), timesteps, tensors))

    def _conditioning(self, batch: Batch) -> dict[str, Any]:
        """What the batch conditions on: the cached embeddings, or else its captions through the encoders, with
        gradients where there is something to train in them."""
        if batch.embeddings:
            given = {key: self._tensor(value) for key, value in batch.embeddings.items()}
        else:
            given = self._text(batch.captions)
        if batch.time_ids is not None:
            given["time_ids"] = self._tensor(batch.time_ids)
        return given

    def _prompt_conditioning(self, prompts: list[str], negative: bool) -> dict[str, Array]:
        given = self.encode_text(prompts)
        if negative and self._empty_prompt_is_zero and not any(prompts):
            return {key: np.zeros_like(value) for key, value in given.items()}
        return given

    def _set_training(self, training: bool) -> None:
        """Dropout and gradient checkpointing on or off, where something is trained and in the denoiser."""
        if training and self.plan is None:
            raise UsageError("This session was opened without a plan: there is nothing to train in it.")
        if training != self._is_training:
            for name in {self.base.denoiser, *self._trained}:
                self._switch(self._components[name], training)
            self._is_training = training

    def _averaged(self) -> Any:
        """Context in which the averages, if there are some, stand in for the values."""
        return self._averages.in_place() if self._averages is not None else nullcontext()

    def _trained_value(self, name: str) -> Array:
        found: Array = self._averages.read(name) if self._averages is not None else self._model.read(self._values[name])
        return found

    def _starts(self) -> dict[str, Any]:
        return {name: value for group in self._groups for name, value in group.starts.items()}

    def _plan(self) -> TrainingPlan:
        if self.plan is None:
            raise UsageError("This session was opened without a plan: it trained nothing.")
        return self.plan

    def _note(self, text: str) -> None:
        if text and text not in self.notes:
            self.notes.append(text)
