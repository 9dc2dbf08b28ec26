"""One opened base on one device, perhaps with a plan's trainable weights attached."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from persona.core.adapters.entry import Adapter, Checkpoint
from persona.core.host.contracts import Runtime, SampleRequest
from persona.core.host.errors import UsageError
from persona.core.sampling.loop import sample_latents
from persona.core.training.base import Base
from persona.core.training.batch import Batch
from persona.core.training.noise import dropout_seed
from persona.core.training.plan import TrainingPlan
from persona.plugins.backends.shared.memory import memory_errors
from persona.plugins.backends.shared.merging import merge
from persona.plugins.backends.shared.states import check_state
from persona.plugins.backends.shared.words import Words
from persona.plugins.backends.torch.adapters import OpenedTorchModel
from persona.plugins.backends.torch.attention import substitute_attention
from persona.plugins.backends.torch.device import PRECISIONS, capabilities
from persona.plugins.backends.torch.ema import Averages
from persona.plugins.backends.torch.launch import device_of
from persona.plugins.backends.torch.loading import load_component
from persona.plugins.backends.torch.optimizer import Optimizer
from persona.plugins.backends.torch.parking import Parking
from persona.plugins.backends.torch.pictures import Autoencoder
from persona.plugins.backends.torch.processes import TorchProcesses
from persona.plugins.backends.torch.product import product_of
from persona.plugins.backends.torch.text import TextEncoders
from persona.plugins.backends.torch.trainables import Group, attach, keep_short
from persona.plugins.backends.torch.words import TransformersTokenizer

Array = np.ndarray[Any, np.dtype[Any]]


class TorchSession:
    """`persona.core.host.contracts.Session` on torch. `notes` collects what the user should know."""

    def __init__(self, base: Base, plan: TrainingPlan | None, runtime: Runtime) -> None:
        self.base, self.plan = base, plan
        self.notes: list[str] = []
        self._processes = runtime.processes if isinstance(runtime.processes, TorchProcesses) else None
        self.device = device_of(runtime.device, self._processes)
        self.device.prepare()
        self.precision = plan.precision if plan else runtime.precision
        if not capabilities(self.device).get(self.precision, False):
            raise UsageError(f"{self.device.name} cannot compute in {self.precision}.", hint="--precision fp32")
        with memory_errors():
            self._components = {name: self._load(name) for name in self._wanted()}
            residents = [name for name in self._components if self._is_resident(name)]
            self._parking = Parking(self._components, self.device.name, residents)
            self._read_words()
            self._read_autoencoder()
            self._attach(plan)
            self._note(substitute_attention(self._components[base.denoiser], self.device, self.precision))
        if runtime.gradient_checkpointing or (plan is not None and plan.gradient_checkpointing):
            self._checkpoint_gradients()
        self._trained = sorted(plan.trained_components()) if plan else []
        self._is_training = self._has_begun = False

    # -- what the core asks for ------------------------------------------------------------------------------------

    def encode_pictures(self, pictures: Array) -> tuple[Array, Array]:
        """[n, 3, h, w] float32 in −1..1 to latent mean and log-variance, each [n, c, h/f, w/f] float32, unscaled."""
        with memory_errors():
            self._parking.fetch(["vae"])
            return self._autoencoder.encode(pictures)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, Array]:
        """hidden_states [n, window, dim] float32, and pooled [n, dim] for SDXL."""
        with memory_errors(), self._autocast():
            self._set_training(False)
            self._parking.fetch(self.base.text_encoders)
            return {key: value.float().cpu().numpy() for key, value in self._text(captions).items()}

    def accumulate(self, batch: Batch) -> Array:
        """Forward and backward of one micro-batch; the unweighted loss per sample, [n] float32, which may not be
        finite. Raises TrainingError when memory runs out."""
        self._set_training(True)
        self._begin_update()
        with memory_errors():
            losses = self._losses(batch)
            self._optimizer.backward((self._tensor(batch.w) * losses).sum())
            values: Array = losses.detach().cpu().numpy()
        if not np.isfinite(values).all():
            self._optimizer.clear()  # so that nothing can be made of them; the loop stops, and knows the step
        return values

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Array:
        """The unweighted loss per sample, [n] float32, without a gradient and without dropout; of the averages, with an
        EMA."""
        with memory_errors(), self._averaged():
            self._set_training(False)
            values: Array = self._losses(batch).cpu().numpy()
        return values

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

    @torch.no_grad()
    def sample(self, request: SampleRequest) -> Array:
        """[n, height, width, 3] uint8. With an EMA, the averages paint."""
        with memory_errors(), self._averaged():
            self._set_training(False)
            self._parking.fetch(["vae", *self.base.text_encoders])
            parts = [
                self._autoencoder.decode(latents, self.base.latent_factor)
                for latents in sample_latents(self.base, request, self._prompt_conditioning, self._denoise_arrays)
            ]
        return np.concatenate(parts)

    def load_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> list[str]:
        """Add ΔW × strength to the weights and new tokens to the words; notes for the user."""
        notes = []
        for adapter, strength in adapters:
            notes += merge(adapter, strength, OpenedTorchModel(self._components), self._words)
        return notes

    def product(self) -> Adapter | Checkpoint:
        """What was trained (its average, with an EMA), in torch layout."""
        return product_of(self.base, self._plan(), self._groups, self._components, self._value)

    def state(self) -> dict[str, Array]:
        """value/<name>, start/<name> (of deltas from the base's weight), adam_m/<name>, adam_v/<name>, ema/<name>, step
        and loss_scale: names and values that every backend knows, but for another optimizer's than AdamW."""
        state = {f"value/{name}": _copy(value) for name, value in self._optimizer.names.items()}
        state |= {f"start/{name}": _copy(value) for name, value in self._starts().items()}
        state |= self._optimizer.state()
        if self._averages is not None:
            state |= {f"ema/{name}": _copy(value) for name, value in self._averages.averages.items()}
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
        with torch.no_grad():
            for name, value in self._optimizer.names.items():
                value.copy_(torch.from_numpy(np.array(state[f"value/{name}"])))
            for name, start in self._starts().items():  # not made again: a decomposition's last bits are the machine's
                start.copy_(torch.from_numpy(np.array(state[f"start/{name}"])))
            for name, average in self._averages.averages.items() if self._averages is not None else ():
                average.copy_(torch.from_numpy(np.array(state[f"ema/{name}"])))
        self._optimizer.load_state(state)
        self._has_begun = False

    def determinism(self) -> str:
        """How alike two runs of one seed are here, in words."""
        if self.device.kind == "cpu":
            return "bit for bit, on the same versions and processor"
        return f"up to rounding: {self.device.kind} kernels add in an order of their own; --device cpu is exact"

    def peak_memory(self) -> int:
        """The most bytes in use so far: of the device, or of this process on a cpu; 0 where it cannot be asked."""
        return self.device.peak_memory()

    def close(self) -> None:
        """Free the memory; the session cannot be used afterwards."""
        for name in ("_components", "_text", "_autoencoder", "_groups", "_optimizer", "_averages", "_words"):
            self.__dict__.pop(name, None)
        self.device.empty_cache()

    # -- opening ---------------------------------------------------------------------------------------------------

    def _wanted(self) -> list[str]:
        return [self.base.denoiser, "vae", *self.base.text_encoders]

    def _load(self, name: str) -> nn.Module:
        """A component in the run's precision, except that trained weights and, unless in fp16, the autoencoder are
        fp32: bf16 has too few digits for latents that are cached once and used all along."""
        is_trained = any(t.kind == "weights" and t.component == name for t in (self.plan.trains if self.plan else ()))
        precision = "fp32" if is_trained or (name == "vae" and self._vae_in_full()) else self.precision
        home = self.device.name if self._is_resident(name) else torch.device("cpu")
        return load_component(self.base, name, PRECISIONS[precision], home)

    def _vae_in_full(self) -> bool:
        return self.precision != "fp16" or bool(self.base.components["vae"].get("force_upcast", False))

    def _is_resident(self, name: str) -> bool:
        return name == self.base.denoiser or self._is_trained(name)

    def _is_trained(self, name: str) -> bool:
        return self.plan is not None and name in self.plan.trained_components()

    def _read_words(self) -> None:
        self._words: dict[str, Words] = {}
        for name in self.base.text_encoders:
            config: Any = self._components[name].config
            folder = self.base.tokenizers[name.replace("text_encoder", "tokenizer")]
            tokenizer = TransformersTokenizer(folder)
            self._words[name] = Words(tokenizer, config.max_position_embeddings, config.vocab_size)
        encoders = {name: self._components[name] for name in self.base.text_encoders}
        self._text = TextEncoders(encoders, self._words, self._note)
        index = self.base.path / "model_index.json"
        settings = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
        self._empty_prompt_is_zero = bool(settings.get("force_zeros_for_empty_prompt", False))

    def _read_autoencoder(self) -> None:
        def read_again() -> nn.Module:
            self._components["vae"] = load_component(self.base, "vae", torch.float32, self.device.name)
            return self._components["vae"]

        self._autoencoder = Autoencoder(self._components["vae"], read_again, self._note)

    def _attach(self, plan: TrainingPlan | None) -> None:
        self._groups: list[Group] = []
        self._averages: Averages | None = None
        if plan is None:
            return
        self._groups = attach(plan, self._components, self._words)
        for model in self._components.values():
            model.eval()  # the new layers too, which come to life in training mode
        self._optimizer = Optimizer(
            [group.rate_factors() for group in self._groups], plan.optimizer, self.device, self.precision
        )
        if plan.ema_decay is not None:
            self._averages = Averages(self._optimizer.names)
        self._note(self._optimizer.note)

    def _checkpoint_gradients(self) -> None:
        denoiser: Any = self._components[self.base.denoiser]
        denoiser.enable_gradient_checkpointing()
        for name in self.base.text_encoders:
            if self._is_trained(name):
                encoder: Any = self._components[name]
                enable = getattr(encoder, "activation_checkpointing_enable", None)  # its name from transformers 5.20 on
                (enable or encoder.gradient_checkpointing_enable)()

    # -- computing -------------------------------------------------------------------------------------------------

    def _losses(self, batch: Batch) -> Tensor:
        """Squared error of the prediction, masked, mean of each sample, [n]."""
        x0, noise, mask = self._tensor(batch.latents), self._tensor(batch.noise), self._tensor(batch.mask)
        a, s, p, q = (self._tensor(values) for values in (batch.a, batch.s, batch.p, batch.q))
        noisy = _per_sample(a) * x0 + _per_sample(s) * noise
        target = _per_sample(p) * x0 + _per_sample(q) * noise
        with self._autocast():
            prediction = self._denoise(noisy, self._tensor(batch.timesteps), self._conditioning(batch))
        errors = (prediction.float() - target) ** 2
        losses: Tensor = (errors if mask is None else errors * mask).mean(dim=(1, 2, 3))
        return losses

    def _begin_update(self) -> None:
        """Before the first micro-batch of an update: what dropout will draw follows from the plan and the update."""
        if not self._has_begun:
            rank = self._processes.rank if self._processes is not None else 0
            torch.manual_seed(dropout_seed(self._plan().seed, self._optimizer.updates, rank))
            self._has_begun = True

    def _averaged(self) -> Any:
        """Context in which the averages, if there are some, stand in for the values."""
        return self._averages.in_place() if self._averages is not None else nullcontext()

    def _denoise(self, noisy: Tensor, timesteps: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The denoiser's prediction [n, c, h, w]."""
        added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]} if "pooled" in given else None
        result: Tensor = self._components[self.base.denoiser](
            noisy,
            timesteps,
            encoder_hidden_states=given["hidden_states"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return result

    def _denoise_arrays(self, noisy: Array, timestep: float, given: Mapping[str, Array]) -> Array:
        tensors = {key: self._tensor(value) for key, value in given.items()}
        timesteps = torch.full((len(noisy),), timestep, dtype=torch.float32, device=self.device.name)
        with self._autocast():
            prediction = self._denoise(self._tensor(noisy), timesteps, tensors)
        values: Array = prediction.float().cpu().numpy()
        return values

    def _conditioning(self, batch: Batch) -> dict[str, Tensor]:
        """What the batch conditions on: the cached embeddings, or else its captions through the encoders, with
        gradients where there is something to train in them."""
        used = () if batch.embeddings else self.base.text_encoders
        self._parking.park(keep=used)
        self._parking.fetch(used)
        if batch.embeddings:
            given = {key: self._tensor(value) for key, value in batch.embeddings.items()}
        else:
            given = self._text(batch.captions)
        if batch.time_ids is not None:
            given["time_ids"] = self._tensor(batch.time_ids)
        return given

    def _prompt_conditioning(self, prompts: list[str], negative: bool) -> dict[str, Array]:
        with self._autocast():
            given = {key: value.float().cpu().numpy() for key, value in self._text(prompts).items()}
        if negative and self._empty_prompt_is_zero and not any(prompts):
            return {key: np.zeros_like(value) for key, value in given.items()}
        return given

    def _autocast(self) -> Any:
        return self.device.autocast(self.precision)

    def _tensor(self, values: Any) -> Any:
        if values is None:
            return None
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device.name)

    def _set_training(self, training: bool) -> None:
        """Dropout and gradient checkpointing on or off, where something is trained and in the denoiser."""
        if training and self.plan is None:
            raise UsageError("This session was opened without a plan: there is nothing to train in it.")
        if training != self._is_training:
            for name in {self.base.denoiser, *self._trained}:
                self._components[name].train(training)
            self._is_training = training

    def _value(self, name: str) -> Array:
        value = self._averages.averages[name] if self._averages is not None else self._optimizer.names[name]
        return _copy(value)

    def _starts(self) -> dict[str, Tensor]:
        return {name: value for group in self._groups for name, value in group.starts.items()}

    def _plan(self) -> TrainingPlan:
        if self.plan is None:
            raise UsageError("This session was opened without a plan: it trained nothing.")
        return self.plan

    def _note(self, text: str) -> None:
        if text and text not in self.notes:
            self.notes.append(text)


def _per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _copy(tensor: Tensor) -> Array:
    values: Array = tensor.detach().cpu().numpy().copy()
    return values
