"""A short trial of a run on made-up latents: how long a step takes and how much memory it needs, on this machine, with
this plan. Nothing is written, and what the trial trains is thrown away."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from persona.core.host.contracts import Runtime, SampleRequest, Session
from persona.core.training.base import Base
from persona.core.training.captions import alternatives
from persona.core.training.loop import Ingredients, all_views, caption_set, take_step
from persona.core.training.plan import Picture, Stream, TrainingPlan
from persona.core.training.schedule import NoiseSchedule
from persona.core.training.views import View, size_of

Array = np.ndarray[Any, np.dtype[Any]]
STEPS = 4
"""Steps of the trial: the first is slower and stands alone, the others are what a step takes."""
LONG = 60.0
"""Seconds after which two steps are enough: a large base on a slow machine."""
SAMPLER_STEPS = 2


@dataclass(frozen=True)
class Calibration:
    """What a trial measured: seconds to load, of the first and a later step, to encode a picture, of a sampler's step
    for one picture; and the peak of memory in bytes (of the device, or of the process on a cpu; 0: not known)."""

    load: float
    first_step: float
    step: float
    picture: float
    sampler_step: float
    peak_bytes: int


def calibrate(plan: TrainingPlan, base: Base, backend: Any, runtime: Runtime, *, paints: bool = True) -> Calibration:
    """Open the base with the plan and make a few steps; `paints` tells whether the run will sample pictures. Raises
    TrainingError when memory does not suffice."""
    from persona.runs.ingredients import trains_text  # the run's own rule of what is cached

    begun = time.perf_counter()
    session: Session = backend.open(base, plan, runtime)
    try:
        load = time.perf_counter() - begun
        trial = with_stand_ins(plan)
        picture = _seconds(lambda: session.encode_pictures(np.zeros((1, 3, plan.height, plan.width), np.float32)))
        given = made_up(trial, base, session, cached=not trains_text(plan, base))
        steps: list[float] = []
        while len(steps) < STEPS and not (len(steps) > 1 and sum(steps) > LONG):
            steps.append(_seconds(lambda: take_step(trial, given, session, len(steps))))
        request = SampleRequest(("",), (0,), width=plan.width, height=plan.height, steps=SAMPLER_STEPS)
        sampling = _seconds(lambda: session.sample(request)) / SAMPLER_STEPS if paints else 0.0
        peak = session.peak_memory() if hasattr(session, "peak_memory") else 0
        return Calibration(load, steps[0], statistics.median(steps[1:]), picture, sampling, peak)
    finally:
        session.close()


def with_stand_ins(plan: TrainingPlan) -> TrainingPlan:
    """The plan with one made-up picture in every stream whose pictures are still to be made."""
    return dataclasses.replace(plan, streams=tuple(_stand_in(stream) for stream in plan.streams))


def _stand_in(stream: Stream) -> Stream:
    if stream.generated is None:
        return stream
    picture = Picture("", (alternatives(stream.generated.prompt)[0],), sha256="0" * 64)
    return dataclasses.replace(stream, pictures=(*stream.pictures, picture), generated=None)


def made_up(plan: TrainingPlan, base: Base, session: Session, *, cached: bool) -> Ingredients:
    """Ingredients of the right shapes: zero moments, and the encoding of one caption for every caption."""

    def moments(number: int, view: View) -> Array:
        width, height = size_of(plan.streams[number].pictures[view.picture], plan)
        factor = base.latent_factor
        return np.zeros((2, base.latent_channels, height // factor, width // factor), np.float32)

    def time_ids(number: int, view: View) -> Array:
        return np.array([plan.height, plan.width, 0, 0, plan.height, plan.width], np.float32)

    captions = caption_set(plan.streams, True)
    one = session.encode_text([max(captions, key=len)]) if cached else {}
    sized = base.components[base.denoiser].get("addition_embed_type") == "text_time"
    return Ingredients(
        schedule=NoiseSchedule.from_config(base.schedule),
        views=all_views(plan),
        moments=moments,
        vae=base.components["vae"],
        embeddings=_Same({name: values[0] for name, values in one.items()}) if cached else {},
        time_ids=time_ids if sized else None,
    )


class _Same(Mapping[str, Mapping[str, Array]]):
    """The same encoding for every caption."""

    def __init__(self, encoding: Mapping[str, Array]) -> None:
        self._encoding = encoding

    def __getitem__(self, caption: str) -> Mapping[str, Array]:
        return self._encoding

    def __iter__(self) -> Iterator[str]:
        return iter(("",))

    def __len__(self) -> int:
        return 1


def _seconds(work: Any) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
