"""What a run trained, as an adapter: from the values alone, wherever they are (a session's memory, a checkpoint)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from persona.core.adapters.entry import Adapter, Embedding, Entry, Magnitude, Scale
from persona.core.adapters.tensor import in_memory
from persona.core.training.lora_values import FROM_WEIGHT
from persona.core.training.plan import LowRank, NewTokens, TrainingPlan

Array = np.ndarray[Any, np.dtype[Any]]
Value = Callable[[str], Array]
"""An array by its name in states: "unet.<path>.down", "text_encoder.<placeholder>"."""


def adapter_of(plan: TrainingPlan, family: str, trained: Value, start: Value) -> Adapter:
    """The low-rank deltas and new tokens of `plan`. `trained` gives trained values (or their averages), torch layout;
    `start` the factors that a delta from the base's weight started from (lora_values.FROM_WEIGHT)."""
    adapter = Adapter(family=family, entries={}, metadata=dict(plan.metadata))
    for part in plan.trains:
        if isinstance(part, LowRank):
            for path in part.targets:
                adapter.entries[part.component, path] = _entry(part, path, trained, start)
        elif isinstance(part, NewTokens):
            adapter.embeddings += [
                Embedding(token.placeholder, {name: in_memory(trained(f"{name}.{token.placeholder}"))
                                              for name in part.components})
                for token in part.tokens
            ]  # fmt: skip
    return adapter


def _entry(part: LowRank, path: str, trained: Value, start: Value) -> Entry:
    name = f"{part.component}.{path}"
    rank, alpha = part.ranks.get(path, part.rank), float(part.alphas.get(path, part.alpha))
    down, up = trained(f"{name}.down"), trained(f"{name}.up")
    if part.initialisation in FROM_WEIGHT:  # scale · (up · down − up₀ · down₀) is one product of twice the rank
        down = np.concatenate([down, start(f"{name}.down")])
        up = np.concatenate([up, -start(f"{name}.up")], axis=1)
        rank, alpha = 2 * rank, alpha * (math.sqrt(2) if part.rank_stabilised else 2)
    return Entry(
        component=part.component,
        path=path,
        algorithm="lora",
        factors={"down": in_memory(down), "up": in_memory(up)},
        scale=Scale(alpha, rank, "sqrt_rank" if part.rank_stabilised else "rank", origin="trained"),
        magnitude=Magnitude(in_memory(trained(f"{name}.magnitude")), "out") if part.decomposed else None,
    )
