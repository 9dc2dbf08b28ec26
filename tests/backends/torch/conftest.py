"""Narrow bases, made once per test session, and the plans and batches the torch backend's tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from persona.core.host.contracts import Runtime
from persona.core.training.base import Base
from persona.core.training.batch import Batch
from persona.core.training.plan import LowRank, TrainingPlan
from persona.plugins.backends.torch import TorchBackend
from tests.narrow_models import narrow_base, narrow_pipeline

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """`narrow("sd1")`, "sd2" or "sdxl": that base."""
    made: dict[str, Base] = {}

    def base(kind: str) -> Base:
        if kind not in made:
            made[kind] = narrow_base(kind, narrow_pipeline(kind, tmp_path_factory.mktemp("bases") / kind))
        return made[kind]

    return base


@pytest.fixture
def opened() -> Any:
    """Open sessions on the cpu, closed after the test."""
    sessions = []

    def open_session(base: Base, plan: TrainingPlan | None = None, precision: str = "fp32") -> Any:
        sessions.append(TorchBackend().open(base, plan, Runtime("cpu", precision)))
        return sessions[-1]

    yield open_session
    for session in sessions:
        session.close()


def modules(base: Base, component: str, endings: tuple[str, ...], *, limit: int | None = None) -> tuple[str, ...]:
    """Paths of the component's modules that end so, sorted; the first `limit`."""
    found = sorted(name.removesuffix(".weight") for name in base.parameters[component] if name.endswith(".weight"))
    return tuple([path for path in found if path.endswith(endings)][:limit])


def plan_of(*trains: Any, **options: Any) -> TrainingPlan:
    """A plan that trains this; no streams, since the tests make the batches."""
    return TrainingPlan(method="test", trains=trains, streams=(), steps=10, **options)


def attention_lora(
    base: Base, *, rank: int = 2, alpha: float = 3.0, limit: int | None = None, **options: Any
) -> LowRank:
    """LoRA on all attention projections of the denoiser, or the first `limit` of them."""
    return LowRank("unet", modules(base, "unet", ATTENTION, limit=limit), rank, alpha, 1e-2, **options)


def batch_of(base: Base, *, count: int = 2, seed: int = 0, **replaced: Any) -> Batch:
    """A batch of random latents and noise with v-prediction-like coefficients, different for every sample."""
    random = np.random.default_rng(seed)
    a = random.uniform(0.3, 0.9, count).astype(np.float32)
    width = base.components["unet"]["cross_attention_dim"]
    values: dict[str, Any] = {
        "latents": random.standard_normal((count, 4, 8, 8), np.float32),
        "noise": random.standard_normal((count, 4, 8, 8), np.float32),
        "timesteps": random.integers(0, 1000, count),
        "a": a,
        "s": np.sqrt(1 - a**2),
        "p": -np.sqrt(1 - a**2),
        "q": a,
        "w": random.uniform(0.2, 0.7, count).astype(np.float32),
        "embeddings": {"hidden_states": random.standard_normal((count, 77, width), np.float32)},
    }
    if base.family == "sdxl":
        values["embeddings"]["pooled"] = random.standard_normal((count, 40), np.float32)
        values["time_ids"] = np.array([[64, 48, 0, 8, 64, 64]] * count, np.float32)
    return Batch(**(values | replaced))
