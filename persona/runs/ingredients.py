"""What a run makes once and uses in every step: class pictures, latent moments, encoded captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.host.contracts import Session
from persona.core.training.base import Base
from persona.core.training.buckets import time_ids
from persona.core.training.conditioning import EncodedCaptions
from persona.core.training.decode import fit_picture
from persona.core.training.events import Emit, Stage
from persona.core.training.loop import Ingredients, all_views, caption_set
from persona.core.training.plan import NewTokens, TrainingPlan
from persona.core.training.priors import fill_stream
from persona.core.training.processes import ALONE, Processes
from persona.core.training.schedule import NoiseSchedule
from persona.core.training.views import MomentCache, View, size_of, view_key
from persona.hub.bases import cache_folder
from persona.runs.pictures import load_pixels, masks_of
from persona.runs.preparing import Prepared


def with_class_pictures(ready: Prepared, session: Session, emit: Emit, processes: Processes = ALONE) -> TrainingPlan:
    """The plan with its Generated streams filled, pictures made where they are missing, by all processes together."""

    def report(done: int, total: int) -> None:
        emit(Stage("class pictures", done, total))

    streams = [
        fill_stream(
            stream,
            ready.own_class_pictures.get(stream.name, ()),
            base=ready.base,
            plan=ready.plan,
            session=session,
            cache=cache_folder(),
            report=report,
            processes=processes,
        )
        for stream in ready.plan.streams
    ]
    return dataclasses.replace(ready.plan, streams=tuple(streams))


def ingredients(file: Path, plan: TrainingPlan, base: Base, session: Session, emit: Emit) -> Ingredients:
    """Latent moments of all views, kept in `file`, and, unless a text encoder is trained, the encoded captions."""
    views = all_views(plan)
    keys: dict[tuple[int, View], str] = {}
    place: dict[str, tuple[int, View]] = {}
    for number, stream in enumerate(plan.streams):
        for view in views[number]:
            key = view_key(stream.pictures[view.picture], view, plan, base.hash)
            keys[number, view] = key
            place[key] = (number, view)

    def picture_of(key: str) -> Any:
        number, view = place[key]
        return load_pixels(plan.streams[number].pictures[view.picture], view, plan)

    cache = MomentCache(file)
    cache.fill(
        list(place), picture_of, session.encode_pictures, lambda done, total: emit(Stage("latents", done, total))
    )
    return Ingredients(
        schedule=NoiseSchedule.from_config(base.schedule),
        views=views,
        moments=lambda number, view: cache[keys[number, view]],
        vae=base.components["vae"],
        embeddings={} if trains_text(plan, base) else encoded_captions(plan, session, emit),
        time_ids=time_ids_of(plan, base),
        masks=masks_of(plan, base.latent_factor),
    )


def trains_text(plan: TrainingPlan, base: Base) -> bool:
    """Whether captions have to go through the text encoders at every step."""
    return any(isinstance(part, NewTokens) for part in plan.trains) or bool(
        plan.trained_components() & set(base.text_encoders)
    )


def encoded_captions(plan: TrainingPlan, session: Session, emit: Emit) -> EncodedCaptions:
    """Every caption's conditioning arrays; those of shuffled tags as they are met."""
    known = caption_set(plan.streams, plan.caption_dropout > 0)
    return EncodedCaptions(session.encode_text, known, lambda done, total: emit(Stage("captions", done, total)))


def time_ids_of(plan: TrainingPlan, base: Base) -> Callable[[int, View], Any] | None:
    """SDXL's micro-conditioning of a view [6]: original size, crop corner, target size (arXiv 2307.01952 §2.2); None
    for a base that has none."""
    if base.components[base.denoiser].get("addition_embed_type") != "text_time":
        return None

    def of_view(number: int, view: View) -> Any:
        picture = plan.streams[number].pictures[view.picture]
        size = size_of(picture, plan)
        original = size if picture.size == (0, 0) else picture.size
        made = fit_picture(picture, original, size, crop=None if plan.center_crop else view.crop, seed=plan.seed)
        return np.array(time_ids(made), np.float32)

    return of_view
