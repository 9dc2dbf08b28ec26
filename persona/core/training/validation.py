"""A validation loss that can be compared between steps and runs: pictures held out of training, always with the same
noise and the same timesteps, so that only the model changes (kohya's docs/validation.md has the idea)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from persona.core.host.errors import TrainingError
from persona.core.training.batch import Batch
from persona.core.training.loop import Ingredients
from persona.core.training.noise import normals, uniforms
from persona.core.training.plan import TrainingPlan
from persona.core.training.schedule import NoiseSchedule
from persona.core.training.views import View, draw_latents

if TYPE_CHECKING:
    from persona.core.host.contracts import Session

TIMESTEPS = 8
"""Timesteps a picture is judged at: one in each eighth of the schedule."""


def validation_batches(plan: TrainingPlan, given: Ingredients) -> Iterator[Batch]:
    """A batch for every held-out picture of the plan's first stream: TIMESTEPS samples of it."""
    stream = plan.streams[0]
    for number, picture in enumerate(stream.pictures):
        view = View(number, 0, False)
        slots = [number * TIMESTEPS + place for place in range(TIMESTEPS)]
        moments = given.moments(0, view)
        shape = moments.shape[1:]
        timesteps = spread_timesteps(given.schedule, plan.seed, slots)
        a, s, p, q = (values.astype(np.float32) for values in given.schedule.coefficients(timesteps))
        caption = picture.captions[0]
        cached = given.embeddings[caption] if given.embeddings else {}
        mask = given.masks(0, view) if given.masks else None
        yield Batch(
            latents=draw_latents(
                [moments] * TIMESTEPS, normals(plan.seed, "validation latent", 0, slots, shape), given.vae
            ),
            noise=normals(plan.seed, "validation noise", 0, slots, shape),
            timesteps=given.schedule.times(timesteps),
            a=a,
            s=s,
            p=p,
            q=q,
            w=np.full(TIMESTEPS, 1.0 / TIMESTEPS, np.float32),
            captions=(caption,) * TIMESTEPS,
            embeddings={name: np.stack([values] * TIMESTEPS) for name, values in cached.items()},
            time_ids=None if given.time_ids is None else np.stack([given.time_ids(0, view)] * TIMESTEPS),
            mask=None if mask is None else np.stack([mask] * TIMESTEPS),
        )


def spread_timesteps(schedule: NoiseSchedule, seed: int, slots: list[int]) -> Any:
    """One timestep for each slot, int64: slot k's somewhere in part k mod TIMESTEPS of the schedule."""
    parts = np.asarray(slots) % TIMESTEPS
    within = uniforms(seed, "validation timestep", 0, slots, ())
    return ((parts + within) / TIMESTEPS * len(schedule)).astype(np.int64)


def validation_loss(plan: TrainingPlan, given: Ingredients, session: Session) -> float:
    """The mean loss over held-out pictures and timesteps, unweighted. Raises TrainingError when it is not finite."""
    losses = np.concatenate([session.evaluate(batch) for batch in validation_batches(plan, given)])
    mean = float(np.mean(losses, dtype=np.float64))
    if not np.isfinite(mean):
        raise TrainingError("The validation loss is not finite.", hint="Lower it: --learning-rate")
    return mean
