"""The loop of every run, whatever the method and the backend: what is seen when, with which noise, at which learning
rate. Everything about step k follows from the plan and the number k, so a resumed run is the same run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from persona.core.host.errors import TrainingError
from persona.core.training.batch import Batch
from persona.core.training.learning_rate import multiplier
from persona.core.training.noise import normals
from persona.core.training.order import caption_choices, caption_dropped, order
from persona.core.training.plan import Stream, TrainingPlan
from persona.core.training.schedule import NoiseSchedule
from persona.core.training.views import View, draw_latents, views_of

if TYPE_CHECKING:
    from persona.core.host.contracts import Session

Array = np.ndarray[Any, np.dtype[Any]]
SLOTS_PER_STREAM = 1 << 20
"""Sample slots are numbered over all streams; this many belong to each."""


@dataclass(frozen=True)
class Ingredients:
    """What the loop needs beside plan and session. `moments[stream][view]` are [2, c, h, w] arrays; `embeddings` maps
    captions to conditioning arrays (empty when a text encoder is trained); `vae` is the VAE's config; `time_ids` [6]
    for SDXL."""

    schedule: NoiseSchedule
    views: tuple[tuple[View, ...], ...]
    moments: Callable[[int, View], Array]
    vae: Mapping[str, Any]
    embeddings: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    time_ids: Array | None = None
    masks: Callable[[int, View], Array | None] | None = None


def all_views(plan: TrainingPlan) -> tuple[tuple[View, ...], ...]:
    """The views of every stream."""
    return tuple(views_of(stream, plan) for stream in plan.streams)


def micro_batches(plan: TrainingPlan, given: Ingredients, update: int) -> Iterator[tuple[Batch, tuple[str, ...]]]:
    """The micro-batches of one optimizer step, with the stream name of each sample."""
    for micro in range(plan.accumulation):
        parts = [_part(plan, given, update, micro, number) for number in range(len(plan.streams))]
        names = tuple(stream.name for stream, part in zip(plan.streams, parts, strict=True) for _ in range(len(part)))
        yield _join(parts), names


def _part(plan: TrainingPlan, given: Ingredients, update: int, micro: int, number: int) -> Batch:
    stream, views = plan.streams[number], given.views[number]
    each = plan.batch * stream.share
    positions = np.arange(micro * each, (micro + 1) * each)
    slots = [number * SLOTS_PER_STREAM + int(position) for position in positions]
    per_update = each * plan.accumulation
    repeats = [stream.pictures[view.picture].repeats for view in views]
    row = order(plan.seed, stream.name, len(views), update, per_update, repeats)
    chosen = [views[index] for index in row[positions]]
    captions = _captions(plan, update, slots, [stream.pictures[view.picture].captions for view in chosen])
    moments = [given.moments(number, view) for view in chosen]
    shape = moments[0].shape[1:]
    latents = draw_latents(moments, normals(plan.seed, "latent", update, slots, shape), given.vae)
    noise = normals(plan.seed, "noise", update, slots, shape)
    if plan.loss.noise_offset:
        offset = normals(plan.seed, "noise offset", update, slots, (shape[0], 1, 1))
        noise = noise + np.float32(plan.loss.noise_offset) * offset
    timesteps = given.schedule.draw_timesteps(plan.seed, update, slots)
    a, s, p, q = given.schedule.coefficients(timesteps)
    w = np.full(each, stream.weight / per_update)
    if plan.loss.min_snr_gamma is not None:
        w = w * given.schedule.min_snr_weight(timesteps, plan.loss.min_snr_gamma)
    masks = [given.masks(number, view) for view in chosen] if given.masks else []
    return Batch(
        latents=latents,
        noise=noise.astype(np.float32),
        timesteps=given.schedule.times(timesteps),
        a=a.astype(np.float32),
        s=s.astype(np.float32),
        p=p.astype(np.float32),
        q=q.astype(np.float32),
        w=w.astype(np.float32),
        captions=captions,
        embeddings=_embeddings(given.embeddings, captions),
        time_ids=None if given.time_ids is None else np.tile(given.time_ids, (each, 1)),
        mask=np.stack([np.ones((1, *shape[1:]), np.float32) if mask is None else mask for mask in masks])
        if any(mask is not None for mask in masks)
        else None,
    )


def _captions(
    plan: TrainingPlan, update: int, slots: Sequence[int], offered: Sequence[Sequence[str]]
) -> tuple[str, ...]:
    which = caption_choices(plan.seed, update, slots, [len(captions) for captions in offered])
    dropped = caption_dropped(plan.seed, update, slots, plan.caption_dropout)
    return tuple("" if drop else captions[index] for captions, index, drop in zip(offered, which, dropped, strict=True))


def _embeddings(cached: Mapping[str, Mapping[str, Array]], captions: Sequence[str]) -> dict[str, Array]:
    if not cached:
        return {}
    names = cached[captions[0]].keys()
    return {name: np.stack([cached[caption][name] for caption in captions]) for name in names}


def _join(parts: Sequence[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("latents", "noise", "timesteps", "a", "s", "p", "q", "w")
    }
    masked = any(part.mask is not None for part in parts)
    return Batch(
        **arrays,
        captions=tuple(caption for part in parts for caption in part.captions),
        embeddings={name: np.concatenate([part.embeddings[name] for part in parts]) for name in parts[0].embeddings},
        time_ids=None if parts[0].time_ids is None else np.concatenate([part.time_ids for part in parts]),  # type: ignore[misc]
        mask=np.concatenate([_mask_of(part) for part in parts]) if masked else None,
    )


def _mask_of(part: Batch) -> Array:
    return np.ones((len(part), 1, *part.latents.shape[2:]), np.float32) if part.mask is None else part.mask


def learning_rates(plan: TrainingPlan, update: int) -> list[float]:
    """One learning rate per trained part for the optimizer step `update` (the first is 0)."""
    factor = multiplier(plan.optimizer.schedule, update, warmup=plan.optimizer.warmup, total=plan.steps)
    return [trained.learning_rate * factor for trained in plan.trains]


def take_step(plan: TrainingPlan, given: Ingredients, session: Session, update: int) -> dict[str, float]:
    """One optimizer step; returns its figures. Raises TrainingError when the loss or the gradient is not finite; the
    weights are then what they were before the step, unless the gradient alone was not finite."""
    begun = time.perf_counter()
    total, per_stream = 0.0, {stream.name: [0.0, 0] for stream in plan.streams}
    for batch, names in micro_batches(plan, given, update):
        losses = np.asarray(session.accumulate(batch), np.float64)
        if not np.isfinite(losses).all():
            raise TrainingError(_not_finite("loss", update, plan))
        total += float((losses * batch.w).sum())
        for name, loss in zip(names, losses, strict=True):
            per_stream[name][0] += float(loss)
            per_stream[name][1] += 1
    rates = learning_rates(plan, update)
    norm, skipped = session.update(rates, plan.optimizer.max_grad_norm)
    if not math.isfinite(norm) and not skipped:
        raise TrainingError(_not_finite("gradient", update, plan))
    values = {"loss": total, "learning_rate": rates[0], "grad_norm": float(norm)}
    if len(per_stream) > 1:
        values |= {f"loss_{name}": summed / count for name, (summed, count) in per_stream.items()}
    if skipped:
        values["skipped"] = 1.0
    values["seconds"] = time.perf_counter() - begun
    return values


def _not_finite(what: str, update: int, plan: TrainingPlan) -> str:
    rates = ", ".join(f"{trained.learning_rate:g}" for trained in plan.trains)
    return f"The {what} is not finite at step {update + 1} (learning rate {rates}, precision {plan.precision})."


def caption_set(streams: Sequence[Stream], with_empty: bool) -> list[str]:
    """Every caption a run can meet, each once, in order."""
    found = dict.fromkeys(caption for stream in streams for picture in stream.pictures for caption in picture.captions)
    if with_empty:
        found[""] = None
    return list(found)
