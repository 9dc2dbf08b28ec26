"""The loop of every run, whatever the method and the backend: what is seen when, with which noise, at which learning
rate. Everything about step k follows from the plan and the number k, so a resumed run is the same run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from persona.core.host.errors import NotFinite
from persona.core.training.averages import average_decay
from persona.core.training.batch import Batch
from persona.core.training.learning_rate import multiplier
from persona.core.training.noise import normals
from persona.core.training.order import bucket_batch, caption_choices, caption_dropped, order, shuffle_tags
from persona.core.training.plan import Stream, TrainingPlan
from persona.core.training.processes import ALONE, Part, Processes, computes_together, part_of
from persona.core.training.schedule import NoiseSchedule
from persona.core.training.views import View, draw_latents, repeats_of, sizes_of, views_of

if TYPE_CHECKING:
    from persona.core.host.contracts import Session

Array = np.ndarray[Any, np.dtype[Any]]
SLOTS_PER_STREAM = 1 << 20
"""Sample slots are numbered over all streams; this many belong to each."""


@dataclass(frozen=True)
class Ingredients:
    """What the loop needs beside plan and session. `moments[stream][view]` are [2, c, h, w] arrays; `embeddings` maps
    captions to conditioning arrays (empty when a text encoder is trained); `vae` is the VAE's config; `time_ids` gives
    SDXL's size conditioning [6] of a view; `masks` its mask [1, h, w]."""

    schedule: NoiseSchedule
    views: tuple[tuple[View, ...], ...]
    moments: Callable[[int, View], Array]
    vae: Mapping[str, Any]
    embeddings: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    time_ids: Callable[[int, View], Array] | None = None
    masks: Callable[[int, View], Array | None] | None = None


def all_views(plan: TrainingPlan) -> tuple[tuple[View, ...], ...]:
    """The views of every stream."""
    return tuple(views_of(stream, plan) for stream in plan.streams)


def micro_batches(
    plan: TrainingPlan, given: Ingredients, update: int, processes: Processes = ALONE
) -> Iterator[tuple[Batch, tuple[str, ...]]]:
    """The micro-batches of one optimizer step, with the stream name of each sample; of several processes, those that
    this one computes. Streams that are at different sizes (aspect buckets) come one after the other: a batch has one
    size."""
    mine = part_of(plan, processes)
    for micro in mine.micros:
        together: dict[tuple[int, ...], list[tuple[str, Batch]]] = {}
        for number, stream in enumerate(plan.streams):
            part = _part(plan, given, update, micro, number, mine)
            if part is None:
                continue
            together.setdefault(part.latents.shape[1:], []).append((stream.name, part))
        for parts in together.values():
            yield _join([part for _, part in parts]), tuple(name for name, part in parts for _ in range(len(part)))


def as_often(
    mine: list[tuple[Batch, tuple[str, ...]]],
    plan: TrainingPlan,
    given: Ingredients,
    update: int,
    processes: Processes,
) -> list[tuple[Batch, tuple[str, ...]]]:
    """The micro-batches of this process, and behind them such as are of no stream and count for nothing, until there
    are as many as any process has: where none can compute alone, all compute equally often."""
    numbers = np.zeros(processes.count)
    numbers[processes.rank] = len(mine)
    missing = int(processes.sum(numbers).max()) - len(mine)
    if missing:
        batch, _ = mine[-1] if mine else next(micro_batches(plan, given, update))
        mine += [(batch.of_no_weight(), ())] * missing
    return mine


def _chosen(plan: TrainingPlan, stream: Stream, views: Sequence[View], update: int, micro: int) -> list[View]:
    """The views that a micro-batch of an update uses, at most batch × share of them."""
    each = plan.batch * stream.share
    repeats = repeats_of(stream, views)
    if plan.buckets:
        number = update * plan.accumulation + micro
        row = bucket_batch(plan.seed, stream.name, sizes_of(stream, views, plan), repeats, each, number)
        return [views[index] for index in row]
    row = order(plan.seed, stream.name, len(views), update, each * plan.accumulation, repeats)
    return [views[index] for index in row[micro * each : (micro + 1) * each]]


def _part(plan: TrainingPlan, given: Ingredients, update: int, micro: int, number: int, mine: Part) -> Batch | None:
    """One stream's samples of a micro-batch; None when a short batch of a bucket leaves this process without one."""
    stream = plan.streams[number]
    row = _chosen(plan, stream, given.views[number], update, micro)
    places = mine.places(len(row))
    if not places:
        return None
    chosen = [row[place] for place in places]
    each = plan.batch * stream.share
    slots = [number * SLOTS_PER_STREAM + micro * each + place for place in places]
    per_update = each * plan.accumulation
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
    w = np.full(len(chosen), stream.weight / per_update)
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
        time_ids=None if given.time_ids is None else np.stack([given.time_ids(number, view) for view in chosen]),
        mask=np.stack([np.ones((1, *shape[1:]), np.float32) if mask is None else mask for mask in masks])
        if any(mask is not None for mask in masks)
        else None,
    )


def _captions(
    plan: TrainingPlan, update: int, slots: Sequence[int], offered: Sequence[Sequence[str]]
) -> tuple[str, ...]:
    which = caption_choices(plan.seed, update, slots, [len(captions) for captions in offered])
    dropped = caption_dropped(plan.seed, update, slots, plan.caption_dropout)
    drawn = ["" if drop else captions[index] for captions, index, drop in zip(offered, which, dropped, strict=True)]
    if plan.shuffle_tags:
        pairs = zip(drawn, slots, strict=True)
        drawn = [shuffle_tags(text, plan.seed, update, slot, keep=plan.keep_tags) for text, slot in pairs]
    return tuple(drawn)


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
    told = plan.optimizer
    factor = multiplier(
        told.schedule, update, warmup=told.warmup, total=plan.steps, cycles=told.cycles, power=told.power
    )
    return [trained.learning_rate * factor for trained in plan.trains]


def take_step(
    plan: TrainingPlan, given: Ingredients, session: Session, update: int, processes: Processes = ALONE
) -> dict[str, float]:
    """One optimizer step; returns its figures, which are those of all processes. Raises NotFinite, in every process,
    when the loss or the gradient is not finite; the weights are then what they were before the step, unless the
    gradient alone was not finite."""
    begun = time.perf_counter()
    streams = {stream.name: number for number, stream in enumerate(plan.streams)}
    figures = np.zeros((len(streams), 3))  # of every stream: what its losses add to the total, their sum, their number
    together = computes_together(session)
    batches = micro_batches(plan, given, update, processes)
    for batch, names in as_often(list(batches), plan, given, update, processes) if together else batches:
        losses = np.asarray(session.accumulate(batch), np.float64)
        if names:
            numbers = [streams[name] for name in names]
            np.add.at(figures, numbers, np.stack([losses * batch.w, losses, np.ones(len(losses))], axis=1))
        if not np.isfinite(losses).all() and not together:
            break  # the others have to know it before anybody stops
    figures = processes.sum(figures)
    total = float(figures[:, 0].sum())
    if not math.isfinite(total):
        raise NotFinite(_not_finite("loss", plan))
    rates = learning_rates(plan, update)
    norm, skipped = session.update(rates, plan.optimizer.max_grad_norm)
    if not math.isfinite(norm) and not skipped:
        raise NotFinite(_not_finite("gradient", plan))
    if plan.ema_decay is not None:
        session.average(average_decay(plan.ema_decay, update + 1))
    values = {"loss": total, "learning_rate": rates[0], "grad_norm": float(norm)}
    if len(streams) > 1:
        values |= {f"loss_{name}": float(figures[number, 1] / figures[number, 2]) for name, number in streams.items()}
    if skipped:
        values["skipped"] = 1.0
    values["seconds"] = time.perf_counter() - begun
    return values


def _not_finite(what: str, plan: TrainingPlan) -> str:
    rates = ", ".join(f"{trained.learning_rate:g}" for trained in plan.trains)
    return f"The {what} is not finite (learning rate {rates}, precision {plan.precision})."


def caption_set(streams: Sequence[Stream], with_empty: bool) -> list[str]:
    """Every caption a run can meet, each once, in order."""
    found = dict.fromkeys(caption for stream in streams for picture in stream.pictures for caption in picture.captions)
    if with_empty:
        found[""] = None
    return list(found)
