"""One opened base on one device, perhaps with a plan's trainable weights attached."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from persona.core.adapters.entry import Adapter, Checkpoint
from persona.core.host.contracts import Runtime, SampleRequest
from persona.core.host.errors import UsageError
from persona.core.sampling.loop import sample_latents
from persona.core.training.base import Base
from persona.core.training.batch import Batch
from persona.core.training.noise import dropout_seed
from persona.core.training.plan import TrainingPlan
from persona.plugins.backends.mindspore.adapters import OpenedComponents
from persona.plugins.backends.mindspore.cells import recompute
from persona.plugins.backends.mindspore.device import DTYPES, capabilities
from persona.plugins.backends.mindspore.ema import Averages
from persona.plugins.backends.mindspore.loading import load_component
from persona.plugins.backends.mindspore.lowrank import Dropout
from persona.plugins.backends.mindspore.optimizer import Optimizer
from persona.plugins.backends.mindspore.pictures import Autoencoder
from persona.plugins.backends.mindspore.processes import MindSporeProcesses, device_of
from persona.plugins.backends.mindspore.product import array_of, product_of
from persona.plugins.backends.mindspore.text import TextEncoders
from persona.plugins.backends.mindspore.trainables import Group, attach, keep_short
from persona.plugins.backends.shared.memory import memory_errors
from persona.plugins.backends.shared.merging import merge
from persona.plugins.backends.shared.states import check_state
from persona.plugins.backends.shared.words import CoreTokenizer, Words

Array = np.ndarray[Any, np.dtype[Any]]


class MindSporeSession:
    """`persona.core.host.contracts.Session` on MindSpore. `notes` collects what the user should know."""

    def __init__(self, base: Base, plan: TrainingPlan | None, runtime: Runtime) -> None:
        self.base, self.plan = base, plan
        self.notes: list[str] = []
        self._processes = runtime.processes if isinstance(runtime.processes, MindSporeProcesses) else None
        self.device = device_of(runtime.device, self._processes is not None)
        self.precision = plan.precision if plan else runtime.precision
        self._refuse_what_cannot_be(plan)
        if self._processes is None:  # they have met on it, and MindSpore lets nobody choose again then
            self.device.make_current()
        with memory_errors():
            self._components = {name: self._load(name) for name in (base.denoiser, "vae", *base.text_encoders)}
            self._read_words()
            self._autoencoder = Autoencoder(self._components["vae"])
            self._attach(plan)
        self._trained = sorted(plan.trained_components()) if plan else []
        if plan is not None and (runtime.gradient_checkpointing or plan.gradient_checkpointing):
            for name in {base.denoiser, *self._trained}:
                recompute(self._components[name])
        self._is_training = self._has_begun = False

    # -- what the core asks for ------------------------------------------------------------------------------------

    def encode_pictures(self, pictures: Array) -> tuple[Array, Array]:
        """[n, 3, h, w] float32 in −1..1 to latent mean and log-variance, each [n, c, h/f, w/f] float32, unscaled."""
        with memory_errors():
            return self._autoencoder.encode(pictures)

    def encode_text(self, captions: Sequence[str]) -> dict[str, Array]:
        """hidden_states [n, window, dim] float32, and pooled [n, dim] for SDXL."""
        with memory_errors():
            self._set_training(False)
            return {key: array_of(value) for key, value in self._text(captions).items()}

    def accumulate(self, batch: Batch) -> Array:
        """Forward and backward of one micro-batch; the unweighted loss per sample, [n] float32, which may not be
        finite. Raises TrainingError when memory runs out."""
        self._set_training(True)
        self._begin_update()
        self._dropout.begin_micro_batch()
        weights = Tensor(np.asarray(batch.w, np.float32)) * self._optimizer.loss_scale.value

        def scaled_loss() -> tuple[Tensor, Tensor]:
            losses = self._losses(batch)
            return (weights * losses).sum(), losses

        with memory_errors():
            values = list(self._optimizer.moving.values())
            (_, losses), gradients = ms.value_and_grad(scaled_loss, None, values, has_aux=True)()
            found = array_of(losses)
            if np.isfinite(found).all():
                self._optimizer.add(gradients)
            else:
                self._optimizer.clear()  # so that nothing can be made of them; the loop stops, and knows the step
        return found

    def evaluate(self, batch: Batch) -> Array:
        """The unweighted loss per sample, [n] float32, without a gradient and without dropout; of the averages, with an
        EMA."""
        with memory_errors(), self._averaged():
            self._set_training(False)
            return array_of(self._losses(batch))

    def update(self, learning_rates: Sequence[float], max_norm: float) -> tuple[float, bool]:
        """One optimizer step; the gradient norm before clipping, and whether it was skipped for an fp16 overflow."""
        self._has_begun = False
        with memory_errors():
            if self._processes is not None:
                shapes = {name: tuple(value.shape) for name, value in self._optimizer.names.items()}
                self._processes.sum_gradients(self._optimizer.gradients, shapes)
            norm, skipped = self._optimizer.update(learning_rates, max_norm)
        for group in self._groups:
            keep_short(group)
        return norm, skipped

    def average(self, decay: float) -> None:
        """average ← decay · average + (1 − decay) · value, for every trained value."""
        assert self._averages is not None
        self._averages.follow(decay)

    def sample(self, request: SampleRequest) -> Array:
        """[n, height, width, 3] uint8. With an EMA, the averages paint."""
        with memory_errors(), self._averaged():
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
            notes += merge(adapter, strength, OpenedComponents(self._components), self._words)
        return notes

    def product(self) -> Adapter | Checkpoint:
        """What was trained (its average, with an EMA), in torch layout."""
        return product_of(self.base, self._plan(), self._groups, self._components, self._value)

    def state(self) -> dict[str, Array]:
        """value/<name>, start/<name> (of deltas from the base's weight), adam_m/<name>, adam_v/<name>, ema/<name>, step
        and loss_scale: names and values that every backend knows."""
        state = {f"value/{name}": array_of(value) for name, value in self._optimizer.names.items()}
        state |= {f"start/{name}": array_of(value) for name, value in self._starts().items()}
        state |= self._optimizer.state()
        if self._averages is not None:
            state |= {f"ema/{name}": array_of(value) for name, value in self._averages.averages.items()}
        return state

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Inverse of `state`. Raises ResumeError naming up to five values that are missing, unknown or of another
        shape; nothing is changed then."""
        values = {name: tuple(value.shape) for name, value in self._optimizer.names.items()}
        wanted = {f"value/{name}": shape for name, shape in values.items()}
        if self._averages is not None:
            wanted |= {f"ema/{name}": shape for name, shape in values.items()}
        wanted |= {f"start/{name}": tuple(value.shape) for name, value in self._starts().items()}
        check_state(state, wanted, values)
        for name, value in self._optimizer.names.items():
            value.set_data(Tensor(np.array(state[f"value/{name}"], np.float32)))
        for name, value in self._starts().items():  # not made again: a decomposition's last bits are the machine's
            value.set_data(Tensor(np.array(state[f"start/{name}"], np.float32)))
        if self._averages is not None:
            self._averages.averages = {name: Tensor(np.array(state[f"ema/{name}"], np.float32)) for name in values}
        self._optimizer.load_state(state)
        self._has_begun = False

    def determinism(self) -> str:
        """How alike two runs of one seed are here, in words."""
        if self.device.kind == "cpu":
            return "bit for bit, on the same versions and processor"
        return f"up to rounding: {self.device.kind} kernels add in an order of their own; --device cpu is exact"

    def first_step(self) -> str:
        """What takes long in the first step, for the user."""
        return "compiling" if self.device.kind == "npu" else "first step"

    def peak_memory(self) -> int:
        """The most bytes in use so far: of the device, or of this process on a cpu; 0 where it cannot be asked."""
        return self.device.peak_memory()

    def close(self) -> None:
        """Free the memory; the session cannot be used afterwards. What MindSpore keeps beyond the end of the process
        is told about there, cell by cell, so everything goes now."""
        for name in ("_components", "_text", "_autoencoder", "_groups", "_optimizer", "_averages", "_words"):
            self.__dict__.pop(name, None)
        gc.collect()

    # -- opening ---------------------------------------------------------------------------------------------------

    def _refuse_what_cannot_be(self, plan: TrainingPlan | None) -> None:
        able = capabilities(self.device)
        if not able.get(self.precision, False):
            raise UsageError(f"MindSpore cannot compute in {self.precision} on {self.device.name}.",
                             hint="--precision fp32")  # fmt: skip
        if self.precision != "fp32" and any(part.kind == "weights" for part in (plan.trains if plan else ())):
            raise UsageError("The MindSpore backend trains whole weights in fp32 only.", hint="--precision fp32")

    def _load(self, name: str) -> nn.Cell:
        """A component in the run's precision; the autoencoder in fp32."""
        precision = "fp32" if name == "vae" else self.precision
        return load_component(self.base, name, DTYPES[precision])

    def _read_words(self) -> None:
        self._words = {}
        for name in self.base.text_encoders:
            config = self._components[name].config
            folder = self.base.tokenizers[name.replace("text_encoder", "tokenizer")]
            self._words[name] = Words(CoreTokenizer(folder), config.max_position_embeddings, config.vocab_size)
        encoders = {name: self._components[name] for name in self.base.text_encoders}
        self._text = TextEncoders(encoders, self._words, self._note)
        index = self.base.path / "model_index.json"
        settings = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
        self._empty_prompt_is_zero = bool(settings.get("force_zeros_for_empty_prompt", False))

    def _attach(self, plan: TrainingPlan | None) -> None:
        self._groups: list[Group] = []
        self._averages: Averages | None = None
        if plan is None:
            return
        self._dropout = Dropout()
        self._groups = attach(plan, self._components, self._words, self._dropout)
        for model in self._components.values():
            model.set_train(False)  # the new layers too
        self._optimizer = Optimizer(self._groups, plan.optimizer, self.precision, self._text.unread())
        if plan.ema_decay is not None:
            self._averages = Averages(self._optimizer.names)

    # -- computing -------------------------------------------------------------------------------------------------

    def _losses(self, batch: Batch) -> Tensor:
        """Squared error of the prediction, masked, mean of each sample, [n]."""
        a, s, p, q = (
            np.asarray(values, np.float32).reshape(-1, 1, 1, 1) for values in (batch.a, batch.s, batch.p, batch.q)
        )
        noisy, target = a * batch.latents + s * batch.noise, Tensor(p * batch.latents + q * batch.noise)
        prediction = self._denoise(noisy, batch.timesteps, self._conditioning(batch))
        errors = ms.ops.square(prediction.astype(ms.float32) - target)
        if batch.mask is not None:
            errors = errors * Tensor(np.asarray(batch.mask, np.float32))
        return errors.mean(axis=(1, 2, 3))

    def _denoise(self, noisy: Array, timesteps: Array, given: Mapping[str, Tensor]) -> Tensor:
        """The denoiser's prediction [n, c, h, w]."""
        dtype = DTYPES[self.precision]
        added = None
        if "pooled" in given:
            added = {"text_embeds": given["pooled"].astype(dtype), "time_ids": given["time_ids"]}
        return self._components[self.base.denoiser](
            Tensor(np.asarray(noisy, np.float32)).astype(dtype),
            Tensor(np.asarray(timesteps, np.float32)),
            given["hidden_states"].astype(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def _conditioning(self, batch: Batch) -> dict[str, Tensor]:
        """What the batch conditions on: the cached embeddings, or else its captions through the encoders, with
        gradients where there is something to train in them."""
        if batch.embeddings:
            given = {key: Tensor(np.asarray(value, np.float32)) for key, value in batch.embeddings.items()}
        else:
            given = self._text(batch.captions)
        if batch.time_ids is not None:
            given["time_ids"] = Tensor(np.asarray(batch.time_ids, np.float32))
        return given

    def _predicted(self, noisy: Array, timestep: float, given: Mapping[str, Array]) -> Array:
        """The denoiser's prediction at one timestep, [n, c, h, w] float32."""
        tensors = {key: Tensor(np.asarray(value, np.float32)) for key, value in given.items()}
        return array_of(self._denoise(noisy, np.full(len(noisy), timestep), tensors))

    def _prompt_conditioning(self, prompts: list[str], negative: bool) -> dict[str, Array]:
        given = {key: array_of(value) for key, value in self._text(prompts).items()}
        if negative and self._empty_prompt_is_zero and not any(prompts):
            return {key: np.zeros_like(value) for key, value in given.items()}
        return given

    def _begin_update(self) -> None:
        """Before the first micro-batch of an update: what dropout will draw follows from the plan and the update."""
        if not self._has_begun:
            rank = self._processes.rank if self._processes is not None else 0
            self._dropout.begin(dropout_seed(self._plan().seed, self._optimizer.updates, rank))
            self._has_begun = True

    def _averaged(self) -> Any:
        """Context in which the averages, if there are some, stand in for the values."""
        return self._averages.in_place() if self._averages is not None else nullcontext()

    def _set_training(self, training: bool) -> None:
        """Dropout on or off, where something is trained and in the denoiser."""
        if training and self.plan is None:
            raise UsageError("This session was opened without a plan: there is nothing to train in it.")
        if training != self._is_training:
            for name in {self.base.denoiser, *self._trained}:
                self._components[name].set_train(training)
            self._is_training = training

    def _value(self, name: str) -> Array:
        return array_of(self._averages.averages[name] if self._averages is not None else self._optimizer.names[name])

    def _starts(self) -> dict[str, Tensor]:
        return {name: value for group in self._groups for name, value in group.starts.items()}

    def _plan(self) -> TrainingPlan:
        if self.plan is None:
            raise UsageError("This session was opened without a plan: it trained nothing.")
        return self.plan

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
