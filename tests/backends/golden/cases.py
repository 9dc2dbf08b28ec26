"""What every backend has to compute alike on the tiny bases, without a framework: plans, batches, values to start
from. `make.py` writes what torch makes of them; the tests of the other backends read that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.host.contracts import SampleRequest
from persona.core.training.base import Base
from persona.core.training.batch import Batch
from persona.core.training.noise import normal, uniform
from persona.core.training.plan import LowRank, NewToken, NewTokens, TrainingPlan, Weights

FILE = Path(__file__).parent / "golden.npz"
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
CAPTIONS = ("a photo of a red toy", "a <toy> on the blue background")
TOKENS = (NewToken("<toy>", "red cat", 3), NewToken("<other>", "dog"))
PROMPTS = ("a photo of a cat", "", "A RED toy, on the background!")
REQUEST = SampleRequest(("a red toy", "a dog"), (3, 4), steps=4, guidance_scale=3.0, sampler="ddim", batch=2)


def modules(base: Base, component: str, endings: tuple[str, ...]) -> tuple[str, ...]:
    """Paths of the component's modules that end so, sorted."""
    paths = (name.removesuffix(".weight") for name in base.parameters[component] if name.endswith(".weight"))
    return tuple(sorted(path for path in paths if path.endswith(endings)))


def plan_of(*trains: Any, **options: Any) -> TrainingPlan:
    """A plan that trains this; no streams, since the batches are made here."""
    return TrainingPlan(method="test", trains=trains, streams=(), steps=10, **options)


def cases(base: Base) -> dict[str, TrainingPlan]:
    """The plans of a base, by name."""
    layers = modules(base, "unet", (*ATTENTION, ".conv1", "downsamplers.0.conv"))
    low_rank = LowRank("unet", layers, 2, 3.0, 1e-2)
    text = LowRank("text_encoder", modules(base, "text_encoder", (".q_proj", ".v_proj", ".fc1")), 2, 2.0, 1e-3)
    return {
        "low rank": plan_of(low_rank),
        "decomposed, with text encoder": plan_of(dataclasses.replace(low_rank, decomposed=True), text),
        "new tokens": plan_of(NewTokens(base.text_encoders, TOKENS, 1e-2)),
        "whole weights": plan_of(Weights("unet", 1e-4), Weights("text_encoder", 1e-4)),
    }


def start_values(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A session's state with its low-rank factors moved away from the zeros that hide half of the gradients."""
    return {
        name: np.float32(0.1) * normal(1, name, 0, 0, value.shape) if name.endswith((".down", ".up")) else value
        for name, value in state.items()
    }


def batch_of(base: Base, case: str, *, count: int = 2, number: int = 0) -> Batch:
    """Batch `number` of a case: through the text encoders where those are trained; masked when `number` is odd."""

    def drawn(purpose: str, *shape: int) -> np.ndarray:
        return normal(2, purpose, number, 0, (count, *shape))

    a = uniform(2, "a", number, 0, (count,)).astype(np.float32) * np.float32(0.6) + np.float32(0.3)
    side, channels = base.native_size // base.latent_factor, base.latent_channels
    values: dict[str, Any] = {
        "latents": drawn("latents", channels, side, side),
        "noise": drawn("noise", channels, side, side),
        "timesteps": (uniform(2, "time", number, 0, (count,)) * 1000).astype(np.int64),
        "a": a,
        "s": np.sqrt(1 - a**2),
        "p": -np.sqrt(1 - a**2),
        "q": a,
        "w": uniform(2, "w", number, 0, (count,)).astype(np.float32) + np.float32(0.1),
        "mask": uniform(2, "mask", number, 0, (count, 1, side, side)).astype(np.float32) if number % 2 else None,
    }
    if base.family == "sdxl":
        values["time_ids"] = np.array([[64, 48, 0, 8, 64, 64]] * count, np.float32)
    if case == "low rank":
        unet = base.components["unet"]
        values["embeddings"] = {"hidden_states": drawn("text", 77, unet["cross_attention_dim"])}
        if base.family == "sdxl":
            pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
            values["embeddings"]["pooled"] = drawn("pooled", pooled)
    else:
        values["captions"] = tuple(CAPTIONS[n % len(CAPTIONS)] for n in range(count))
    return Batch(**values)


def pictures() -> np.ndarray:
    """[2, 3, 64, 72] in −1..1."""
    return uniform(2, "pictures", 0, 0, (2, 3, 64, 72)).astype(np.float32) * np.float32(2) - np.float32(1)


def kept_whole(case: str, names: Iterable[str]) -> list[str]:
    """The values whose gradients are compared number by number; of the others, the norm."""
    every = {"whole weights": 40, "decomposed, with text encoder": 5, "low rank": 3}.get(case, 1)
    return sorted(names)[::every]
